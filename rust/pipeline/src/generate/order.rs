//! What the generators write into.

use std::collections::VecDeque;

use crate::error::Result;
use crate::op::{Kind, Op};
use crate::schedule::{Layout, Schedule};

/// Where the stages of one copy live.
#[derive(Clone, Copy)]
pub(super) enum Placement {
    /// Stage `s` on rank `s % P`, round and round.
    Loop,
    /// Down the ranks and up again: stage `s` on `s`, then on `2P - 1 - s`.
    V,
}

pub(super) fn single_copy(
    p: usize,
    per_rank: usize,
    m: u32,
    placement: Placement,
) -> Result<Layout> {
    let num_stages = p.saturating_mul(per_rank);
    if num_stages > usize::from(u16::MAX) {
        // The layout names the limit.
        return Layout::new(p, num_stages, Vec::new(), vec![m]);
    }
    let ranks = (0..num_stages)
        .map(|stage| match placement {
            Placement::V if stage >= p => 2 * p - 1 - stage,
            _ => stage % p,
        } as u32)
        .collect();
    Layout::new(p, num_stages, ranks, vec![m])
}

/// Two copies: micro-batches of copy 0 enter at rank 0, those of copy 1 at the last rank.
pub(super) fn two_copies(p: usize, m0: u32, m1: u32) -> Result<Layout> {
    let ranks = (0..p as u32).chain((0..p as u32).rev()).collect();
    Layout::new(p, p, ranks, vec![m0, m1])
}

/// The compute order under construction, rank after rank.
pub(super) struct Order {
    name: &'static str,
    layout: Layout,
    starts: Vec<usize>,
    ops: Vec<Op>,
}

impl Order {
    pub(super) fn new(name: &'static str, layout: Layout) -> Self {
        let capacity = layout.num_slots() * 3;
        let mut starts = Vec::with_capacity(layout.num_ranks() + 1);
        starts.push(0);
        Self {
            name,
            layout,
            starts,
            ops: Vec::with_capacity(capacity),
        }
    }

    #[inline]
    pub(super) fn push(&mut self, kind: Kind, copy: u8, stage: usize, micro_batch: u32) {
        self.ops
            .push(Op::new(kind, copy, stage as u16, micro_batch));
    }

    /// Ends the stream of the current rank.
    pub(super) fn end_rank(&mut self) {
        self.starts.push(self.ops.len());
    }

    pub(super) fn finish(self) -> Schedule {
        Schedule::from_parts(self.name.into(), self.layout, self.starts, self.ops)
    }

    /// Leaves out micro-batches that the layout does not have: the order was written for
    /// `unfolded` in each copy. What is left of a pair stands alone; and since so few
    /// micro-batches leave gaps, backwards that stand alone are split where they stand, which
    /// hands their gradient on earlier and costs the rank nothing.
    ///
    /// Dropping whole micro-batches from an order that runs leaves an order that runs: nothing
    /// depends on a micro-batch but itself.
    pub(super) fn finish_without_surplus(self, unfolded: u32) -> Schedule {
        let layout = &self.layout;
        if (0..layout.num_copies() as u8).all(|copy| layout.micro_batches(copy) == unfolded) {
            return self.finish();
        }
        let Self {
            name,
            layout,
            starts,
            ops,
        } = self;
        let exists = |op: Op| op.micro_batch < layout.micro_batches(op.copy);
        let mut kept = Vec::with_capacity(ops.len());
        let mut kept_starts = Vec::with_capacity(starts.len());
        kept_starts.push(0);
        for rank in 0..layout.num_ranks() {
            let stream = &ops[starts[rank]..starts[rank + 1]];
            for (index, &op) in stream.iter().enumerate() {
                if !exists(op) {
                    continue;
                }
                let (torn, lone) = match op.kind {
                    Kind::OverlapForward => (!exists(stream[index + 1]), Kind::Forward),
                    Kind::OverlapBackward => (!exists(stream[index - 1]), Kind::Backward),
                    kind => (false, kind),
                };
                let op = if torn { op.with_kind(lone) } else { op };
                if op.kind == Kind::Backward {
                    kept.push(op.with_kind(Kind::BackwardInput));
                    kept.push(op.with_kind(Kind::BackwardWeight));
                } else {
                    kept.push(op);
                }
            }
            kept_starts.push(kept.len());
        }
        Schedule::from_parts(name.into(), layout, kept_starts, kept)
    }
}

/// One rank's position in its two streams of micro-batches (the two directions of DualPipe, the
/// two stages of a V), and the weight parts that it has kept for later.
pub(super) struct TwoStreams<'a> {
    order: &'a mut Order,
    /// (copy, stage) of phase 0 and phase 1.
    places: [(u8, usize); 2],
    forwards: [u32; 2],
    backwards: [u32; 2],
    kept: VecDeque<(usize, u32)>,
}

impl<'a> TwoStreams<'a> {
    pub(super) fn new(order: &'a mut Order, places: [(u8, usize); 2]) -> Self {
        Self {
            order,
            places,
            forwards: [0; 2],
            backwards: [0; 2],
            kept: VecDeque::new(),
        }
    }

    fn next_forward(&mut self, phase: usize) -> (u8, usize, u32) {
        let (copy, stage) = self.places[phase];
        self.forwards[phase] += 1;
        (copy, stage, self.forwards[phase] - 1)
    }

    fn next_backward(&mut self, phase: usize) -> (u8, usize, u32) {
        let (copy, stage) = self.places[phase];
        self.backwards[phase] += 1;
        (copy, stage, self.backwards[phase] - 1)
    }

    pub(super) fn forward(&mut self, phase: usize) {
        let (copy, stage, c) = self.next_forward(phase);
        self.order.push(Kind::Forward, copy, stage, c);
    }

    pub(super) fn backward(&mut self, phase: usize) {
        let (copy, stage, c) = self.next_backward(phase);
        self.order.push(Kind::Backward, copy, stage, c);
    }

    /// The input part; the weight part is kept.
    pub(super) fn backward_input(&mut self, phase: usize) {
        let (copy, stage, c) = self.next_backward(phase);
        self.order.push(Kind::BackwardInput, copy, stage, c);
        self.kept.push_back((phase, c));
    }

    /// The weight part kept longest; nothing where none is kept.
    pub(super) fn kept_weight(&mut self) {
        if let Some((phase, c)) = self.kept.pop_front() {
            let (copy, stage) = self.places[phase];
            self.order.push(Kind::BackwardWeight, copy, stage, c);
        }
    }

    /// The weight part of one stream kept longest; nothing where none is kept.
    fn kept_weight_of(&mut self, phase: usize) -> bool {
        let oldest = self.kept.iter().position(|&(kept, _)| kept == phase);
        let Some((_, c)) = oldest.and_then(|index| self.kept.remove(index)) else {
            return false;
        };
        let (copy, stage) = self.places[phase];
        self.order.push(Kind::BackwardWeight, copy, stage, c);
        true
    }

    /// ZBV's end: `both` input parts of either stream in turn, `last` rounds of the first
    /// stream's input and weight parts, then what is kept, the second stream's first.
    pub(super) fn cool_down(mut self, both: usize, last: usize) {
        for _ in 0..both {
            self.backward_input(0);
            self.backward_input(1);
        }
        for _ in 0..last {
            self.backward_input(0);
            self.kept_weight_of(0);
        }
        while self.kept_weight_of(1) {}
        while self.kept_weight_of(0) {}
        self.end();
    }

    pub(super) fn pair(&mut self, forward_phase: usize, backward_phase: usize) {
        let (copy, stage, c) = self.next_forward(forward_phase);
        self.order.push(Kind::OverlapForward, copy, stage, c);
        let (copy, stage, c) = self.next_backward(backward_phase);
        self.order.push(Kind::OverlapBackward, copy, stage, c);
    }

    pub(super) fn end(self) {
        self.order.end_rank();
    }
}

/// The eight steps that DualPipe and DualPipeV share; only the counts differ.
///
/// `width` is half of the ranks for DualPipe and all of them for DualPipeV, `depth` the rank's
/// distance from the end where its phase 0 enters, and `main` the length of step 4.
/// Source: the two published programs of DeepSeek, step by step.
pub(super) fn eight_steps(mut rank: TwoStreams<'_>, width: usize, depth: usize, main: usize) {
    let outer = width - depth - 1;
    for _ in 0..2 * outer {
        rank.forward(0);
    }
    for _ in 0..=depth {
        rank.forward(0);
        rank.forward(1);
    }
    for _ in 0..outer {
        rank.backward_input(1);
        rank.kept_weight();
        rank.forward(1);
    }
    for iteration in 0..main {
        // Where the two streams meet, the first pair runs apart: its backward would wait.
        if iteration == 0 && outer == 0 {
            rank.forward(0);
            rank.backward(1);
        } else {
            rank.pair(0, 1);
        }
        rank.pair(1, 0);
    }
    for _ in 0..outer {
        rank.backward(1);
        rank.pair(1, 0);
    }
    // From the middle of step 6 on the backwards are split; odd depths begin one half-step early.
    let middle = depth.div_ceil(2);
    let odd = depth % 2 == 1;
    for iteration in 0..=depth {
        if iteration > middle || (iteration == middle && odd) {
            rank.backward_input(1);
        } else {
            rank.backward(1);
        }
        if iteration >= middle {
            rank.backward_input(0);
        } else {
            rank.backward(0);
        }
    }
    for _ in 0..outer {
        rank.kept_weight();
        rank.backward_input(0);
    }
    for _ in 0..=depth {
        rank.kept_weight();
    }
    rank.end();
}
