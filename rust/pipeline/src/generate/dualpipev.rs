//! DualPipeV: DualPipe cut in half and folded into a V, so that no stage needs a second copy.

use super::order::{Order, Placement, TwoStreams, eight_steps, single_copy};
use crate::error::Result;
use crate::schedule::Schedule;

/// DeepSeek's order for 2P micro-batches and more (its program refuses fewer); below, the same
/// order without the last micro-batches, lone backwards split.
pub(super) fn dualpipev(p: usize, m: u32) -> Result<Schedule> {
    let mut order = Order::new("dualpipev", single_copy(p, 2, m, Placement::V)?);
    let unfolded = (m as usize).max(2 * p - 1);
    for rank in 0..p {
        let places = [(0, rank), (0, 2 * p - 1 - rank)];
        let streams = TwoStreams::new(&mut order, places);
        eight_steps(streams, p, rank, unfolded + rank + 1 - 2 * p);
    }
    Ok(order.finish_without_surplus(unfolded as u32))
}
