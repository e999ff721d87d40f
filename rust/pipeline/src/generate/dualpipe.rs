//! DualPipe: micro-batches enter at both ends, and a forward of one direction overlaps with a
//! backward of the other.

use super::order::{Order, TwoStreams, eight_steps, two_copies};
use crate::error::Result;
use crate::schedule::Schedule;

/// DeepSeek's order for 2P micro-batches and more (its program refuses fewer); below, and for odd
/// numbers, the same order without the last micro-batches, lone backwards split.
pub(super) fn dualpipe(p: usize, m: u32) -> Result<Schedule> {
    let layout = two_copies(p, m.div_ceil(2), m / 2)?;
    let mut order = Order::new("dualpipe", layout);
    let half = p / 2;
    let each = (m.div_ceil(2) as usize).max(p - 1);
    for rank in 0..p {
        let depth = rank.min(p - 1 - rank);
        let (own, other) = if rank < half { (0, 1) } else { (1, 0) };
        let places = [(own, depth), (other, p - 1 - depth)];
        let streams = TwoStreams::new(&mut order, places);
        eight_steps(streams, half, depth, each + depth + 1 - p);
    }
    Ok(order.finish_without_surplus(each as u32))
}
