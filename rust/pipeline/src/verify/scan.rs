//! One walk over every stream: completeness, order on the rank, pairing, memory.

use super::violation::{Rule, Violation};
use super::{Transport, VerifyOptions};
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

/// In which order each rank posts its sends and receives with each other rank.
pub(super) struct Posts {
    /// `[bases[wire]..][..counts[wire]]`: what the rank at the wire's beginning posts with the
    /// rank at its end, both directions: `slot * 2 + is_gradient` of what moves.
    posts: Vec<u64>,
    bases: Vec<usize>,
    counts: Vec<usize>,
}

impl Posts {
    fn new(schedule: &Schedule, wires: &Wires) -> Self {
        let layout = schedule.layout();
        let mut bases = vec![0; wires.len()];
        if schedule.has_transfers() {
            for copy in 0..layout.num_copies() as u8 {
                for stage in 0..layout.num_stages() as u16 {
                    // Both ends post the activation and, coming back, the gradient.
                    let op = Op::new(Kind::Forward, copy, stage, 0);
                    if let Some(wire) = wires.leaves_on(op) {
                        let posts = 2 * layout.micro_batches(copy) as usize;
                        bases[wire] += posts;
                        bases[wires.reverse(wire)] += posts;
                    }
                }
            }
        }
        let mut total = 0;
        for base in &mut bases {
            let posts = *base;
            *base = total;
            total += posts;
        }
        Self {
            posts: vec![0; total],
            bases,
            counts: vec![0; wires.len()],
        }
    }

    #[inline]
    fn post(&mut self, wire: usize, message: u64) {
        self.posts[self.bases[wire] + self.counts[wire]] = message;
        self.counts[wire] += 1;
    }

    fn of(&self, wire: usize) -> &[u64] {
        &self.posts[self.bases[wire]..][..self.counts[wire]]
    }

    /// Whether both ends of every pair post in the same order.
    pub(super) fn mirrored(&self, wires: &Wires) -> bool {
        (0..wires.len()).all(|wire| {
            let reverse = wires.reverse(wire);
            reverse < wire || self.of(wire) == self.of(reverse)
        })
    }

    /// The first pair that disagrees, as a deadlock of the one queue.
    pub(super) fn check_mirrored(
        &self,
        schedule: &Schedule,
        wires: &Wires,
    ) -> Result<(), Violation> {
        for wire in 0..wires.len() {
            let reverse = wires.reverse(wire);
            let (here, there) = (self.of(wire), self.of(reverse));
            if reverse < wire || here == there {
                continue;
            }
            let at = here.iter().zip(there).take_while(|(a, b)| a == b).count();
            let (rank, peer) = wires.ends(wire);
            let (Some(&first), Some(&second)) = (here.get(at), there.get(at)) else {
                continue;
            };
            let index = post_index(schedule, wires, rank, first);
            let peer_index = post_index(schedule, wires, peer, second);
            let message = format!(
                "it is number {at} in the queue of ranks {rank} and {peer}, but rank {peer} has {} there: neither can meet its counterpart; post in the same order at both ends",
                schedule
                    .stream(peer)
                    .get(peer_index)
                    .map_or_else(String::new, Op::to_string),
            );
            return Err(
                Violation::at(schedule, Rule::Deadlock, rank, index, message)
                    .with_other(schedule, peer, peer_index)
                    .under(Transport::Queue),
            );
        }
        Ok(())
    }

    /// Sends of one direction in the order of their receives, whatever the transport.
    fn check_order(
        &self,
        schedule: &Schedule,
        wires: &Wires,
        sender_of: impl Fn(u64) -> usize,
    ) -> Result<(), Violation> {
        for wire in 0..wires.len() {
            let (rank, peer) = wires.ends(wire);
            let sent = self
                .of(wire)
                .iter()
                .filter(|&&message| sender_of(message) == rank);
            let received = self
                .of(wires.reverse(wire))
                .iter()
                .filter(|&&message| sender_of(message) == rank);
            if let Some((&first, &second)) = sent.zip(received).find(|(a, b)| a != b) {
                let index = post_index(schedule, wires, rank, first);
                let peer_index = post_index(schedule, wires, peer, second);
                let message = format!(
                    "rank {peer} expects {} next from rank {rank}; send in the order of the receives",
                    schedule
                        .stream(peer)
                        .get(peer_index)
                        .map_or_else(String::new, Op::to_string),
                );
                return Err(
                    Violation::at(schedule, Rule::MessageOrder, rank, index, message)
                        .with_other(schedule, peer, peer_index),
                );
            }
        }
        Ok(())
    }
}

/// Where a rank posts a message.
fn post_index(schedule: &Schedule, wires: &Wires, rank: usize, message: u64) -> usize {
    let stream = schedule.stream(rank);
    stream
        .iter()
        .position(|&op| message_of(schedule, wires, op) == Some(message))
        .unwrap_or(stream.len())
}

/// The message that a send or a receive moves: `slot * 2 + is_gradient` of its producer.
fn message_of(schedule: &Schedule, wires: &Wires, op: Op) -> Option<u64> {
    wires.of_transfer(op)?;
    let layout = schedule.layout();
    let (slot, step) = (layout.slot(op), layout.slot_step(op.copy));
    match op.kind {
        Kind::SendActivation => Some(2 * slot as u64),
        Kind::SendGradient => Some(2 * slot as u64 + 1),
        Kind::ReceiveActivation => Some(2 * (slot - step) as u64),
        Kind::ReceiveGradient => Some(2 * (slot + step) as u64 + 1),
        _ => None,
    }
}

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

    /// Everything that must have been met has been.
    fn complete(&self) -> Result<(), Violation> {
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
    fn reductions(&self) -> Result<(), Violation> {
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
                return Err(Violation::at(
                    self.schedule,
                    Rule::Reduction,
                    rank,
                    end,
                    message,
                ));
            }
            if wanted && reduced && !waited {
                let index = self.find(rank, |op| {
                    op.kind == Kind::Reduce && (op.copy, op.stage) == (copy, stage)
                });
                let message =
                    format!("nothing waits for the reduction of stage {stage} on rank {rank}");
                return Err(Violation::at(
                    self.schedule,
                    Rule::Reduction,
                    rank,
                    index,
                    message,
                ));
            }
        }
        if layout.num_copies() == 1 {
            return Ok(());
        }
        // Two ranks that share stages start their reductions in the same order.
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
                    return Err(Violation::at(
                        self.schedule,
                        Rule::Reduction,
                        rank,
                        index,
                        message,
                    )
                    .with_other(self.schedule, peer, peer_index));
                }
            }
        }
        Ok(())
    }
}
