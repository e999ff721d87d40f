//! ZB-H1 and ZB-H2: 1F1B with split backwards, whose weight parts wait for a gap.

use super::interleaved::one_for_one;
use super::order::{Order, Placement, single_copy};
use crate::error::Result;
use crate::schedule::Schedule;

/// Weight parts lag by the rank, so every rank holds P activations at most, as 1F1B's first does.
pub(super) fn zb_h1(p: usize, m: u32) -> Result<Schedule> {
    lagging("zb_h1", p, m, 1)
}

/// Twice as many forwards ahead, twice the lag: ranks never idle once they have begun, and hold
/// 2P - 1 activations at most.
pub(super) fn zb_h2(p: usize, m: u32) -> Result<Schedule> {
    lagging("zb_h2", p, m, 2)
}

fn lagging(name: &'static str, p: usize, m: u32, pace: usize) -> Result<Schedule> {
    let mut order = Order::new(name, single_copy(p, 1, m, Placement::Loop)?);
    for rank in 0..p {
        let steps = (0..m).map(|c| (rank, c)).collect();
        let warm = (pace * (p - 1 - rank)).min(m as usize);
        one_for_one(&mut order, &steps, &steps, warm, Some(pace * rank));
    }
    Ok(order.finish())
}
