//! In which order ranks post what they exchange.

use super::Transport;
use super::violation::{Rule, Violation};
use crate::op::{Kind, Op};
use crate::schedule::Schedule;
use crate::wires::Wires;

/// In which order each rank posts its sends and receives with each other rank.
pub(super) struct Posts {
    /// `[bases[wire]..][..counts[wire]]`: what the rank at the wire's beginning posts with the
    /// rank at its end, both directions: `slot * 2 + is_gradient` of what moves.
    posts: Vec<u64>,
    bases: Vec<usize>,
    counts: Vec<usize>,
}

impl Posts {
    pub(super) fn new(schedule: &Schedule, wires: &Wires) -> Self {
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
    pub(super) fn post(&mut self, wire: usize, message: u64) {
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
    pub(super) fn check_order(
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
pub(super) fn message_of(schedule: &Schedule, wires: &Wires, op: Op) -> Option<u64> {
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
