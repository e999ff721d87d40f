//! 1F1B: once a rank has filled the ranks after it, each forward is followed by one backward.

use super::order::{Order, Placement, single_copy};
use crate::error::Result;
use crate::op::Kind;
use crate::schedule::Schedule;

pub(super) fn one_f_one_b(p: usize, m: u32) -> Result<Schedule> {
    let mut order = Order::new("1f1b", single_copy(p, 1, m, Placement::Loop)?);
    for rank in 0..p {
        let warm = m.min((p - 1 - rank) as u32);
        for c in 0..warm {
            order.push(Kind::Forward, 0, rank, c);
        }
        for c in 0..m - warm {
            order.push(Kind::Forward, 0, rank, warm + c);
            order.push(Kind::Backward, 0, rank, c);
        }
        for c in m - warm..m {
            order.push(Kind::Backward, 0, rank, c);
        }
        order.end_rank();
    }
    Ok(order.finish())
}
