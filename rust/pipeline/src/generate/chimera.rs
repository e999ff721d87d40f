//! Chimera: two opposite 1F1B pipelines that fit exactly into each other's gaps.
//!
//! On a clock where a forward and a backward take one tick each, copy 0 runs the forward of its
//! k-th micro-batch on stage s at tick s + 2k and the backward at 2P - 1 - s + 2k. Copy 1 does the
//! same from the other end. With at most P/2 micro-batches a copy the two never want a rank at the
//! same tick, and the next P/2 follow 2P ticks later, again without a clash; so the clock orders
//! each rank's instructions for any number of micro-batches.

use super::order::{Order, two_copies};
use crate::error::Result;
use crate::op::Kind;
use crate::schedule::Schedule;

pub(super) fn chimera(p: usize, m: u32) -> Result<Schedule> {
    let counts = [m.div_ceil(2), m / 2];
    let mut order = Order::new("chimera", two_copies(p, counts[0], counts[1])?);
    let unit = (p / 2) as u32;
    let mut ticks: Vec<(u64, Kind, u8, usize, u32)> = Vec::new();
    for rank in 0..p {
        ticks.clear();
        for (copy, count) in (0u8..).zip(counts) {
            let stage = if copy == 0 { rank } else { p - 1 - rank };
            for c in 0..count {
                let enters = 2 * p as u64 * u64::from(c / unit) + 2 * u64::from(c % unit);
                let forward = enters + stage as u64;
                let backward = enters + (2 * p - 1 - stage) as u64;
                ticks.push((forward, Kind::Forward, copy, stage, c));
                ticks.push((backward, Kind::Backward, copy, stage, c));
            }
        }
        ticks.sort_unstable();
        for &(_, kind, copy, stage, c) in &ticks {
            order.push(kind, copy, stage, c);
        }
        order.end_rank();
    }
    Ok(order.finish())
}
