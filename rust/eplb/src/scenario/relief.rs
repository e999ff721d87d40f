//! Few moves where tokens are split anew: for each of them, the one that relieves a layer most.
//!
//! Ranks are relieved if an expert that they hold alone can go elsewhere, too. So a slot of another
//! rank takes that expert, in the place of one that keeps other slots. Of all such exchanges the
//! best is made, exactly; then the next, from there.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

use multiversion::multiversion;
use rayon::prelude::*;

use super::layer::{Exchange, Layer};
use super::paths::{self, Path};
use super::search::Made;
use super::sets::{Case, Row, Worth};
use super::{Scenarios, layer_of};
use crate::balance::{Budget, Fuel};
use crate::placement::Placement;
use crate::planner::Planner;

/// What an exchange must gain at least, in parts of the mean rank load.
const LEAST_GAIN: f32 = 1e-5;

/// So many layers are taken a step further before moves are handed out anew.
const LAYERS_AT_ONCE: usize = 16;

/// What is to be relieved, and with how many moves.
pub(super) struct FewMoves<'a> {
    pub(super) planner: &'a Planner,
    pub(super) scenarios: &'a Scenarios<'a>,
    pub(super) weights: &'a [f64],
    pub(super) start: &'a Placement,
    /// The load of each layer, `[L]`.
    pub(super) layer_sums: &'a [f64],
    pub(super) max_moves: usize,
    pub(super) max_moves_per_layer: usize,
}

impl FewMoves<'_> {
    /// The path of each layer, as far as moves may lead it.
    pub(super) fn paths(&self) -> Vec<Path> {
        let num_layers = self.layer_sums.len();
        let mut paths = vec![Path::default(); num_layers];
        if self.max_moves == 0 {
            return paths;
        }
        let mut reliefs = self.reliefs();
        let mut scratch = Scratch::default();
        loop {
            let gain = paths::last_gain(&paths, self.layer_sums, self.max_moves);
            let hope = |number: usize| f64::from(reliefs[number].hope()) * self.layer_sums[number];
            let mut next: Vec<_> = (0..num_layers).filter(|&n| hope(n) > gain).collect();
            next.sort_by(|&a, &b| hope(b).total_cmp(&hope(a)));
            next.truncate(LAYERS_AT_ONCE);
            if next.is_empty() {
                return paths;
            }
            let mut is_next = vec![false; num_layers];
            next.iter().for_each(|&number| is_next[number] = true);
            let step = |scratch: &mut Scratch, (relief, is_next): (&mut Relief, bool)| {
                if is_next {
                    relief.step(self.max_moves_per_layer, scratch);
                }
            };
            match self.planner.pool() {
                None => {
                    let pairs = reliefs.iter_mut().zip(is_next);
                    pairs.for_each(|pair| step(&mut scratch, pair));
                }
                Some(pool) => pool.install(|| {
                    let pairs = reliefs.par_iter_mut().zip(is_next);
                    pairs.for_each_init(Scratch::default, step);
                }),
            }
            for number in next {
                paths[number].take(reliefs[number].first, &reliefs[number].path);
            }
        }
    }

    /// The layers as they are at first.
    fn reliefs(&self) -> Vec<Relief> {
        let fuel = match self.planner.budget() {
            Budget::Iterations(steps) => Fuel::steps(steps),
            Budget::Time(time) => Fuel::until(Instant::now() + time),
        };
        let all: f64 = self.weights.iter().sum();
        let relief = |number: usize| {
            let layer = layer_of(self.planner, self.start, number);
            let loads = (0..self.scenarios.num_scenarios())
                .map(|index| self.scenarios.layer(index, number))
                .zip(self.weights.iter().map(|weight| weight / all));
            let worth = Worth::new(&layer, loads);
            Relief::new(layer, worth, fuel.clone())
        };
        let numbers = 0..self.layer_sums.len();
        match self.planner.pool() {
            None => numbers.map(relief).collect(),
            Some(pool) => pool.install(|| numbers.into_par_iter().map(relief).collect()),
        }
    }
}

/// A layer that is relieved, move by move.
#[derive(Debug)]
struct Relief {
    layer: Layer,
    worth: Worth,
    /// What it was worth at first, and every exchange since.
    first: f32,
    path: Vec<Made>,
    fuel: Fuel,
    is_done: bool,
}

/// What finding an exchange takes, kept for the next.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Slots whose expert has others, rank by rank; where each rank's begin, `[D + 1]`; and what
    /// sets gain if the expert leaves, `[slots, K]`.
    drops: Vec<u32>,
    begins: Vec<u32>,
    gains: Vec<Row>,
    /// Which sets a rank is outside of, `[D, K]`.
    outside: Vec<Row>,
    /// What sets lose if an expert can go elsewhere, `[K]`.
    losses: Vec<Row>,
    /// Exchanges by the least that the layer could be worth then, in bits, which order as it does.
    queue: BinaryHeap<Reverse<(u32, u32)>>,
    candidates: Vec<Candidate>,
    bounds: Vec<f32>,
}

/// A slot, by its place among those that may be given away, and the expert that it takes.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    drop: u32,
    expert: u32,
    /// How many sets of ranks were found before it was bounded.
    seen: u32,
}

impl Relief {
    /// A layer, what it is worth, and how many exchanges may be tried.
    pub(super) fn new(layer: Layer, worth: Worth, fuel: Fuel) -> Self {
        Self {
            first: worth.value(),
            layer,
            worth,
            path: Vec::new(),
            fuel,
            is_done: false,
        }
    }

    /// The most that another exchange can gain; 0 if none is to be had.
    pub(super) fn hope(&self) -> f32 {
        match self.is_done {
            true => 0.0,
            false => (self.worth.value() - 1.0).max(0.0),
        }
    }

    /// Makes the best exchange, with which no more than `max_moves` are made in all; none if no
    /// exchange helps.
    pub(super) fn step(&mut self, max_moves: usize, scratch: &mut Scratch) {
        let Some(exchange) = find(self, max_moves, scratch) else {
            self.is_done = true;
            return;
        };
        let experts = self.layer.concerned(exchange);
        self.layer.make(exchange);
        for case in &mut self.worth.cases {
            case.sets.moved(&self.layer, &case.loads, &experts);
        }
        self.worth.solve(&self.layer);
        self.path.push(Made {
            exchange,
            num_moves: self.layer.num_moves(),
            value: self.worth.value(),
        });
    }
}

/// The exchange after which a layer is worth least.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
fn find(relief: &mut Relief, max_moves: usize, scratch: &mut Scratch) -> Option<Exchange> {
    let Relief {
        layer, worth, fuel, ..
    } = relief;
    let mut least = worth.value() - LEAST_GAIN;
    let mut found = None;
    let mut num_found = 0;
    scratch.look(layer, worth);
    scratch.collect(layer, worth, max_moves, least);
    while let Some(Reverse((bits, index))) = scratch.queue.pop() {
        if f32::from_bits(bits) >= least {
            break;
        }
        let Candidate { drop, expert, seen } = scratch.candidates[index as usize];
        if seen != num_found {
            // Sets that were found since may show that it is worse.
            scratch.losses(worth, expert);
            let bound = scratch.bound(layer, worth, drop as usize);
            scratch.candidates[index as usize].seen = num_found;
            scratch.queue.push(Reverse((bound.to_bits(), index)));
            continue;
        }
        if !fuel.step() {
            break;
        }
        let slot = scratch.drops[drop as usize];
        let exchange = Exchange::Replace { slot, expert };
        scratch.losses(worth, expert);
        scratch.bound(layer, worth, drop as usize);
        let back = layer.make(exchange);
        let value = worth.after(layer, &scratch.bounds, least);
        layer.make(back);
        if worth.keep_found(layer) {
            num_found += 1;
            scratch.look(layer, worth);
        }
        if value < least {
            found = Some(exchange);
            least = value - LEAST_GAIN;
        }
    }
    found
}

impl Scratch {
    /// Notes which slots may be given away, and what sets gain by each.
    #[inline(always)]
    fn look(&mut self, layer: &Layer, worth: &Worth) {
        self.drops.clear();
        self.begins.clear();
        self.gains.clear();
        self.outside.clear();
        let mut rank_before = usize::MAX;
        for slot in 0..layer.ranks().len() as u32 {
            let rank = layer.rank(slot as usize);
            if rank != rank_before {
                rank_before = rank;
                self.begins.push(self.drops.len() as u32);
                let cases = worth.cases.iter();
                self.outside.extend(cases.map(|case| case.sets.outside(rank)));
            }
            let expert = layer.expert(slot);
            if layer.count(expert) > 1 {
                self.drops.push(slot);
                let gains = |case: &Case| {
                    case.sets.gains(layer, slot, case.loads[expert])
                };
                self.gains.extend(worth.cases.iter().map(gains));
            }
        }
        self.begins.push(self.drops.len() as u32);
    }

    /// Queues the exchanges that relieve what is tight, unless a bound is above `limit`.
    #[inline(always)]
    fn collect(&mut self, layer: &Layer, worth: &Worth, max_moves: usize, limit: f32) {
        self.queue.clear();
        self.candidates.clear();
        for expert in 0..layer.num_experts() {
            let suspects = |case: &Case| case.sets.suspects(expert);
            if !worth.cases.iter().any(suspects) {
                continue;
            }
            self.losses(worth, expert as u32);
            for rank in 0..layer.num_ranks() {
                let relieves = |case: &Case| {
                    case.sets.suspects(expert) && case.sets.is_outside(rank)
                };
                if !worth.cases.iter().any(relieves) || self.bound_at(worth, rank) >= limit {
                    continue;
                }
                for drop in self.begins[rank] as usize..self.begins[rank + 1] as usize {
                    let slot = self.drops[drop];
                    let exchange = Exchange::Replace {
                        slot,
                        expert: expert as u32,
                    };
                    if !layer.allows(exchange)
                        || layer.num_moves() as i32 + layer.more_moves(exchange) > max_moves as i32
                    {
                        continue;
                    }
                    let bound = self.bound(layer, worth, drop);
                    if bound < limit {
                        let index = self.candidates.len() as u32;
                        self.queue.push(Reverse((bound.to_bits(), index)));
                        self.candidates.push(Candidate {
                            drop: drop as u32,
                            expert: expert as u32,
                            seen: 0,
                        });
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn losses(&mut self, worth: &Worth, expert: u32) {
        self.losses.clear();
        let expert = expert as usize;
        let losses = |case: &Case| case.sets.losses(expert, case.loads[expert]);
        self.losses.extend(worth.cases.iter().map(losses));
    }

    /// A bound for what the layer is worth if the expert whose losses are there is on a rank, too.
    #[inline(always)]
    fn bound_at(&self, worth: &Worth, rank: usize) -> f32 {
        let outside = &self.outside[rank * worth.cases.len()..];
        let mut value = 0.0;
        for (case, (outside, losses)) in worth.cases.iter().zip(outside.iter().zip(&self.losses)) {
            value += case.weight * case.sets.largest(|set| -losses[set] * outside[set]);
        }
        value
    }

    /// The same if it takes the place of another; with the bounds for each load.
    #[inline(always)]
    fn bound(&mut self, layer: &Layer, worth: &Worth, drop: usize) -> f32 {
        let num_cases = worth.cases.len();
        let rank = layer.rank(self.drops[drop] as usize);
        let outside = &self.outside[rank * num_cases..][..num_cases];
        let gains = &self.gains[drop * num_cases..][..num_cases];
        self.bounds.clear();
        let mut value = 0.0;
        for (index, case) in worth.cases.iter().enumerate() {
            let (outside, gains) = (&outside[index], &gains[index]);
            let losses = &self.losses[index];
            let largest = case
                .sets
                .largest(|set| gains[set] - losses[set] * outside[set]);
            self.bounds.push(largest);
            value += case.weight * largest;
        }
        value
    }
}
