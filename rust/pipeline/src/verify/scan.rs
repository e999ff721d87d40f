//! One walk over every stream: order on the rank, pairing, memory; then whether it met everything.

mod whole;

use super::VerifyOptions;
use super::posts::Posts;
use super::violation::{Rule, Violation};
use crate::memory::{Meter, Peak};
use crate::op::{Kind, Op};
use crate::schedule::Schedule;
use crate::wires::Wires;

// What has been met of a slot. Receives are noted at the slot that they are for.
const F: u16 = 1;
const B: u16 = 1 << 1;
const I: u16 = 1 << 2;
const W: u16 = 1 << 3;
const SENT_F: u16 = 1 << 4;
const RECEIVED_F: u16 = 1 << 5;
const WAITED_F: u16 = 1 << 6;
const SENT_B: u16 = 1 << 7;
const RECEIVED_B: u16 = 1 << 8;
const WAITED_B: u16 = 1 << 9;

/// What the walk has found.
pub(super) struct Scan {
    pub(super) peaks: Vec<Peak>,
    pub(super) posts: Posts,
    pub(super) num_messages: usize,
}

/// What has been met so far.
struct Walk<'a> {
    schedule: &'a Schedule,
    wires: &'a Wires,
    options: &'a VerifyOptions,
    met: Vec<u16>,
    posts: Posts,
    /// Per `[copy * num_stages + stage]`: micro-batches whose weight gradients are not done.
    weights_left: Vec<u32>,
    reduces: Vec<bool>,
    reduce_waits: Vec<bool>,
    num_messages: usize,
}

/// Walks every stream.
pub(super) fn scan(
    schedule: &Schedule,
    wires: &Wires,
    options: &VerifyOptions,
) -> Result<Scan, Violation> {
    let layout = schedule.layout();
    let places = layout.placement().len();
    let weights_left =
        (0..places).map(|place| layout.micro_batches((place / layout.num_stages()) as u8));
    let mut walk = Walk {
        schedule,
        wires,
        options,
        met: vec![0; layout.num_slots()],
        posts: Posts::new(schedule, wires),
        weights_left: weights_left.collect(),
        reduces: vec![false; places],
        reduce_waits: vec![false; places],
        num_messages: 0,
    };
    let mut peaks = Vec::with_capacity(layout.num_ranks());
    for rank in 0..layout.num_ranks() {
        peaks.push(walk.rank(rank)?);
    }
    walk.complete()?;
    if schedule.has_transfers() && !walk.posts.mirrored(wires) {
        let sender_of = |message: u64| {
            let slot = (message / 2) as usize;
            walk.place_of(slot)
                .map_or(usize::MAX, |(copy, stage)| layout.rank_of(copy, stage))
        };
        walk.posts.check_order(schedule, wires, sender_of)?;
    }
    walk.reductions()?;
    Ok(Scan {
        peaks,
        posts: walk.posts,
        num_messages: walk.num_messages,
    })
}

impl Walk<'_> {
    fn rank(&mut self, rank: usize) -> Result<Peak, Violation> {
        let (schedule, wires, options) = (self.schedule, self.wires, self.options);
        let mut meter = Meter::new(schedule, wires, options.sizes.as_ref());
        for (index, &op) in schedule.stream(rank).iter().enumerate() {
            self.instruction(rank, index, op)
                .map_err(|(rule, message)| Violation::at(schedule, rule, rank, index, message))?;
            meter.run(op);
            let peak = meter.peak();
            let held = if options
                .max_activations
                .is_some_and(|most| peak.activations > most)
            {
                format!("{} activations", peak.activations)
            } else if options.max_bytes.is_some_and(|most| peak.bytes > most) {
                format!("{} bytes", peak.bytes)
            } else {
                continue;
            };
            let message = format!("the rank holds {held} here, more than allowed");
            return Err(Violation::at(schedule, Rule::Memory, rank, index, message));
        }
        Ok(meter.peak())
    }

    #[inline]
    fn instruction(&mut self, rank: usize, index: usize, op: Op) -> Result<(), (Rule, String)> {
        let layout = self.schedule.layout();
        let home = layout.rank_of(op.copy, op.stage);
        if home != rank {
            return Err((
                Rule::Placement,
                format!(
                    "stage {} of copy {} lives on rank {home}",
                    op.stage, op.copy
                ),
            ));
        }
        if !op.kind.has_micro_batch() {
            return self.whole_stage(op);
        }
        let slot = layout.slot(op);
        let met = self.met[slot];
        let (bit, excludes, needs) = match op.kind {
            Kind::Forward | Kind::OverlapForward => (F, F | B | I | W, 0),
            Kind::Backward | Kind::OverlapBackward => (B, B | I | W, F),
            Kind::BackwardInput => (I, B | I | W, F),
            Kind::BackwardWeight => (W, B | W, I),
            Kind::SendActivation => (SENT_F, SENT_F, F),
            Kind::ReceiveActivation => (RECEIVED_F, RECEIVED_F, 0),
            Kind::WaitActivation => (WAITED_F, WAITED_F, SENT_F),
            Kind::SendGradient => (SENT_B, SENT_B, 0),
            Kind::ReceiveGradient => (RECEIVED_B, RECEIVED_B, 0),
            Kind::WaitGradient => (WAITED_B, WAITED_B, SENT_B),
            _ => return Ok(()),
        };
        if met & excludes != 0 {
            let what = match op.kind {
                Kind::Forward | Kind::OverlapForward => "forward",
                Kind::BackwardWeight => "backward for the weights",
                kind if kind.is_compute() => "backward",
                kind => kind.describe(),
            };
            return Err((
                Rule::Twice,
                format!(
                    "micro-batch {} has had its {what} on stage {} already",
                    op.micro_batch, op.stage
                ),
            ));
        }
        if met & needs != needs {
            let missing = match needs {
                F => "the forward",
                I => "the backward for the input",
                _ => "the send",
            };
            return Err((
                Rule::Order,
                format!(
                    "{missing} of micro-batch {} on stage {} must come before",
                    op.micro_batch, op.stage
                ),
            ));
        }
        if op.kind.is_compute() {
            self.computes(rank, index, op, slot)?;
        } else {
            self.moves(op, slot, met)?;
        }
        self.met[slot] |= bit;
        Ok(())
    }

    /// A forward or a backward: its input must have been asked for, or been made on this rank.
    #[inline]
    fn computes(
        &mut self,
        rank: usize,
        index: usize,
        op: Op,
        slot: usize,
    ) -> Result<(), (Rule, String)> {
        let layout = self.schedule.layout();
        let step = layout.slot_step(op.copy);
        let (source, made, received, what) = match op.kind {
            Kind::BackwardWeight => {
                self.ends(op);
                return Ok(());
            }
            Kind::Forward | Kind::OverlapForward => {
                if op.stage == 0 {
                    return Ok(());
                }
                (slot - step, F, RECEIVED_F, "an activation")
            }
            _ => {
                if op.kind.ends_micro_batch() {
                    self.ends(op);
                }
                if op.kind == Kind::OverlapBackward {
                    let partner = self.schedule.stream(rank)[index - 1];
                    if (partner.copy, partner.stage, partner.micro_batch)
                        == (op.copy, op.stage, op.micro_batch)
                    {
                        return Err((
                            Rule::Order,
                            "a pair cannot run a micro-batch's forward and backward at once".into(),
                        ));
                    }
                }
                if usize::from(op.stage) + 1 == layout.num_stages() {
                    return Ok(());
                }
                (slot + step, B | I, RECEIVED_B, "a gradient")
            }
        };
        if self.wires.arrives_on(op).is_none() {
            // The same rank holds the neighbouring stage: program order decides.
            if self.met[source] & made == 0 {
                let message = format!(
                    "its input, {what} of the neighbouring stage on this rank, is not there yet; move it back"
                );
                return Err((Rule::Order, message));
            }
        } else if self.schedule.has_transfers() && self.met[slot] & received == 0 {
            let message = format!(
                "its input, {what} from another rank, has not been asked for; put the receive before it"
            );
            return Err((Rule::Pairing, message));
        }
        Ok(())
    }

    #[inline]
    fn ends(&mut self, op: Op) {
        let place =
            usize::from(op.copy) * self.schedule.layout().num_stages() + usize::from(op.stage);
        self.weights_left[place] = self.weights_left[place].saturating_sub(1);
    }

    /// A send, a receive or a wait.
    #[inline]
    fn moves(&mut self, op: Op, slot: usize, met: u16) -> Result<(), (Rule, String)> {
        let Some(wire) = self.wires.of_transfer(op) else {
            return Err((Rule::Pairing, "there is nothing to move: the neighbouring stage is on this rank, or there is none; leave it out".into()));
        };
        let step = self.schedule.layout().slot_step(op.copy);
        match op.kind {
            Kind::SendActivation => self.posts.post(wire, 2 * slot as u64),
            Kind::SendGradient => {
                if met & (B | I) == 0 {
                    return Err((
                        Rule::Order,
                        format!(
                            "the backward of micro-batch {} on stage {} must come before",
                            op.micro_batch, op.stage
                        ),
                    ));
                }
                self.posts.post(wire, 2 * slot as u64 + 1);
            }
            Kind::ReceiveActivation => {
                if met & F != 0 {
                    return Err((
                        Rule::Order,
                        "the forward that needs it has run already".into(),
                    ));
                }
                self.posts
                    .post(self.wires.reverse(wire), 2 * (slot - step) as u64);
                self.num_messages += 1;
            }
            Kind::ReceiveGradient => {
                if met & (B | I) != 0 {
                    return Err((
                        Rule::Order,
                        "the backward that needs it has run already".into(),
                    ));
                }
                self.posts
                    .post(self.wires.reverse(wire), 2 * (slot + step) as u64 + 1);
                self.num_messages += 1;
            }
            _ => {}
        }
        Ok(())
    }

    /// A reduction, its wait, or one of PyTorch's instructions for sharded parameters.
    fn whole_stage(&mut self, op: Op) -> Result<(), (Rule, String)> {
        let place =
            usize::from(op.copy) * self.schedule.layout().num_stages() + usize::from(op.stage);
        match op.kind {
            Kind::Reduce => {
                if std::mem::replace(&mut self.reduces[place], true) {
                    return Err((
                        Rule::Twice,
                        format!("the gradients of stage {} are reduced already", op.stage),
                    ));
                }
                if self.weights_left[place] > 0 && self.schedule.has_backward() {
                    let message = format!(
                        "{} weight gradients of stage {} are still to come; move it back",
                        self.weights_left[place], op.stage
                    );
                    return Err((Rule::Reduction, message));
                }
            }
            Kind::WaitReduce => {
                if !self.reduces[place] {
                    return Err((
                        Rule::Reduction,
                        format!("no reduction of stage {} has been started", op.stage),
                    ));
                }
                if std::mem::replace(&mut self.reduce_waits[place], true) {
                    return Err((
                        Rule::Twice,
                        format!(
                            "the reduction of stage {} has been waited for already",
                            op.stage
                        ),
                    ));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Copy and stage of a slot.
    fn place_of(&self, slot: usize) -> Option<(u8, u16)> {
        let layout = self.schedule.layout();
        (0..layout.num_copies() as u8).rev().find_map(|copy| {
            let base = layout.slot(Op::new(Kind::Forward, copy, 0, 0));
            let step = layout.slot_step(copy);
            (step > 0 && slot >= base).then(|| (copy, ((slot - base) / step) as u16))
        })
    }
}
