//! Placing what moves between ranks.
//!
//! The compute order runs on a clock where F, I and W take one tick. At every tick, in the order
//! of the ranks, what has been computed is sent, and the receive is written into the other rank's
//! stream *before* the instruction that is running there, so that it is posted by the time the
//! message leaves. Send and receive are written at the same moment; so both ends of every pair of
//! ranks agree on the order of all messages, in both directions together, which is what a
//! transport with one queue per pair needs.
//!
//! A sent buffer is released once a message from the receiver proves that it has arrived: every
//! message acknowledges what its sender had consumed by then. Only sends without such a proof are
//! waited for at the end of the stream. Hand-overs on one rank need no instruction.

use crate::error::Result;
use crate::op::{Kind, Op};
use crate::schedule::Schedule;
use crate::verify::{VerifyOptions, verify};
use crate::wires::Wires;

/// The same compute order with sends, receives, waits and reductions placed.
///
/// Transfers that are there already are placed anew. O(instructions); 13 to 20 ns for
/// each one written, so 7 to 10 ms for DualPipeV on 64 ranks with 512 micro-batches.
///
/// # Errors
///
/// [`Error::Rule`](crate::Error::Rule) when the compute order itself is incomplete or cannot run.
pub fn place_transfers(order: &Schedule) -> Result<Schedule> {
    let compute_only = order.compute_only();
    verify(&compute_only, &VerifyOptions::default())?;
    place_checked(&compute_only)
}

/// As [`place_transfers`], for the compute orders of the generators.
pub(crate) fn place_checked(order: &Schedule) -> Result<Schedule> {
    let mut clock = Clock::new(order);
    clock.run();
    if let Some(streams) = clock.finish() {
        let layout = order.layout().clone();
        let (starts, ops) = streams;
        return Ok(Schedule::from_parts(
            order.name().into(),
            layout,
            starts,
            ops,
        ));
    }
    // The order got stuck, so it breaks a rule; a proof would contradict that.
    Err(match verify(order, &VerifyOptions::default()) {
        Err(error) => error,
        Ok(_) => crate::Error::input(
            "stuck",
            "order",
            order.name(),
            "an order that runs to its end",
            "this is a defect of the library: please report the order",
        ),
    })
}

/// Ranks as bits, so that they come out in order.
#[derive(Clone)]
struct RankSet(Vec<u64>);

impl RankSet {
    fn new(num_ranks: usize) -> Self {
        Self(vec![0; num_ranks.div_ceil(64)])
    }

    #[inline]
    fn insert(&mut self, rank: usize) {
        self.0[rank / 64] |= 1 << (rank % 64);
    }

    #[inline]
    fn contains(&self, rank: usize) -> bool {
        self.0[rank / 64] >> (rank % 64) & 1 == 1
    }

    #[inline]
    fn is_empty(&self) -> bool {
        self.0.iter().all(|&word| word == 0)
    }

    #[inline]
    fn clear(&mut self) {
        self.0.fill(0);
    }

    #[inline]
    fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().enumerate().flat_map(|(index, &word)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                (rest != 0).then(|| {
                    let bit = rest.trailing_zeros() as usize;
                    rest &= rest - 1;
                    index * 64 + bit
                })
            })
        })
    }
}

/// Longest instruction in ticks, an overlapped pair, and one more: the length of the ring.
const RING: usize = 4;

const FORWARD_DONE: u8 = 1;
const GRADIENT_DONE: u8 = 2;

#[derive(Clone, Copy, Default)]
struct Message {
    /// Its place among the messages of its wire.
    index: u32,
    /// How many messages of the reverse wire its sender had consumed before.
    acknowledges: u32,
}

#[derive(Clone, Default)]
struct WireState {
    sent: u32,
    /// Messages consumed, without a gap, from the first on.
    consumed: u32,
    /// Sends that the sender has waited for.
    waited: u32,
    /// Where the wire's messages begin in `Clock::waits`.
    base: usize,
}

struct Clock<'a> {
    order: &'a Schedule,
    wires: Wires,
    /// The next, or the running, instruction of each rank: an index into `order.ops()`.
    position: Vec<usize>,
    running: RankSet,
    done: Vec<u8>,
    /// `[slot * 2 + is_gradient]`
    messages: Vec<Message>,
    wire_states: Vec<WireState>,
    /// The wait that belongs to each message, wire by wire.
    waits: Vec<Op>,
    /// Weight-gradient instructions left per `[copy * num_stages + stage]`, and copies of each
    /// stage that still have some; empty where no stage has copies.
    weights_left: Vec<u32>,
    copies_left: Vec<u32>,
    reductions: Vec<Vec<Op>>,
    starts: Vec<usize>,
    cursors: Vec<usize>,
    ops: Vec<Op>,
}

impl<'a> Clock<'a> {
    fn new(order: &'a Schedule) -> Self {
        let layout = order.layout();
        let num_ranks = layout.num_ranks();
        let wires = Wires::new(layout);
        let reduces = layout.num_copies() > 1 && order.has_backward();

        // The order is complete, so how much there is to write follows from the layout.
        let mut wire_states = vec![WireState::default(); wires.len()];
        let mut lengths: Vec<usize> = (0..num_ranks)
            .map(|rank| order.stream(rank).len())
            .collect();
        for copy in 0..layout.num_copies() as u8 {
            let count = layout.micro_batches(copy) as usize;
            for stage in 0..layout.num_stages() as u16 {
                let length = &mut lengths[layout.rank_of(copy, stage)];
                *length += if reduces { 2 } else { 0 };
                let forward = Op::new(Kind::Forward, copy, stage, 0);
                let backward = forward.with_kind(Kind::Backward);
                for op in [forward, backward]
                    .into_iter()
                    .take(1 + usize::from(order.has_backward()))
                {
                    // A send and its wait, a receive.
                    if let Some(wire) = wires.leaves_on(op) {
                        *length += 2 * count;
                        wire_states[wire].base += count;
                    }
                    if wires.arrives_on(op).is_some() {
                        *length += count;
                    }
                }
            }
        }
        let mut num_messages = 0;
        for state in &mut wire_states {
            let count = state.base;
            state.base = num_messages;
            num_messages += count;
        }
        let mut starts = Vec::with_capacity(num_ranks + 1);
        let mut end = 0;
        starts.push(0);
        for length in lengths {
            end += length;
            starts.push(end);
        }

        let (weights_left, copies_left) = if reduces {
            let per_stage = layout
                .placement()
                .iter()
                .enumerate()
                .map(|(place, _)| layout.micro_batches((place / layout.num_stages()) as u8));
            let weights: Vec<u32> = per_stage.collect();
            let copies = (0..layout.num_stages())
                .map(|stage| {
                    let ends = weights.iter().skip(stage).step_by(layout.num_stages());
                    ends.filter(|&&left| left > 0).count() as u32
                })
                .collect();
            (weights, copies)
        } else {
            (Vec::new(), Vec::new())
        };

        Self {
            position: order.starts()[..num_ranks].to_vec(),
            running: RankSet::new(num_ranks),
            done: vec![0; layout.num_slots()],
            messages: vec![Message::default(); 2 * layout.num_slots()],
            wire_states,
            waits: vec![EMPTY; num_messages],
            weights_left,
            copies_left,
            reductions: vec![Vec::new(); if reduces { num_ranks } else { 0 }],
            cursors: starts[..num_ranks].to_vec(),
            ops: vec![EMPTY; end],
            starts,
            order,
            wires,
        }
    }

    fn run(&mut self) {
        let num_ranks = self.order.layout().num_ranks();
        let mut ring: [RankSet; RING] = std::array::from_fn(|_| RankSet::new(num_ranks));
        let mut candidates = RankSet::new(num_ranks);
        for rank in 0..num_ranks {
            candidates.insert(rank);
        }
        let mut ended = RankSet::new(num_ranks);
        let mut late_receives: Vec<(usize, Op)> = Vec::new();
        let mut idle_ticks = 0;
        let mut tick = 0;
        while idle_ticks < RING {
            for rank in candidates.iter() {
                if let Some(ticks) = self.start(rank) {
                    ring[(tick + ticks) % RING].insert(rank);
                }
            }
            candidates.clear();

            tick += 1;
            std::mem::swap(&mut ended, &mut ring[tick % RING]);
            if ended.is_empty() {
                idle_ticks += 1;
                continue;
            }
            idle_ticks = 0;
            late_receives.clear();
            for rank in ended.iter() {
                self.post_receives(rank, &ended, &mut late_receives);
            }
            for rank in ended.iter() {
                self.end_instruction(rank, &mut candidates);
            }
            for &(rank, op) in &late_receives {
                self.write(rank, op);
            }
            ended.clear();
        }
    }

    #[inline]
    fn write(&mut self, rank: usize, op: Op) {
        let cursor = self.cursors[rank];
        self.ops[cursor] = op;
        self.cursors[rank] = cursor + 1;
    }

    /// The instruction, or pair, at the rank's position.
    #[inline]
    fn current(&self, rank: usize) -> &'a [Op] {
        let ops = self.order.ops();
        let at = self.position[rank];
        let long = usize::from(ops[at].kind == Kind::OverlapForward);
        &ops[at..=at + long]
    }

    /// Starts the rank's next instruction if its inputs are there; says how long it takes.
    fn start(&mut self, rank: usize) -> Option<usize> {
        let finished = self.position[rank] == self.order.starts()[rank + 1];
        if finished || self.running.contains(rank) {
            return None;
        }
        let ops = self.current(rank);
        if !ops.iter().all(|&op| self.ready(op)) {
            return None;
        }
        self.running.insert(rank);
        Some(match ops[0].kind {
            Kind::OverlapForward => 3,
            Kind::Backward => 2,
            _ => 1,
        })
    }

    #[inline]
    fn ready(&self, op: Op) -> bool {
        let layout = self.order.layout();
        let slot = layout.slot(op);
        let step = layout.slot_step(op.copy);
        match op.kind {
            Kind::Forward | Kind::OverlapForward => {
                op.stage == 0 || self.done[slot - step] & FORWARD_DONE != 0
            }
            Kind::BackwardWeight => self.done[slot] & GRADIENT_DONE != 0,
            _ if usize::from(op.stage) + 1 == layout.num_stages() => {
                self.done[slot] & FORWARD_DONE != 0
            }
            _ => self.done[slot] & FORWARD_DONE != 0 && self.done[slot + step] & GRADIENT_DONE != 0,
        }
    }

    /// Writes the receives of what the rank has just computed into the streams of their ranks.
    ///
    /// Where the other rank ends an instruction at the same tick and sends the other way, the
    /// lower rank's messages go first; then the higher rank's are received after that.
    fn post_receives(&mut self, rank: usize, ended: &RankSet, late: &mut Vec<(usize, Op)>) {
        for &op in self.current(rank) {
            let Some(wire) = self.wires.leaves_on(op) else {
                continue;
            };
            let (_, peer) = self.wires.ends(wire);
            let receive = match op.kind.is_forward() {
                true => Op::new(
                    Kind::ReceiveActivation,
                    op.copy,
                    op.stage + 1,
                    op.micro_batch,
                ),
                false => Op::new(Kind::ReceiveGradient, op.copy, op.stage - 1, op.micro_batch),
            };
            let crosses = peer < rank && ended.contains(peer) && {
                let back = Some(self.wires.reverse(wire));
                self.current(peer)
                    .iter()
                    .any(|&op| self.wires.leaves_on(op) == back)
            };
            if crosses {
                late.push((peer, receive));
            } else {
                self.write(peer, receive);
            }
        }
    }

    /// Writes the instruction that the rank has just ended, its sends, and the waits that cost
    /// nothing any more; notes in `wakes` whom the results let go on.
    fn end_instruction(&mut self, rank: usize, wakes: &mut RankSet) {
        let ops = self.current(rank);
        let layout = self.order.layout();
        self.running.0[rank / 64] &= !(1 << (rank % 64));
        self.position[rank] += ops.len();
        wakes.insert(rank);

        let mut proven = [None; 2];
        for (&op, proven) in ops.iter().zip(&mut proven) {
            self.write(rank, op);
            let Some(wire) = self.wires.arrives_on(op) else {
                continue;
            };
            let (slot, step) = (layout.slot(op), layout.slot_step(op.copy));
            let key = match op.kind.is_forward() {
                true => 2 * (slot - step),
                false => 2 * (slot + step) + 1,
            };
            let message = self.messages[key];
            let state = &mut self.wire_states[wire];
            state.consumed = state.consumed.max(message.index + 1);
            *proven = Some((self.wires.reverse(wire), message.acknowledges));
        }
        for &op in ops {
            let slot = layout.slot(op);
            let (flag, key, send, wait, consumer) = if op.kind.is_forward() {
                let next = layout.next_rank(op.copy, op.stage);
                (
                    FORWARD_DONE,
                    2 * slot,
                    Kind::SendActivation,
                    Kind::WaitActivation,
                    next,
                )
            } else if op.kind.makes_gradient() {
                let next = layout.previous_rank(op.copy, op.stage);
                (
                    GRADIENT_DONE,
                    2 * slot + 1,
                    Kind::SendGradient,
                    Kind::WaitGradient,
                    next,
                )
            } else {
                continue;
            };
            self.done[slot] |= flag;
            if let Some(consumer) = consumer {
                wakes.insert(consumer);
            }
            if let Some(wire) = self.wires.leaves_on(op) {
                self.write(rank, op.with_kind(send));
                let acknowledges = self.wire_states[self.wires.reverse(wire)].consumed;
                let state = &mut self.wire_states[wire];
                self.waits[state.base + state.sent as usize] = op.with_kind(wait);
                self.messages[key] = Message {
                    index: state.sent,
                    acknowledges,
                };
                state.sent += 1;
            }
        }
        for (wire, acknowledged) in proven.into_iter().flatten() {
            self.wait_until(rank, wire, acknowledged);
        }
        if !self.weights_left.is_empty() {
            for op in ops {
                self.count_weight(*op);
            }
        }
    }

    /// Writes the waits for the wire's messages up to `count`.
    fn wait_until(&mut self, rank: usize, wire: usize, count: u32) {
        while self.wire_states[wire].waited < count {
            let state = &mut self.wire_states[wire];
            let wait = self.waits[state.base + state.waited as usize];
            state.waited += 1;
            self.write(rank, wait);
        }
    }

    /// Once the last copy of a stage has all its weight gradients, every holder starts their
    /// reduction; all at the same moment of the clock, so all holders agree on the order.
    fn count_weight(&mut self, op: Op) {
        if !op.kind.ends_micro_batch() {
            return;
        }
        let layout = self.order.layout();
        let stage = usize::from(op.stage);
        let left = &mut self.weights_left[usize::from(op.copy) * layout.num_stages() + stage];
        *left -= 1;
        if *left > 0 {
            return;
        }
        self.copies_left[stage] -= 1;
        if self.copies_left[stage] > 0 {
            return;
        }
        for copy in 0..layout.num_copies() as u8 {
            let holder = layout.rank_of(copy, op.stage);
            let reduce = Op::new(Kind::Reduce, copy, op.stage, 0);
            self.write(holder, reduce);
            self.reductions[holder].push(reduce.with_kind(Kind::WaitReduce));
        }
    }

    /// The streams, ended with what still has to be waited for; `None` when a rank is stuck.
    fn finish(mut self) -> Option<(Vec<usize>, Vec<Op>)> {
        for rank in 0..self.order.layout().num_ranks() {
            if self.position[rank] != self.order.starts()[rank + 1] {
                return None;
            }
            for wire in self.wires.out_of_rank(rank) {
                self.wait_until(rank, wire, self.wire_states[wire].sent);
            }
            if let Some(waits) = self.reductions.get_mut(rank) {
                for wait in std::mem::take(waits) {
                    self.write(rank, wait);
                }
            }
        }
        Some((self.starts, self.ops))
    }
}

/// What the buffers hold before they are written.
const EMPTY: Op = Op::new(Kind::Forward, 0, 0, 0);
