//! GPipe, and looped breadth-first: all forwards, then all backwards.

use super::order::{Order, Placement, single_copy};
use crate::error::Result;
use crate::op::Kind;
use crate::schedule::Schedule;

/// All forwards, then all backwards, both in the order of the micro-batches.
pub(super) fn gpipe(p: usize, m: u32) -> Result<Schedule> {
    let mut order = Order::new("gpipe", single_copy(p, 1, m, Placement::Loop)?);
    for rank in 0..p {
        for kind in [Kind::Forward, Kind::Backward] {
            for c in 0..m {
                order.push(kind, 0, rank, c);
            }
        }
        order.end_rank();
    }
    Ok(order.finish())
}

/// Stage after stage all forwards; then all backwards in exactly the reverse order.
pub(super) fn looped_bfs(p: usize, m: u32, v: usize) -> Result<Schedule> {
    let mut order = Order::new("looped_bfs", single_copy(p, v, m, Placement::Loop)?);
    for rank in 0..p {
        for chunk in 0..v {
            for c in 0..m {
                order.push(Kind::Forward, 0, chunk * p + rank, c);
            }
        }
        for chunk in (0..v).rev() {
            for c in (0..m).rev() {
                order.push(Kind::Backward, 0, chunk * p + rank, c);
            }
        }
        order.end_rank();
    }
    Ok(order.finish())
}
