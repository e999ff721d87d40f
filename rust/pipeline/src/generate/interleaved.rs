//! Interleaved 1F1B and interleaved zero-bubble: several stages a rank, taken in rounds.
//!
//! Micro-batches are cut into rounds of at least P. A rank runs a round through its first stage,
//! then through its second, and so on; backwards likewise from the last stage on. Where the
//! rounds cannot all be equal, the first ones are one micro-batch longer: PyTorch refuses those
//! numbers, and where it does not, the order is PyTorch's.

use super::order::{Order, Placement, single_copy};
use crate::error::Result;
use crate::op::Kind;
use crate::schedule::Schedule;

pub(super) fn interleaved_1f1b(p: usize, m: u32, v: usize) -> Result<Schedule> {
    let mut order = Order::new("interleaved_1f1b", single_copy(p, v, m, Placement::Loop)?);
    let rounds = Rounds::new(p, m, v);
    for rank in 0..p {
        let forwards = rounds.steps(|chunk| chunk * p + rank);
        let backwards = rounds.steps(|chunk| (v - 1 - chunk) * p + rank);
        let warm = rounds.warm_up(2 * (p - 1 - rank));
        one_for_one(&mut order, &forwards, &backwards, warm, None);
    }
    Ok(order.finish())
}

pub(super) fn interleaved_zero_bubble(p: usize, m: u32, v: usize) -> Result<Schedule> {
    let layout = single_copy(p, v, m, Placement::Loop)?;
    let mut order = Order::new("interleaved_zero_bubble", layout);
    let rounds = Rounds::new(p, m, v);
    for rank in 0..p {
        let forwards = rounds.steps(|chunk| chunk * p + rank);
        let backwards = rounds.steps(|chunk| (v - 1 - chunk) * p + rank);
        let warm = rounds.warm_up(p - 1 - rank);
        one_for_one(&mut order, &forwards, &backwards, warm, Some(rank));
    }
    Ok(order.finish())
}

/// (stage, micro-batch), in the order in which a rank meets them.
pub(super) type Steps = Vec<(usize, u32)>;

/// `warm` forwards, then a forward and a backward in turn, then the rest of the backwards, for
/// one rank. With `lag`, backwards are split, and weight parts follow `lag` backwards behind.
pub(super) fn one_for_one(
    order: &mut Order,
    forwards: &Steps,
    backwards: &Steps,
    warm: usize,
    lag: Option<usize>,
) {
    let kind = if lag.is_some() {
        Kind::BackwardInput
    } else {
        Kind::Backward
    };
    for &(stage, c) in &forwards[..warm] {
        order.push(Kind::Forward, 0, stage, c);
    }
    for (index, &(stage, c)) in backwards.iter().enumerate() {
        if let Some(&(stage, c)) = forwards.get(warm + index) {
            order.push(Kind::Forward, 0, stage, c);
        }
        order.push(kind, 0, stage, c);
        if let Some(&(stage, c)) = lag.and_then(|lag| backwards.get(index.checked_sub(lag)?)) {
            order.push(Kind::BackwardWeight, 0, stage, c);
        }
    }
    if let Some(lag) = lag {
        for &(stage, c) in &backwards[backwards.len().saturating_sub(lag)..] {
            order.push(Kind::BackwardWeight, 0, stage, c);
        }
    }
    order.end_rank();
}

struct Rounds {
    sizes: Vec<u32>,
    v: usize,
    m: u32,
}

impl Rounds {
    fn new(p: usize, m: u32, v: usize) -> Self {
        let count = (m / u32::try_from(p).unwrap_or(u32::MAX)).max(1);
        let (size, longer) = (m / count, m % count);
        let sizes = (0..count)
            .map(|round| size + u32::from(round < longer))
            .collect();
        Self { sizes, v, m }
    }

    fn steps(&self, stage_of: impl Fn(usize) -> usize) -> Steps {
        let mut steps = Vec::with_capacity(self.m as usize * self.v);
        let mut first = 0;
        for &size in &self.sizes {
            for chunk in 0..self.v {
                let stage = stage_of(chunk);
                steps.extend((first..first + size).map(|c| (stage, c)));
            }
            first += size;
        }
        steps
    }

    /// Enough forwards for the last stage to begin, and `ahead` more.
    fn warm_up(&self, ahead: usize) -> usize {
        let until_last_stage = (self.v - 1) * self.sizes[0] as usize;
        (until_last_stage + ahead).min(self.m as usize * self.v)
    }
}
