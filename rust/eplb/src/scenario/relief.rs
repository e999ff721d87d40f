//! Few moves where tokens are split anew: for each of them, the one that relieves a layer most.
//!
//! Ranks are relieved if an expert that they hold alone can go elsewhere, too. So a slot of another
//! rank takes that expert, in the place of one that keeps other slots. Of all such exchanges the
//! best is made, exactly; then the next, from there.

use std::time::Instant;

use multiversion::multiversion;
use rayon::prelude::*;

use super::layer::{Exchange, Layer};
use super::paths::{self, Path};
use super::search::Made;
use super::sets::{Case, MOST, Row, Worth, spread};
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
struct Scratch {
    /// How many loads there are (K).
    num_cases: usize,
    /// Slots whose expert has others, rank by rank; where each rank's begin, `[D + 1]`; and what
    /// sets gain if the expert leaves, `[slots, K]`.
    drops: Vec<u32>,
    begins: Vec<u32>,
    gains: Vec<Row>,
    /// Which sets a rank is outside of, `[D, K]`.
    outside: Vec<Row>,
    /// What sets lose if an expert can go elsewhere, `[K]`.
    losses: Vec<Row>,
    /// What one of the sets gains if the expert of each slot leaves, `[slots]`.
    gained: Vec<f32>,
    candidates: Vec<Candidate>,
    /// The least that each candidate could be worth under each load, `[candidates, K]`.
    bounds: Vec<f32>,
}

/// An exchange that may help.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    /// The slot that is given away, by its place among those that may be, and its rank.
    drop: u32,
    rank: u32,
    /// The expert that comes.
    expert: u32,
    /// The least that the layer could be worth then; infinite once that was found to be too much.
    bound: f32,
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
    scratch.look(layer, worth);
    scratch.collect(layer, worth, max_moves, least);
    while let Some(best) = scratch.best(least)
        && fuel.step()
    {
        let Candidate { drop, expert, .. } = scratch.candidates[best];
        let slot = scratch.drops[drop as usize];
        let exchange = Exchange::Replace { slot, expert };
        let bounds = &scratch.bounds[best * scratch.num_cases..][..scratch.num_cases];
        let back = layer.make(exchange);
        let value = worth.after(layer, bounds, least);
        layer.make(back);
        scratch.candidates[best].bound = f32::INFINITY;
        worth.keep_found(layer, |case, index, set| {
            scratch.raise(layer, case, index, set);
        });
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
        self.num_cases = worth.cases.len();
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
                for case in &worth.cases {
                    let outside = case.sets.outside(rank);
                    self.outside.push(spread(outside, &[1.0; MOST], 1.0));
                }
            }
            let expert = layer.expert(slot);
            if layer.count(expert) > 1 {
                self.drops.push(slot);
                for case in &worth.cases {
                    let gaining = case.sets.gaining(layer, slot);
                    let gains = spread(gaining, &case.sets.inverse, case.loads[expert]);
                    self.gains.push(gains);
                }
            }
        }
        self.begins.push(self.drops.len() as u32);
    }

    /// Notes the exchanges that relieve what is tight, unless a bound is above `limit`.
    #[inline(always)]
    fn collect(&mut self, layer: &Layer, worth: &Worth, max_moves: usize, limit: f32) {
        self.candidates.clear();
        self.bounds.clear();
        for expert in 0..layer.num_experts() {
            let suspects = |case: &Case| case.sets.suspects(expert);
            if !worth.cases.iter().any(suspects) {
                continue;
            }
            self.losses.clear();
            for case in &worth.cases {
                let losses = case.sets.losses(expert, case.loads[expert]);
                self.losses.push(losses);
            }
            for rank in 0..layer.num_ranks() {
                let relieves =
                    |case: &Case| case.sets.suspects(expert) && case.sets.is_outside(rank);
                if !worth.cases.iter().any(relieves) || self.bound_at(worth, rank) >= limit {
                    continue;
                }
                for drop in self.begins[rank]..self.begins[rank + 1] {
                    let slot = self.drops[drop as usize];
                    let expert = expert as u32;
                    let exchange = Exchange::Replace { slot, expert };
                    let moves = layer.num_moves() as i32 + layer.more_moves(exchange);
                    if layer.allows(exchange) && moves <= max_moves as i32 {
                        let bound = self.push_bounds(worth, rank, drop as usize);
                        if bound < limit {
                            self.candidates.push(Candidate {
                                drop,
                                rank: rank as u32,
                                expert,
                                bound,
                            });
                        } else {
                            self.bounds.truncate(self.candidates.len() * self.num_cases);
                        }
                    }
                }
            }
        }
    }

    /// A bound for what the layer is worth if the expert whose losses are there is on a rank, too.
    #[inline(always)]
    fn bound_at(&self, worth: &Worth, rank: usize) -> f32 {
        let outside = &self.outside[rank * self.num_cases..];
        let mut value = 0.0;
        for (case, (outside, losses)) in worth.cases.iter().zip(outside.iter().zip(&self.losses)) {
            value += case.weight * case.sets.largest(|set| -losses[set] * outside[set]);
        }
        value
    }

    /// The same if it takes the place of another. Notes the bounds for each load.
    #[inline(always)]
    fn push_bounds(&mut self, worth: &Worth, rank: usize, drop: usize) -> f32 {
        let outside = &self.outside[rank * self.num_cases..][..self.num_cases];
        let gains = &self.gains[drop * self.num_cases..][..self.num_cases];
        let mut value = 0.0;
        for (index, case) in worth.cases.iter().enumerate() {
            let (outside, gains, losses) = (&outside[index], &gains[index], &self.losses[index]);
            let change = |set: usize| gains[set] - losses[set] * outside[set];
            let bound = case.sets.largest(change);
            self.bounds.push(bound);
            value += case.weight * bound;
        }
        value
    }

    /// Raises bounds to what a set shows that was found for one of the loads.
    #[inline(always)]
    fn raise(&mut self, layer: &Layer, case: &Case, index: usize, set: usize) {
        let (mean, inverse) = (case.sets.means[set], case.sets.inverse[set]);
        let has = |sets: u64| (sets >> set & 1) as f32 * inverse;
        self.gained.clear();
        for &slot in &self.drops {
            let gained = has(case.sets.gaining(layer, slot)) * case.loads[layer.expert(slot)];
            self.gained.push(gained);
        }
        let bounds = self.bounds[index..].iter_mut().step_by(self.num_cases);
        for (candidate, bound) in self.candidates.iter_mut().zip(bounds) {
            let expert = candidate.expert as usize;
            let relieved = case.sets.alone(expert) & case.sets.outside(candidate.rank as usize);
            let lost = has(relieved) * case.loads[expert];
            let raised = mean + self.gained[candidate.drop as usize] - lost;
            if raised > *bound {
                candidate.bound += case.weight * (raised - *bound);
                *bound = raised;
            }
        }
    }

    /// The candidate of the least bound below `limit`, the first of several.
    #[inline(always)]
    fn best(&self, limit: f32) -> Option<usize> {
        let mut best = (limit, None);
        for (place, candidate) in self.candidates.iter().enumerate() {
            if candidate.bound < best.0 {
                best = (candidate.bound, Some(place));
            }
        }
        best.1
    }
}
