//! An abstract machine without time: whatever can go on goes on, until all is done or no one can.

use super::Transport;
use super::violation::{Rule, Violation, Wait};
use crate::op::{Kind, Op};
use crate::schedule::Schedule;
use crate::wires::Wires;

/// What has happened to the result of a slot; the first three for activations, the next three
/// for gradients.
const SENT: u8 = 1;
const POSTED: u8 = 2;
const DONE: u8 = 4;
const GRADIENT: u32 = 3;

/// A condition on one slot: `slot * 8 + bit`.
type Condition = u64;

const NOTHING: Condition = Condition::MAX;

struct Machine<'a> {
    schedule: &'a Schedule,
    wires: &'a Wires,
    transport: Transport,
    explicit: bool,
    position: Vec<usize>,
    /// What each rank waits for.
    blocked_on: Vec<Condition>,
    state: Vec<u8>,
    ready: Vec<usize>,
    /// Ranks that have started the reduction of each stage.
    reducing: Vec<u32>,
}

/// Runs the schedule under a transport; the counter-example when it cannot end.
pub(super) fn run(
    schedule: &Schedule,
    wires: &Wires,
    transport: Transport,
) -> Result<(), Violation> {
    let layout = schedule.layout();
    let num_ranks = layout.num_ranks();
    let mut machine = Machine {
        schedule,
        wires,
        transport,
        explicit: schedule.has_transfers(),
        position: vec![0; num_ranks],
        blocked_on: vec![NOTHING; num_ranks],
        state: vec![0; layout.num_slots()],
        ready: (0..num_ranks).rev().collect(),
        reducing: vec![0; layout.num_stages()],
    };
    while let Some(rank) = machine.ready.pop() {
        machine.advance(rank);
    }
    let stuck: Vec<usize> = (0..num_ranks)
        .filter(|&rank| machine.position[rank] < schedule.stream(rank).len())
        .collect();
    if stuck.is_empty() {
        Ok(())
    } else {
        Err(machine.counter_example(&stuck))
    }
}

impl Machine<'_> {
    fn advance(&mut self, rank: usize) {
        let stream = self.schedule.stream(rank);
        let mut at = self.position[rank];
        while let Some(&op) = stream.get(at) {
            if let Some(condition) = self.obstacle(stream, at, op) {
                self.blocked_on[rank] = condition;
                break;
            }
            self.perform(op);
            at += 1;
        }
        self.position[rank] = at;
    }

    #[inline]
    fn holds(&self, slot: usize, bit: u8, gradient: bool) -> Option<Condition> {
        let bit = u32::from(bit).trailing_zeros() + if gradient { GRADIENT } else { 0 };
        let holds = self.state[slot] >> bit & 1 == 1;
        (!holds).then_some(slot as u64 * 8 + u64::from(bit))
    }

    /// What keeps an instruction from running; of a pair, what keeps either half.
    #[inline]
    fn obstacle(&self, stream: &[Op], at: usize, op: Op) -> Option<Condition> {
        match op.kind {
            Kind::OverlapForward => self
                .input(op)
                .or_else(|| stream.get(at + 1).and_then(|&second| self.input(second))),
            Kind::Forward | Kind::Backward | Kind::BackwardInput => self.input(op),
            Kind::SendActivation | Kind::SendGradient
                if self.transport == Transport::Rendezvous =>
            {
                let slot = self.schedule.layout().slot(op);
                self.holds(slot, POSTED, op.kind == Kind::SendGradient)
            }
            Kind::WaitActivation | Kind::WaitGradient if self.transport != Transport::Eager => {
                let slot = self.schedule.layout().slot(op);
                self.holds(slot, POSTED, op.kind == Kind::WaitGradient)
            }
            Kind::WaitReduce => {
                let started = self.reducing[usize::from(op.stage)] as usize;
                let all = started == self.schedule.layout().num_copies();
                (!all).then_some(reduction(op))
            }
            _ => None,
        }
    }

    /// Whether the input of a forward or a backward has not come yet.
    #[inline]
    fn input(&self, op: Op) -> Option<Condition> {
        let layout = self.schedule.layout();
        let slot = layout.slot(op);
        let step = layout.slot_step(op.copy);
        let bit = if self.explicit { SENT } else { DONE };
        if self.explicit && self.wires.arrives_on(op).is_none() {
            // Handed over on the rank itself: the scan has checked the order.
            return None;
        }
        if op.kind.is_forward() {
            if op.stage == 0 {
                return None;
            }
            self.holds(slot - step, bit, false)
        } else if usize::from(op.stage) + 1 < layout.num_stages() {
            self.holds(slot + step, bit, true)
        } else {
            None
        }
    }

    #[inline]
    fn perform(&mut self, op: Op) {
        let layout = self.schedule.layout();
        match op.kind {
            Kind::Forward | Kind::OverlapForward if !self.explicit => {
                let waiter = layout.next_rank(op.copy, op.stage);
                self.note(layout.slot(op), DONE, false, waiter);
            }
            Kind::Backward | Kind::BackwardInput | Kind::OverlapBackward if !self.explicit => {
                let waiter = layout.previous_rank(op.copy, op.stage);
                self.note(layout.slot(op), DONE, true, waiter);
            }
            Kind::SendActivation => {
                let waiter = layout.next_rank(op.copy, op.stage);
                self.note(layout.slot(op), SENT, false, waiter);
            }
            Kind::SendGradient => {
                let waiter = layout.previous_rank(op.copy, op.stage);
                self.note(layout.slot(op), SENT, true, waiter);
            }
            Kind::ReceiveActivation => {
                let slot = layout.slot(op) - layout.slot_step(op.copy);
                let sender = layout.previous_rank(op.copy, op.stage);
                self.note(slot, POSTED, false, sender);
            }
            Kind::ReceiveGradient => {
                let slot = layout.slot(op) + layout.slot_step(op.copy);
                let sender = layout.next_rank(op.copy, op.stage);
                self.note(slot, POSTED, true, sender);
            }
            Kind::Reduce => {
                self.reducing[usize::from(op.stage)] += 1;
                for copy in 0..layout.num_copies() as u8 {
                    self.wake(layout.rank_of(copy, op.stage), reduction(op));
                }
            }
            _ => {}
        }
    }

    #[inline]
    fn note(&mut self, slot: usize, bit: u8, gradient: bool, waiter: Option<usize>) {
        let bit = u32::from(bit).trailing_zeros() + if gradient { GRADIENT } else { 0 };
        self.state[slot] |= 1 << bit;
        if let Some(waiter) = waiter {
            self.wake(waiter, slot as u64 * 8 + u64::from(bit));
        }
    }

    #[inline]
    fn wake(&mut self, rank: usize, condition: Condition) {
        if self.blocked_on[rank] == condition {
            self.blocked_on[rank] = NOTHING;
            self.ready.push(rank);
        }
    }

    /// Whom a stuck rank waits for: whoever has to do what its condition says.
    fn waits_for(&self, rank: usize) -> usize {
        let layout = self.schedule.layout();
        let at = self.position[rank];
        let stream = self.schedule.stream(rank);
        let op = stream[at];
        let second_half = op.kind == Kind::OverlapForward && self.input(op).is_none();
        let op = if second_half { stream[at + 1] } else { op };
        let other = match op.kind {
            Kind::Forward | Kind::OverlapForward | Kind::SendGradient | Kind::WaitGradient => {
                layout.previous_rank(op.copy, op.stage)
            }
            Kind::WaitReduce => (0..layout.num_copies() as u8)
                .map(|copy| layout.rank_of(copy, op.stage))
                .find(|&holder| {
                    let started = &self.schedule.stream(holder)[..self.position[holder]];
                    !started
                        .iter()
                        .any(|other| other.kind == Kind::Reduce && other.stage == op.stage)
                }),
            _ => layout.next_rank(op.copy, op.stage),
        };
        other.unwrap_or(rank)
    }

    /// The shortest circle among the stuck ranks. Everyone stuck waits for one rank, which is
    /// stuck too (what is missing altogether has been found before), so there is a circle.
    fn counter_example(&self, stuck: &[usize]) -> Violation {
        let mut best: Vec<usize> = Vec::new();
        for &start in stuck {
            let mut path = vec![start];
            let mut rank = start;
            let circle = loop {
                rank = self.waits_for(rank);
                if let Some(from) = path.iter().position(|&seen| seen == rank) {
                    break &path[from..];
                }
                path.push(rank);
                if self.position[rank] >= self.schedule.stream(rank).len() {
                    break &path[path.len() - 2..];
                }
            };
            let lowest = circle.iter().min() < best.iter().min();
            if best.is_empty()
                || circle.len() < best.len()
                || (circle.len() == best.len() && lowest)
            {
                best = circle.to_vec();
            }
        }
        // Begin with the lowest rank, so that the answer does not depend on where the walk began.
        let first = (0..best.len()).min_by_key(|&at| best[at]).unwrap_or(0);
        best.rotate_left(first);
        let waits: Vec<Wait> = best
            .iter()
            .filter_map(|&rank| {
                let index = self.position[rank];
                let op = *self.schedule.stream(rank).get(index)?;
                Some(Wait {
                    rank,
                    index,
                    op,
                    waits_for: self.waits_for(rank),
                })
            })
            .collect();
        let (rank, index) = waits
            .first()
            .map_or((stuck[0], 0), |wait| (wait.rank, wait.index));
        let message = if waits.len() == 1 {
            "it waits for what comes later on the same rank; move that before it".to_owned()
        } else {
            format!(
                "{} ranks wait for one another and none can go on; move one of the instructions below behind what its partner needs",
                waits.len()
            )
        };
        Violation::at(self.schedule, Rule::Deadlock, rank, index, message)
            .with_waits(self.schedule, waits)
            .under(self.transport)
    }
}

/// The condition that a stage's reduction has been started everywhere. Slot conditions use the
/// bits 0 to 5, so bit 7 is free.
fn reduction(op: Op) -> Condition {
    u64::from(op.stage) * 8 + 7
}
