//! What a walk must have met by its end: every instruction, every wait, every reduction.

use super::{B, F, I, RECEIVED_B, RECEIVED_F, SENT_B, SENT_F, W, WAITED_B, WAITED_F, Walk};
use crate::op::{Kind, Op};
use crate::verify::violation::{Rule, Violation};

impl Walk<'_> {
    /// Everything that must have been met has been.
    pub(super) fn complete(&self) -> Result<(), Violation> {
        let layout = self.schedule.layout();
        let trains = self.schedule.has_backward();
        let moves = self.schedule.has_transfers();
        for copy in 0..layout.num_copies() as u8 {
            for stage in 0..layout.num_stages() as u16 {
                let forward = Op::new(Kind::Forward, copy, stage, 0);
                let backward = forward.with_kind(Kind::Backward);
                let mut whole = F;
                let mut transfers = 0;
                if moves && self.wires.leaves_on(forward).is_some() {
                    transfers |= SENT_F;
                }
                if moves && self.wires.arrives_on(forward).is_some() {
                    transfers |= RECEIVED_F;
                }
                if trains && moves && self.wires.leaves_on(backward).is_some() {
                    transfers |= SENT_B;
                }
                if trains && moves && self.wires.arrives_on(backward).is_some() {
                    transfers |= RECEIVED_B;
                }
                // Send buffers may be released by the end of the step instead of a wait; but
                // where a schedule waits at all, every send has its wait.
                whole |= transfers;
                let base = layout.slot(forward);
                let slots = &self.met[base..][..layout.slot_step(copy)];
                let bad = slots.iter().position(|&met| {
                    let done = met & !(B | I | W | WAITED_F | WAITED_B);
                    let backward = met & (B | I | W);
                    done != whole || (trains && backward != B && backward != I | W)
                });
                if let Some(c) = bad {
                    return Err(self.missing(
                        Op {
                            micro_batch: c as u32,
                            ..forward
                        },
                        whole,
                        trains,
                    ));
                }
            }
        }
        self.send_waits()
    }

    fn send_waits(&self) -> Result<(), Violation> {
        const WAITS: [(u16, u16, Kind); 2] = [
            (SENT_F, WAITED_F, Kind::SendActivation),
            (SENT_B, WAITED_B, Kind::SendGradient),
        ];
        if self.met.iter().all(|met| met & (WAITED_F | WAITED_B) == 0) {
            return Ok(());
        }
        for (slot, &met) in self.met.iter().enumerate() {
            for (sent, waited, kind) in WAITS {
                if met & sent != 0 && met & waited == 0 {
                    let Some((copy, stage)) = self.place_of(slot) else {
                        continue;
                    };
                    let base = self.schedule.layout().slot(Op::new(kind, copy, stage, 0));
                    let op = Op::new(kind, copy, stage, (slot - base) as u32);
                    let rank = self.schedule.layout().rank_of(copy, stage);
                    let index = self.find(rank, |other| other == op);
                    let message = "nothing waits for this send, and other sends are waited for: its buffer would never be released; add the wait".to_owned();
                    return Err(Violation::at(
                        self.schedule,
                        Rule::Missing,
                        rank,
                        index,
                        message,
                    ));
                }
            }
        }
        Ok(())
    }

    fn find(&self, rank: usize, is_it: impl Fn(Op) -> bool) -> usize {
        let stream = self.schedule.stream(rank);
        stream
            .iter()
            .position(|&op| is_it(op))
            .unwrap_or(stream.len())
    }

    /// Says what a slot lacks, and points at what it has: the neighbouring instruction.
    fn missing(&self, at: Op, whole: u16, trains: bool) -> Violation {
        let layout = self.schedule.layout();
        let rank = layout.rank_of(at.copy, at.stage);
        let met = self.met[layout.slot(at)];
        let same =
            |op: Op| (op.copy, op.stage, op.micro_batch) == (at.copy, at.stage, at.micro_batch);
        let place = format!(
            "micro-batch {} on stage {} of copy {}",
            at.micro_batch, at.stage, at.copy
        );
        let lacks = whole & !met;
        let (rule, index, message) = if lacks & F != 0 {
            let end = self.schedule.stream(rank).len();
            (
                Rule::Missing,
                end,
                format!("the forward of {place} is missing"),
            )
        } else if trains && met & (B | I) == 0 {
            let index = self.find(rank, |op| same(op) && op.kind.is_forward());
            (
                Rule::Missing,
                index,
                format!("the backward of {place} is missing: only this forward is there"),
            )
        } else if trains && met & (I | W) == I {
            let index = self.find(rank, |op| same(op) && op.kind == Kind::BackwardInput);
            (
                Rule::Missing,
                index,
                format!("the weight part of {place} is missing: only this input part is there"),
            )
        } else {
            let (name, index) = if lacks & SENT_F != 0 {
                (
                    "send of the activation",
                    self.find(rank, |op| same(op) && op.kind.is_forward()),
                )
            } else if lacks & SENT_B != 0 {
                (
                    "send of the gradient",
                    self.find(rank, |op| same(op) && op.kind.makes_gradient()),
                )
            } else if lacks & RECEIVED_F != 0 {
                (
                    "receive of the activation",
                    self.find(rank, |op| same(op) && op.kind.is_forward()),
                )
            } else if lacks & RECEIVED_B != 0 {
                (
                    "receive of the gradient",
                    self.find(rank, |op| same(op) && op.kind.makes_gradient()),
                )
            } else {
                // More than enough: a gradient moves in a schedule that has no backward.
                (
                    "counterpart of a transfer",
                    self.find(rank, |op| same(op) && op.kind.is_transfer()),
                )
            };
            (
                Rule::Pairing,
                index,
                format!("the {name} of {place} is missing"),
            )
        };
        Violation::at(self.schedule, rule, rank, index, message)
    }

    /// Copies of a stage are reduced on every holder, in one order.
    pub(super) fn reductions(&self) -> Result<(), Violation> {
        let layout = self.schedule.layout();
        let any = self.reduces.iter().any(|&reduced| reduced);
        let wanted = layout.num_copies() > 1
            && self.schedule.has_backward()
            && self.schedule.has_transfers();
        if !any && !wanted {
            return Ok(());
        }
        for (place, (&reduced, &waited)) in self.reduces.iter().zip(&self.reduce_waits).enumerate()
        {
            let (copy, stage) = (
                (place / layout.num_stages()) as u8,
                (place % layout.num_stages()) as u16,
            );
            let rank = layout.rank_of(copy, stage);
            if !reduced
                && (wanted
                    || self
                        .reduces
                        .iter()
                        .skip(usize::from(stage))
                        .step_by(layout.num_stages())
                        .any(|&r| r))
            {
                let end = self.schedule.stream(rank).len();
                let message = format!(
                    "the gradients of stage {stage} are not reduced on rank {rank}, which holds copy {copy} of it"
                );
                return Err(self.reduction_fault(rank, end, message));
            }
            if wanted && reduced && !waited {
                let index = self.find(rank, |op| {
                    op.kind == Kind::Reduce && (op.copy, op.stage) == (copy, stage)
                });
                let message =
                    format!("nothing waits for the reduction of stage {stage} on rank {rank}");
                return Err(self.reduction_fault(rank, index, message));
            }
        }
        if layout.num_copies() == 1 {
            return Ok(());
        }
        self.reduction_order()
    }

    /// Two ranks that share stages start their reductions in the same order.
    fn reduction_order(&self) -> Result<(), Violation> {
        let layout = self.schedule.layout();
        let order_of = |rank: usize| -> Vec<(usize, u16)> {
            let stream = self.schedule.stream(rank).iter().enumerate();
            stream
                .filter(|(_, op)| op.kind == Kind::Reduce)
                .map(|(index, op)| (index, op.stage))
                .collect()
        };
        for rank in 0..layout.num_ranks() {
            let here = order_of(rank);
            for peer in rank + 1..layout.num_ranks() {
                let holds = |stage: u16, rank: usize| {
                    (0..layout.num_copies() as u8).any(|copy| layout.rank_of(copy, stage) == rank)
                };
                if !here.iter().any(|&(_, stage)| holds(stage, peer)) {
                    continue;
                }
                let there = order_of(peer);
                let ours = here.iter().filter(|&&(_, stage)| holds(stage, peer));
                let theirs = there.iter().filter(|&&(_, stage)| holds(stage, rank));
                if let Some((&(index, _), &(peer_index, stage))) =
                    ours.zip(theirs).find(|(a, b)| a.1 != b.1)
                {
                    let message = format!(
                        "rank {peer} reduces stage {stage} at this point; reduce in the same order on both"
                    );
                    return Err(self.reduction_fault(rank, index, message).with_other(
                        self.schedule,
                        peer,
                        peer_index,
                    ));
                }
            }
        }
        Ok(())
    }

    fn reduction_fault(&self, rank: usize, index: usize, message: String) -> Violation {
        Violation::at(self.schedule, Rule::Reduction, rank, index, message)
    }
}
