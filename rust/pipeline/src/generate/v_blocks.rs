//! V-Half and V-Min: a V of two stages a rank whose micro-batches are spaced so that few are
//! alive at once.
//!
//! A micro-batch walks down the V and up again, forward, then back. How many ticks a step of each
//! of those four walks takes decides how long activations live, and so the memory. Micro-batches
//! follow one another six ticks apart (F, I, W of two stages). The walks order forwards and input
//! parts; a clock then runs that order as early as it goes, weight parts fill the gaps, and no
//! rank ever holds more activations than its limit. Source of the idea: arXiv 2405.15362.

use std::collections::VecDeque;

use super::order::{Order, Placement, single_copy};
use crate::error::Result;
use crate::op::{Kind, Op};
use crate::schedule::Schedule;

/// Ticks a step takes on each of the four walks: forward down and up, backward down and up.
type Paces = [usize; 4];

pub(super) fn v_half(p: usize, m: u32) -> Result<Schedule> {
    paced("v_half", p, m, [2, 1, 2, 1], p + 2)
}

pub(super) fn v_min(p: usize, m: u32) -> Result<Schedule> {
    paced("v_min", p, m, [1, 1, 1, 1], (2 * p).div_ceil(3) + 2)
}

fn paced(name: &'static str, p: usize, m: u32, paces: Paces, limit: usize) -> Result<Schedule> {
    let mut order = Order::new(name, single_copy(p, 2, m, Placement::V)?);
    let num_stages = 2 * p;
    // Which (kind, stage, micro-batch) each rank meets in which order, weight parts left out.
    let walks: Vec<Vec<Op>> = (0..p)
        .map(|rank| {
            let (near, far) = (rank, num_stages - 1 - rank);
            let last = p - 1;
            let turn = paces[0] * last + 1;
            let top = turn + paces[1] * last + 1;
            let back = top + paces[2] * last + 1;
            let block = [
                (paces[0] * rank, Kind::Forward, near),
                (turn + paces[1] * (last - rank), Kind::Forward, far),
                (top + paces[2] * rank, Kind::BackwardInput, far),
                (back + paces[3] * (last - rank), Kind::BackwardInput, near),
            ];
            let mut walk: Vec<(u64, Op)> = Vec::with_capacity(4 * m as usize);
            for c in 0..m {
                for (tick, kind, stage) in block {
                    let op = Op::new(kind, 0, stage as u16, c);
                    walk.push((tick as u64 + 6 * u64::from(c), op));
                }
            }
            walk.sort_unstable();
            walk.into_iter().map(|(_, op)| op).collect()
        })
        .collect();

    let mut clock = Clock::new(p, m, walks);
    while clock.unfinished() {
        clock.tick(limit);
    }
    for stream in clock.streams {
        for op in stream {
            order.push(op.kind, op.copy, usize::from(op.stage), op.micro_batch);
        }
        order.end_rank();
    }
    Ok(order.finish())
}

/// Runs the walks, one instruction a rank and tick.
struct Clock {
    walks: Vec<Vec<Op>>,
    next: Vec<usize>,
    kept: Vec<VecDeque<Op>>,
    alive: Vec<usize>,
    streams: Vec<Vec<Op>>,
    /// Per stage, how many micro-batches have their forward and their input gradient. Both come
    /// in the order of the micro-batches.
    forwards: Vec<u32>,
    gradients: Vec<u32>,
    left: usize,
}

impl Clock {
    fn new(p: usize, m: u32, walks: Vec<Vec<Op>>) -> Self {
        Self {
            walks,
            next: vec![0; p],
            kept: vec![VecDeque::new(); p],
            alive: vec![0; p],
            streams: vec![Vec::with_capacity(6 * m as usize); p],
            forwards: vec![0; 2 * p],
            gradients: vec![0; 2 * p],
            left: 6 * p * m as usize,
        }
    }

    fn unfinished(&self) -> bool {
        self.left > 0
    }

    fn ready(&self, op: Op) -> bool {
        let stage = usize::from(op.stage);
        let inputs = match op.kind {
            Kind::Forward if stage == 0 => return true,
            Kind::Forward => self.forwards[stage - 1],
            _ if stage + 1 == self.gradients.len() => self.forwards[stage],
            _ => self.gradients[stage + 1],
        };
        op.micro_batch < inputs
    }

    fn tick(&mut self, limit: usize) {
        let ran: Vec<Option<Op>> = (0..self.walks.len())
            .map(|rank| {
                let due = self.walks[rank].get(self.next[rank]).copied();
                let runs = due.filter(|&op| {
                    let fits = op.kind != Kind::Forward || self.alive[rank] < limit;
                    fits && self.ready(op)
                });
                if runs.is_some() {
                    self.next[rank] += 1;
                    runs
                } else {
                    self.kept[rank].pop_front()
                }
            })
            .collect();
        for (rank, op) in ran.into_iter().enumerate() {
            let Some(op) = op else { continue };
            let stage = usize::from(op.stage);
            match op.kind {
                Kind::Forward => {
                    self.forwards[stage] += 1;
                    self.alive[rank] += 1;
                }
                Kind::BackwardInput => {
                    self.gradients[stage] += 1;
                    self.kept[rank].push_back(op.with_kind(Kind::BackwardWeight));
                }
                _ => self.alive[rank] -= 1,
            }
            self.streams[rank].push(op);
            self.left -= 1;
        }
    }
}
