//! ZBV: stages run down the ranks and up again, backwards are split, and in the steady state
//! every rank repeats F I W of its first stage and F I W of its second without a gap.

use super::order::{Order, Placement, TwoStreams, single_copy};
use crate::error::Result;
use crate::schedule::Schedule;

pub(super) fn zbv(p: usize, m: u32) -> Result<Schedule> {
    let mut order = Order::new("zbv", single_copy(p, 2, m, Placement::V)?);
    // The pattern needs 2P - 1 micro-batches to unfold; fewer are the same order with holes.
    let unfolded = m.max(2 * p as u32 - 1);
    for rank in 0..p {
        let mut streams = TwoStreams::new(&mut order, [(0, rank), (0, 2 * p - 1 - rank)]);
        let ahead = p - rank;
        for _ in 0..2 * ahead - 1 {
            streams.forward(0);
        }
        for _ in 0..rank {
            streams.forward(1);
            streams.forward(0);
        }
        for _ in 0..ahead {
            streams.forward(1);
            streams.backward_input(1);
            streams.kept_weight();
        }
        // 2P - 1 - rank first-stage forwards are out, and `ahead` of the second's rounds.
        let first_out = (2 * p - 1 - rank) as u32;
        for c in 0..unfolded - p as u32 {
            if first_out + c < unfolded {
                streams.forward(0);
            }
            streams.backward_input(0);
            streams.kept_weight();
            streams.forward(1);
            streams.backward_input(1);
            streams.kept_weight();
        }
        streams.cool_down(rank, ahead);
    }
    Ok(order.finish_without_surplus(unfolded))
}
