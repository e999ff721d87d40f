//! Plans for one load whose replicas leave shares room for another.
//!
//! Tokens of an expert can flow between the ranks that hold it, and so between all ranks that
//! experts link, one by one. Where spare slots all went to a few hot experts, most ranks are
//! islands; and a link helps no further than its expert's tokens go. So a layer is judged by
//! copies of its load that scatter about it, and swaps link its ranks until shares even all of
//! them out.

use multiversion::multiversion;
use rayon::prelude::*;

use super::layer::{Exchange, Layer};
use super::outlook::normal;
use super::worth::Worth;
use super::{check_even, layer_of, placed};
use crate::balance::{Budget, Fuel, Random};
use crate::error::{Code, Error, Result};
use crate::load::Load;
use crate::placement::Placement;
use crate::planner::Planner;

/// How many copies of the load a layer is judged by.
const COPIES: usize = 16;

/// A layer that is worth so little more than an even one has room enough.
const ENOUGH: f32 = 1e-4;

/// What a swap must gain.
const LEAST_GAIN: f32 = 1e-6;

impl Planner {
    /// Plans a placement for one load whose replicas link ranks, so that shares have room to mend
    /// what the next load brings. Ranks may carry up to `slack` more than the mean for it, as a
    /// part of that, when replicas share evenly. `spread` is how far loads of experts are expected
    /// to come to differ: the standard deviation, as a part of each.
    ///
    /// The [budget](Planner::with_budget) limits how many swaps are tried for each layer, or how
    /// long. The answer is the same on any number of threads.
    ///
    /// # Errors
    /// As [`plan`](Planner::plan); [`Code::OutOfRange`] for a slack or spread that is not from 0 to
    /// 1, [`Code::Inconsistent`] for machines that are not all alike.
    ///
    /// # Cost
    /// That of [`plan`](Planner::plan), and of 1,000 swaps for each layer: see
    /// `benches/results/few_moves.json`.
    pub fn plan_linked(&self, load: &Load<'_>, slack: f64, spread: f64) -> Result<Placement> {
        let topology = self.topology();
        check_even(topology)?;
        check_part("slack", slack, "0.001 leaves room enough to link ranks")?;
        check_part(
            "spread",
            spread,
            "0.15 prepares for a load that is 10 % off",
        )?;
        let start = self.plan(load)?;
        let num_slots = topology.num_slots();
        let mut slots = vec![0; load.num_layers() * num_slots];
        let per_thread = load.num_layers().div_ceil(self.num_threads());
        let fuel = match self.budget() {
            Budget::Iterations(steps) => Fuel::steps(steps),
            Budget::Time(time) => Fuel::until(std::time::Instant::now() + time),
        };
        let link = |(part, slots): (usize, &mut [u32])| {
            let layers = slots.chunks_exact_mut(num_slots);
            for (number, slots) in (part * per_thread..).zip(layers) {
                let layer = layer_of(self, &start, number);
                let row = &load.values()[number * load.num_experts()..][..load.num_experts()];
                let mut links = Links::new(layer, row, slack, spread);
                links.improve(&mut fuel.clone());
                links.layer.write(slots);
            }
        };
        let per_part = per_thread * num_slots;
        match self.pool() {
            None => slots.chunks_mut(per_part).enumerate().for_each(link),
            Some(pool) => {
                pool.install(|| slots.par_chunks_mut(per_part).enumerate().for_each(link));
            }
        }
        placed(topology, load.num_experts(), &slots)
    }
}

/// A layer whose ranks are being linked.
struct Links {
    layer: Layer,
    worth: Worth,
    /// Experts that fill several slots.
    shared: Vec<u32>,
    /// What each expert's slots carry if they share evenly, `[E]`, and each rank then, `[D]`.
    share: Vec<f64>,
    carried: Vec<f64>,
    /// What a rank may carry.
    most: f64,
    bounds: Vec<f32>,
}

/// Swaps between two ranks: of a slot whose expert has others, and of one that makes up for the
/// load that this shifts, if it is needed.
struct Swaps {
    first: (u32, u32),
    second: Option<(u32, u32)>,
    /// What the first rank hands to the second in all.
    shift: f64,
}

impl Links {
    fn new(layer: Layer, load: &[f32], slack: f64, spread: f64) -> Self {
        let mut random = Random::new();
        let mut copy = || -> Vec<f32> {
            let scattered = load.iter().map(|&load| {
                let factor = 1.0 + spread as f32 * normal(&mut random);
                if factor > 0.0 { load * factor } else { 0.0 }
            });
            scattered.collect()
        };
        let copies: Vec<_> = (0..COPIES).map(|_| copy()).collect();
        let loads = copies.iter().map(|copy| (&copy[..], 1.0 / COPIES as f64));
        let worth = Worth::new(&layer, loads);
        let experts = 0..layer.num_experts();
        let share = experts
            .clone()
            .map(|e| f64::from(load[e]) / layer.count(e) as f64);
        let share: Vec<f64> = share.collect();
        let mut carried = vec![0.0; layer.num_ranks()];
        for (slot, &rank) in (0..).zip(layer.ranks()) {
            carried[rank as usize] += share[layer.expert(slot)];
        }
        let mean = carried.iter().sum::<f64>() / carried.len() as f64;
        Self {
            most: carried.iter().fold(mean * (1.0 + slack), |a, &b| a.max(b)),
            shared: experts
                .filter(|&e| layer.count(e) > 1)
                .map(|e| e as u32)
                .collect(),
            worth,
            share,
            carried,
            layer,
            bounds: Vec::new(),
        }
    }

    /// Tries swaps drawn at random, and keeps those that help.
    fn improve(&mut self, fuel: &mut Fuel) {
        if !self.shared.is_empty() {
            improve(self, fuel);
        }
    }

    /// Draws swaps that leave no rank with too much; none if the ones that were drawn would.
    fn draw(&self, random: &mut Random) -> Option<Swaps> {
        let layer = &self.layer;
        let places = layer.places(self.shared[random.below(self.shared.len())] as usize);
        let a = places[random.below(places.len())];
        let b = random.below(layer.ranks().len()) as u32;
        if !layer.allows(Exchange::Swap { a, b }) {
            return None;
        }
        let share = |slot: u32| self.share[layer.expert(slot)];
        let (from, to) = (layer.rank(a as usize), layer.rank(b as usize));
        let fits = |shift: f64| {
            self.carried[to] + shift <= self.most && self.carried[from] - shift <= self.most
        };
        let shift = share(a) - share(b);
        let first = (a, b);
        if fits(shift) {
            return Some(Swaps {
                first,
                second: None,
                shift,
            });
        }
        // Of experts that are nowhere else, so that this links no other ranks.
        let alone = |rank: usize, other: u32| {
            let is_alone = move |&slot: &u32| slot != other && layer.count(layer.expert(slot)) == 1;
            layer.slots(rank).filter(is_alone)
        };
        let gap = self.carried[to] - self.carried[from];
        let (mut best, mut least) = (None, f64::INFINITY);
        for c in alone(from, a) {
            for d in alone(to, b) {
                let shift = shift + share(c) - share(d);
                let uneven = (gap + 2.0 * shift).abs();
                if uneven < least && fits(shift) && layer.allows(Exchange::Swap { a: c, b: d }) {
                    least = uneven;
                    best = Some(Swaps {
                        first,
                        second: Some((c, d)),
                        shift,
                    });
                }
            }
        }
        best
    }

    /// Makes swaps if they help.
    #[inline(always)]
    fn attempt(&mut self, swaps: &Swaps) {
        let swap = |(a, b): (u32, u32)| Exchange::Swap { a, b };
        let first = self.layer.concerned(swap(swaps.first));
        let second = swaps
            .second
            .map(|second| self.layer.concerned(swap(second)));
        let (mut experts, mut len) = ([first[0], first[1], 0, 0], 2);
        if let Some(second) = second {
            experts[2..].copy_from_slice(&second);
            len = 4;
        }
        let experts = &experts[..len];
        let make = |layer: &mut Layer| {
            layer.make(swap(swaps.first));
            swaps.second.map(|second| layer.make(swap(second)));
        };
        let least = self.worth.value() - LEAST_GAIN;
        make(&mut self.layer);
        let mut value = self.worth.bound(&self.layer, experts, &mut self.bounds);
        if value < least {
            value = self.worth.after(&self.layer, experts, &self.bounds, least);
        }
        if value < least {
            self.worth.take(&self.layer, experts);
            let (from, to) = (swaps.first.0 as usize, swaps.first.1 as usize);
            self.carried[self.layer.rank(from)] -= swaps.shift;
            self.carried[self.layer.rank(to)] += swaps.shift;
        } else {
            make(&mut self.layer);
            self.worth.keep_found(&self.layer);
        }
    }
}

#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+bmi1+bmi2+lzcnt+popcnt",
    "x86_64+avx2+bmi1+bmi2+lzcnt+popcnt"
))]
fn improve(links: &mut Links, fuel: &mut Fuel) {
    let mut random = Random::new();
    while links.worth.value() > 1.0 + ENOUGH && fuel.step() {
        if let Some(swaps) = links.draw(&mut random) {
            links.attempt(&swaps);
        }
    }
}

fn check_part(argument: &'static str, value: f64, hint: &str) -> Result<()> {
    if (0.0..=1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(
        Code::OutOfRange,
        argument,
        value,
        "from 0 to 1",
        hint,
    ))
}
