//! Predicting a schedule's timeline.
//!
//! Every rank runs its stream in order; an instruction starts when the rank is free and its inputs
//! have arrived. Because nothing but the order decides who goes first, no event queue is needed:
//! a rank runs until it waits for something that has no time yet, and is taken up again when it
//! has.
//!
//! Not modelled: launch overhead, the time of reductions and of the optimizer, interference
//! between computation and transfers, links shared by several pairs of ranks, and variation
//! from one micro-batch to the next.

use crate::cost::Costs;
use crate::error::{Error, Result};
use crate::memory::{Peak, Sizes, peaks};
use crate::op::{Kind, Op};
use crate::schedule::Schedule;
use crate::verify::{VerifyOptions, verify};
use crate::wires::Wires;

/// When a rank goes on after a send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sends {
    /// At once.
    #[default]
    Asynchronous,
    /// Before the next computation, everything sent must have arrived.
    Blocking,
}

/// When an overlapped pair hands out its forward's result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pairs {
    /// At its end, with the backward's: the two really run interleaved.
    #[default]
    Atomic,
    /// Before the backward starts: the two run one after the other.
    EarlyForward,
}

/// How to simulate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SimulateOptions {
    /// When a rank goes on after a send.
    pub sends: Sends,
    /// When an overlapped pair hands out its forward's result.
    pub pairs: Pairs,
    /// Sizes, for peaks in bytes.
    pub sizes: Option<Sizes>,
}

/// When one computation runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// Its index in [`Schedule::ops`]; of a pair, the forward's.
    pub op: usize,
    /// When it starts.
    pub start: f64,
    /// When it ends.
    pub end: f64,
}

/// What the simulation says.
#[derive(Clone, Debug, PartialEq)]
pub struct Timeline {
    /// When the last rank ends.
    pub makespan: f64,
    /// Time that each rank computes.
    pub busy: Vec<f64>,
    /// The part of all ranks' time that no one computes in: 1 - sum(busy) / (ranks * makespan).
    pub bubble_ratio: f64,
    /// What each rank holds at most.
    pub peaks: Vec<Peak>,
    /// Every computation, rank by rank, in order; a pair is one.
    pub spans: Vec<Span>,
    /// Where each rank's spans begin in `spans`, and the end.
    pub starts: Vec<usize>,
}

impl Timeline {
    /// Time that a rank does not compute, from 0 to the makespan.
    #[must_use]
    pub fn idle(&self, rank: usize) -> f64 {
        self.makespan - self.busy[rank]
    }
}

/// Runs the schedule against costs. O(instructions); about 40 ns each.
///
/// # Errors
///
/// [`Error::Input`] for costs that cannot be, [`Error::Rule`] when the schedule cannot run to its
/// end.
pub fn simulate(schedule: &Schedule, costs: &Costs, options: &SimulateOptions) -> Result<Timeline> {
    costs.check(schedule.layout())?;
    if let Some(sizes) = &options.sizes {
        sizes.check(schedule.layout())?;
    }
    let wires = Wires::new(schedule.layout());
    let mut engine = Engine::new(schedule, costs, options, &wires);
    while let Some(rank) = engine.ready.pop() {
        engine.advance(rank);
    }
    let layout = schedule.layout();
    let stuck =
        (0..layout.num_ranks()).any(|rank| engine.position[rank] < schedule.stream(rank).len());
    if stuck {
        verify(schedule, &VerifyOptions::default())?;
        return Err(Error::input(
            "stuck",
            "schedule",
            schedule.name(),
            "a schedule that can run without a circle of blocking sends",
            "simulate it with asynchronous sends",
        ));
    }
    let makespan = engine.clock.iter().copied().fold(0.0, f64::max);
    let busy_in_all: f64 = engine.busy.iter().sum();
    let offered = makespan * layout.num_ranks() as f64;
    let mut starts = vec![0];
    let mut spans = Vec::with_capacity(engine.spans.len());
    for rank in 0..layout.num_ranks() {
        let begin = schedule.starts()[rank];
        let length = engine.span_counts[rank];
        spans.extend_from_slice(&engine.spans[begin..begin + length]);
        starts.push(spans.len());
    }
    Ok(Timeline {
        makespan,
        bubble_ratio: if offered > 0.0 {
            1.0 - busy_in_all / offered
        } else {
            0.0
        },
        busy: engine.busy,
        peaks: peaks(schedule, &wires, options.sizes.as_ref()),
        spans,
        starts,
    })
}

/// A time that is not known yet.
const UNKNOWN: f64 = f64::NEG_INFINITY;

/// A message on its way, by `slot * 2 + is_gradient` of its producer.
#[derive(Clone, Copy)]
struct Message {
    sent: f64,
    posted: f64,
    arrives: f64,
}

const NEW: Message = Message {
    sent: UNKNOWN,
    posted: UNKNOWN,
    arrives: UNKNOWN,
};

const NOTHING: usize = usize::MAX;

struct Engine<'a> {
    schedule: &'a Schedule,
    costs: &'a Costs,
    options: &'a SimulateOptions,
    wires: &'a Wires,
    explicit: bool,
    messages: Vec<Message>,
    /// (latency, time a byte) of every wire, and when it is free again.
    wire_costs: Vec<(f64, f64)>,
    wire_free: Vec<f64>,
    position: Vec<usize>,
    blocked_on: Vec<usize>,
    clock: Vec<f64>,
    busy: Vec<f64>,
    /// What the last computation of each rank has produced, and when.
    recent: Vec<[(usize, f64); 2]>,
    /// Messages that a rank has sent and not seen arrive; kept for blocking sends only.
    outstanding: Vec<Vec<usize>>,
    ready: Vec<usize>,
    spans: Vec<Span>,
    span_counts: Vec<usize>,
}

impl<'a> Engine<'a> {
    fn new(
        schedule: &'a Schedule,
        costs: &'a Costs,
        options: &'a SimulateOptions,
        wires: &'a Wires,
    ) -> Self {
        let layout = schedule.layout();
        let num_ranks = layout.num_ranks();
        let wire_costs = (0..wires.len())
            .map(|wire| {
                let (from, to) = wires.ends(wire);
                let latency = costs.latency.between(num_ranks, from, to);
                (latency, 1.0 / costs.bandwidth.between(num_ranks, from, to))
            })
            .collect();
        let none = Span {
            op: 0,
            start: 0.0,
            end: 0.0,
        };
        Self {
            explicit: schedule.has_transfers(),
            messages: vec![NEW; 2 * layout.num_slots()],
            wire_costs,
            wire_free: vec![0.0; wires.len()],
            position: vec![0; num_ranks],
            blocked_on: vec![NOTHING; num_ranks],
            clock: vec![0.0; num_ranks],
            busy: vec![0.0; num_ranks],
            recent: vec![[(NOTHING, 0.0); 2]; num_ranks],
            outstanding: vec![Vec::new(); num_ranks],
            ready: (0..num_ranks).rev().collect(),
            spans: vec![none; schedule.ops().len()],
            span_counts: vec![0; num_ranks],
            schedule,
            costs,
            options,
            wires,
        }
    }

    fn advance(&mut self, rank: usize) {
        let stream = self.schedule.stream(rank);
        while let Some(&op) = stream.get(self.position[rank]) {
            let step = if op.kind.is_compute() {
                let second = stream.get(self.position[rank] + 1).copied();
                self.compute(rank, op, second.filter(|_| op.kind == Kind::OverlapForward))
            } else {
                self.transfer(rank, op).map(|()| 1)
            };
            match step {
                Ok(step) => self.position[rank] += step,
                Err(message) => {
                    self.blocked_on[rank] = message;
                    return;
                }
            }
        }
    }

    /// The message that an instruction takes in.
    #[inline]
    fn input(&self, op: Op) -> Option<usize> {
        let layout = self.schedule.layout();
        let (slot, step) = (layout.slot(op), layout.slot_step(op.copy));
        match op.kind {
            Kind::Forward | Kind::OverlapForward => (op.stage > 0).then(|| 2 * (slot - step)),
            Kind::Backward | Kind::BackwardInput | Kind::OverlapBackward => {
                (usize::from(op.stage) + 1 < layout.num_stages()).then(|| 2 * (slot + step) + 1)
            }
            _ => None,
        }
    }

    /// When an input is there, or the message to wait for.
    #[inline]
    fn arrival(&self, op: Op) -> std::result::Result<f64, usize> {
        match self.input(op) {
            None => Ok(0.0),
            Some(message) => match self.messages[message].arrives {
                UNKNOWN => Err(message),
                time => Ok(time),
            },
        }
    }

    /// Runs an instruction, or a pair; says how many words of the stream that was.
    fn compute(
        &mut self,
        rank: usize,
        op: Op,
        second: Option<Op>,
    ) -> std::result::Result<usize, usize> {
        let mut start = self.clock[rank].max(self.arrival(op)?);
        if self.options.sends == Sends::Blocking {
            while let Some(&message) = self.outstanding[rank].last() {
                match self.messages[message].arrives {
                    UNKNOWN => return Err(message),
                    time => start = start.max(time),
                }
                self.outstanding[rank].pop();
                // The rank may block below and come back: the wait is part of its clock.
                self.clock[rank] = self.clock[rank].max(start);
            }
        }
        let scale = self.costs.rank_factor[rank];
        let stage = usize::from(op.stage);
        let Some(backward) = second else {
            let time = scale
                * match op.kind {
                    Kind::Forward => self.costs.forward[stage],
                    Kind::Backward => self.costs.backward[stage],
                    Kind::BackwardInput => self.costs.backward_input[stage],
                    _ => self.costs.backward_weight[stage],
                };
            let end = start + time;
            self.ran(rank, start, end, time);
            self.recent[rank][1].0 = NOTHING;
            self.produced(rank, 0, op, end);
            return Ok(1);
        };
        let forward_time = self.costs.forward[stage];
        let apart = forward_time + self.costs.backward[usize::from(backward.stage)];
        let time = scale
            * self
                .costs
                .pair
                .as_ref()
                .map_or(self.costs.overlap_factor * apart, |pair| pair[stage]);
        let arrival = self.arrival(backward)?;
        let (forward_end, end) = match self.options.pairs {
            Pairs::Atomic => {
                start = start.max(arrival);
                (start + time, start + time)
            }
            Pairs::EarlyForward => {
                let part = if apart > 0.0 {
                    time * (forward_time / apart)
                } else {
                    0.0
                };
                let forward_end = start + part;
                (forward_end, forward_end.max(arrival) + (time - part))
            }
        };
        self.ran(rank, start, end, time);
        self.produced(rank, 0, op, forward_end);
        self.produced(rank, 1, backward, end);
        Ok(2)
    }

    #[inline]
    fn ran(&mut self, rank: usize, start: f64, end: f64, time: f64) {
        let begin = self.schedule.starts()[rank];
        self.spans[begin + self.span_counts[rank]] = Span {
            op: begin + self.position[rank],
            start,
            end,
        };
        self.span_counts[rank] += 1;
        self.clock[rank] = end;
        self.busy[rank] += time;
    }

    /// Notes a result; hands it over at once where no transfer is written for it.
    #[inline]
    fn produced(&mut self, rank: usize, half: usize, op: Op, time: f64) {
        let layout = self.schedule.layout();
        let (message, consumer) = if op.kind.is_forward() {
            (2 * layout.slot(op), layout.next_rank(op.copy, op.stage))
        } else if op.kind.makes_gradient() {
            (
                2 * layout.slot(op) + 1,
                layout.previous_rank(op.copy, op.stage),
            )
        } else {
            self.recent[rank][half].0 = NOTHING;
            return;
        };
        self.recent[rank][half] = (message, time);
        match self.wires.leaves_on(op) {
            Some(_) if self.explicit => {}
            Some(wire) => {
                self.messages[message].posted = 0.0;
                self.messages[message].sent = time;
                self.depart(wire, message, op);
            }
            None => {
                self.messages[message].arrives = time;
                if let Some(consumer) = consumer {
                    self.wake(consumer, message);
                }
            }
        }
    }

    /// A message of which both ends are known leaves.
    fn depart(&mut self, wire: usize, message: usize, op: Op) {
        let Message { sent, posted, .. } = self.messages[message];
        let (latency, time_per_byte) = self.wire_costs[wire];
        // A gradient is as large as the output of the stage before.
        let bytes = match op.kind {
            Kind::Forward | Kind::OverlapForward | Kind::SendActivation | Kind::ReceiveGradient => {
                self.costs.message_bytes[usize::from(op.stage)]
            }
            _ => self.costs.message_bytes[usize::from(op.stage) - 1],
        };
        let start = sent.max(posted).max(self.wire_free[wire]);
        let gone = start + bytes * time_per_byte;
        self.wire_free[wire] = gone;
        self.messages[message].arrives = gone + latency;
        let (from, to) = self.wires.ends(wire);
        self.wake(to, message);
        self.wake(from, message);
    }

    #[inline]
    fn wake(&mut self, rank: usize, message: usize) {
        if self.blocked_on[rank] == message {
            self.blocked_on[rank] = NOTHING;
            self.ready.push(rank);
        }
    }

    /// A send, a receive, a wait, or one of the instructions that take no time here.
    fn transfer(&mut self, rank: usize, op: Op) -> std::result::Result<(), usize> {
        let Some(wire) = self.wires.of_transfer(op) else {
            return Ok(());
        };
        let layout = self.schedule.layout();
        let (slot, step) = (layout.slot(op), layout.slot_step(op.copy));
        let now = self.clock[rank];
        let message = match op.kind {
            Kind::SendActivation | Kind::WaitActivation => 2 * slot,
            Kind::SendGradient | Kind::WaitGradient => 2 * slot + 1,
            Kind::ReceiveActivation => 2 * (slot - step),
            _ => 2 * (slot + step) + 1,
        };
        match op.kind {
            Kind::SendActivation | Kind::SendGradient => {
                // Right behind its computation a send leaves with the result, which a pair may
                // hand out before its end.
                let result = self.recent[rank].iter().find(|recent| recent.0 == message);
                self.messages[message].sent = result.map_or(now, |&(_, time)| time);
                if self.options.sends == Sends::Blocking {
                    self.outstanding[rank].push(message);
                }
                if self.messages[message].posted != UNKNOWN {
                    self.depart(wire, message, op);
                }
            }
            Kind::ReceiveActivation | Kind::ReceiveGradient => {
                self.messages[message].posted = now;
                if self.messages[message].sent != UNKNOWN {
                    self.depart(wire, message, op);
                }
            }
            _ => match self.messages[message].arrives {
                UNKNOWN => return Err(message),
                time => self.clock[rank] = now.max(time),
            },
        }
        Ok(())
    }
}
