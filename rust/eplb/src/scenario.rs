//! Plans that are good in several scenarios at once: for the window to come, not the last.
//!
//! A plan is made from the past and used in the future. Where it is made for one window alone, it
//! fits that window's noise. Here it is made for several loads at once: windows that have been,
//! [copies](Outlook) that differ from them as a window to come may, or loads that come from
//! elsewhere. It starts from the placement in force and is improved exchange by exchange, so it
//! moves little.
//!
//! What a placement is worth depends on how tokens are [split](Split) when the load arrives.

mod account;
mod best;
mod climb;
mod layer;
mod link;
mod outlook;
mod paths;
mod relief;
mod rows;
mod scenarios;
mod search;
mod sets;
mod worth;

use std::time::Instant;

use rayon::prelude::*;

pub use outlook::Outlook;
pub use scenarios::{MAX_SCENARIOS, Scenarios};

use crate::balance::{Budget, Fuel};
use crate::error::{Code, Error, Result};
use crate::load::Load;
use crate::migrate::{Reach, check_previous};
use crate::placement::{Placement, Replica};
use crate::planner::Planner;
use crate::topology::Topology;
use layer::Layer;
use paths::Path;
use relief::FewMoves;
use rows::Futures;
use scenarios::check_count;

/// How each expert's tokens will be split over its replicas when the load has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Split {
    /// Replicas share evenly, as engines do unless told otherwise.
    #[default]
    Uniform,
    /// Shares are made anew for the load that has come: see [`Splitter`](crate::Splitter).
    Shares,
}

impl Split {
    /// All kinds.
    pub const ALL: [Self; 2] = [Self::Uniform, Self::Shares];

    /// The name it goes by in Python and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Shares => "shares",
        }
    }

    /// The split of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|split| split.name() == name)
    }
}

/// What a plan for several scenarios is to be.
#[derive(Debug, Clone, Copy, Default)]
pub struct Aim<'a> {
    /// How tokens will be split.
    pub split: Split,
    /// How much each scenario counts, `[K]`; all alike if left out.
    pub weights: Option<&'a [f64]>,
    /// The placement in force: the plan starts from it, and experts that stay on their rank keep
    /// their slot.
    pub previous: Option<&'a Placement>,
    /// With a placement in force, how many experts of each layer may arrive on a rank that did not
    /// hold them.
    pub max_moves_per_layer: Option<usize>,
    /// The same over all layers: moves go where they gain most. The search then makes only
    /// exchanges that help by themselves.
    pub max_moves: Option<usize>,
}

impl Planner {
    /// Plans a placement that is good in several scenarios at once: in the weighted mean over
    /// them, the largest rank load as a part of the mean one is as small as exchanges make it.
    ///
    /// It starts from the placement in force or, in layers where that is better, from the best for the
    /// mean load within the same moves; without a placement in force, from what this planner plans
    /// for the mean load. The [budget](Planner::with_budget) limits how many exchanges are tried for
    /// each layer, or how long all takes. The answer is the same on any number of threads.
    ///
    /// # Cost
    /// An exchange takes about 0.15 us for 16 scenarios where replicas share evenly, and 0.2 to 0.5
    /// us where shares are made anew; a step of the budget is 16 of them. 26 layers of 64 experts
    /// and 24 scenarios in 2,000 steps: 0.2 s; with 32 scenarios and shares, in 1,000 steps, 0.3 to
    /// 0.7 s; see `benches/results/next_window.json`.
    ///
    /// # Errors
    /// As [`plan`](Planner::plan); [`Code::TooLarge`] for more than [`MAX_SCENARIOS`];
    /// [`Code::WrongShape`] or [`Code::OutOfRange`] for the weights; [`Code::Inconsistent`] for
    /// machines that are not all alike, or a placement in force on other machines,
    /// [`Code::WrongShape`] for one of other layers or experts.
    pub fn plan_scenarios(&self, scenarios: &Scenarios<'_>, aim: &Aim<'_>) -> Result<Placement> {
        let topology = self.topology();
        check_even(topology)?;
        check_count(scenarios.num_scenarios)?;
        let even = vec![1.0; scenarios.num_scenarios];
        let weights = aim.weights.unwrap_or(&even);
        check_weights(weights, scenarios.num_scenarios)?;
        let mean = scenarios.mean(weights);
        let mean = Load::new(&mean, scenarios.num_layers, scenarios.num_experts)?;
        let began = Instant::now();
        let planned;
        let start = match aim.previous {
            Some(previous) => {
                check_previous(topology, &mean, previous)?;
                check_full(previous)?;
                previous
            }
            None => {
                planned = self
                    .draft_at(self.budget().quartered(), &mean)?
                    .to_placement()?;
                &planned
            }
        };
        let moved = aim.previous.is_some();
        let max_moves = aim.max_moves.filter(|_| moved);
        let per_layer = aim.max_moves_per_layer.filter(|_| moved);
        let most = max_moves.unwrap_or(usize::MAX).min(topology.num_slots());
        let most = per_layer.unwrap_or(usize::MAX).min(most);
        let num_slots = topology.num_slots();
        let layer_sums = mean
            .layers()
            .map(|row| row.iter().map(|&load| f64::from(load)).sum());
        let layer_sums: Vec<f64> = layer_sums.collect();
        if let (Split::Shares, Some(max_moves)) = (aim.split, max_moves) {
            let few = FewMoves {
                planner: self,
                scenarios,
                weights,
                start,
                layer_sums: &layer_sums,
                max_moves,
                max_moves_per_layer: most,
            };
            return self.follow(start, &few.paths(), &layer_sums, max_moves);
        }
        let other = match aim.previous {
            Some(previous) if max_moves.is_none() => self.plan_within_each(&mean, previous, most),
            _ => None,
        };
        let work = Work {
            planner: self,
            budget: self.budget().since(began),
            scenarios,
            weights,
            split: aim.split,
            max_moves: most,
            over_layers: max_moves.is_some(),
            start,
            other: other.as_ref(),
        };
        let mut slots = vec![0; scenarios.num_layers * num_slots];
        let mut paths = vec![Path::default(); scenarios.num_layers];
        let per_thread = scenarios.num_layers.div_ceil(self.num_threads());
        let improve = |(part, (slots, paths)): (usize, (&mut [u32], &mut [Path]))| {
            work.improve(part * per_thread, slots, paths);
        };
        let per_part = per_thread * num_slots;
        match self.pool() {
            None => {
                let parts = slots.chunks_mut(per_part).zip(paths.chunks_mut(per_thread));
                parts.enumerate().for_each(improve);
            }
            Some(pool) => pool.install(|| {
                let parts = slots.par_chunks_mut(per_part);
                let parts = parts.zip(paths.par_chunks_mut(per_thread));
                parts.enumerate().for_each(improve);
            }),
        }
        match max_moves {
            Some(max_moves) => self.follow(start, &paths, &layer_sums, max_moves),
            None => placed(topology, scenarios.num_experts, &slots),
        }
    }

    /// From a placement to what is best for one load within so many moves of each layer; none where
    /// nothing is.
    fn plan_within_each(
        &self,
        load: &Load<'_>,
        previous: &Placement,
        most: usize,
    ) -> Option<Placement> {
        let reach = Reach {
            max_moves: Some(most.saturating_mul(load.num_layers())),
            max_moves_per_layer: Some(most),
            ..Reach::default()
        };
        let budget = self.budget().quartered();
        self.plan_from_at(budget, load, previous, &reach).ok()
    }

    /// Hands moves out over the layers of a placement, each of which has a path to follow.
    fn follow(
        &self,
        start: &Placement,
        paths: &[Path],
        layer_sums: &[f64],
        max_moves: usize,
    ) -> Result<Placement> {
        let num_slots = self.topology().num_slots();
        let mut slots = vec![0; paths.len() * num_slots];
        let ends = paths::choose(paths, layer_sums, max_moves);
        for (number, slots) in slots.chunks_exact_mut(num_slots).enumerate() {
            let mut layer = layer_of(self, start, number);
            for &exchange in &paths[number].exchanges[..ends[number]] {
                layer.make(exchange);
            }
            layer.write(slots);
        }
        placed(self.topology(), start.num_experts(), &slots)
    }
}

/// A layer as it is at first.
fn layer_of(planner: &Planner, start: &Placement, number: usize) -> Layer {
    let topology = planner.topology();
    let ranks = |gpu: usize| std::iter::repeat_n(gpu as u32, topology.slots_of(gpu).len());
    let rank_of = (0..topology.num_gpus()).flat_map(ranks).collect();
    let nodes = (0..topology.num_gpus()).map(|gpu| topology.node_of(gpu) as u32);
    let node_of = nodes.filter(|_| planner.keeps_groups()).collect();
    let num_slots = topology.num_slots();
    let row = &start.phy2log()[number * num_slots..][..num_slots];
    Layer::new(start.num_experts(), rank_of, row, node_of)
}

fn check_even(topology: &Topology) -> Result<()> {
    if topology.is_even() {
        return Ok(());
    }
    Err(Error::invalid(
        Code::Inconsistent,
        "topology",
        "GPUs of unequal slots or speed, or dead ones",
        "GPUs that are all alike for a plan of several scenarios, or one for shares",
        "plan for the mean load, which any machines may have",
    ))
}

/// Refuses a placement whose slots are not all in use.
fn check_full(previous: &Placement) -> Result<()> {
    let machines = previous.topology();
    let dead: Vec<usize> = (0..machines.num_gpus())
        .filter(|&gpu| machines.is_dead(gpu))
        .collect();
    if dead.is_empty() {
        return Ok(());
    }
    Err(Error::invalid(
        Code::Inconsistent,
        "previous",
        format!("a plan in which GPUs {dead:?} are dead"),
        "a plan in which all GPUs hold experts",
        "plan for the mean load first, which fills them",
    ))
}

/// What all layers of a plan share.
struct Work<'a> {
    planner: &'a Planner,
    scenarios: &'a Scenarios<'a>,
    weights: &'a [f64],
    split: Split,
    /// Of each layer.
    max_moves: usize,
    /// Whether moves are handed out over all layers.
    over_layers: bool,
    start: &'a Placement,
    /// Where layers start from that are worth less there.
    other: Option<&'a Placement>,
    budget: Budget,
}

impl Work<'_> {
    /// Improves layers from `first` on: writes what their slots hold then, and how it came to it.
    fn improve(&self, first: usize, slots: &mut [u32], paths: &mut [Path]) {
        let num_slots = self.planner.topology().num_slots();
        let num_layers = paths.len();
        let mut futures = Futures::default();
        let began = Instant::now();
        let layers = slots.chunks_exact_mut(num_slots).zip(paths).enumerate();
        for (index, (slots, path)) in layers {
            let number = first + index;
            let scenarios = 0..self.scenarios.num_scenarios;
            let rows = scenarios.map(|index| self.scenarios.layer(index, number));
            let rows = rows.zip(self.weights.iter().copied());
            let num_ranks = self.planner.topology().num_gpus();
            futures.take(rows, self.scenarios.num_experts, num_ranks);
            let mut layer = layer_of(self.planner, self.start, number);
            let mut fuel = match self.budget {
                Budget::Iterations(steps) => Fuel::steps(steps),
                // What earlier layers left over is shared by those that follow.
                Budget::Time(time) => {
                    let now = Instant::now();
                    let left = (began + time).saturating_duration_since(now);
                    Fuel::until(now + left / (num_layers - index) as u32)
                }
            };
            let most = self.max_moves;
            if self.over_layers {
                search::descend(&mut layer, &futures, most, &mut fuel, path);
            } else {
                let mut rows = self
                    .other
                    .map(|other| other.phy2log().chunks_exact(num_slots));
                let other = rows.as_mut().and_then(|rows| rows.nth(number));
                climb::climb(&mut layer, &futures, self.split, most, other, &mut fuel);
            }
            layer.write(slots);
        }
    }
}

/// A placement of what slots hold, `[L, R]`. Each expert's replicas are numbered by slot.
fn placed(topology: &Topology, num_experts: usize, slots: &[u32]) -> Result<Placement> {
    let mut replicas = Vec::with_capacity(slots.len());
    let mut count = vec![0; num_experts];
    for row in slots.chunks_exact(topology.num_slots()) {
        count.fill(0);
        for &expert in row {
            let number = &mut count[expert as usize];
            replicas.push(Replica {
                expert,
                number: *number,
            });
            *number += 1;
        }
    }
    Placement::from_replicas(topology.clone(), num_experts, &replicas)
}

fn check_weights(weights: &[f64], num_scenarios: usize) -> Result<()> {
    if weights.len() != num_scenarios {
        return Err(Error::invalid(
            Code::WrongShape,
            "weights",
            format!("{} values", weights.len()),
            format!("{num_scenarios} values, one for each scenario"),
            "",
        ));
    }
    let wrong = |weight: &&f64| !(0.0..=1e12).contains(*weight);
    let all: f64 = weights.iter().sum();
    let got = match weights.iter().find(wrong) {
        Some(weight) => weight.to_string(),
        None if all > 1e-12 => return Ok(()),
        None => "zeros alone".to_owned(),
    };
    Err(Error::invalid(
        Code::OutOfRange,
        "weights",
        got,
        "from 0 to 1e12, and not all 0",
        "",
    ))
}
