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
mod even;
mod layer;
mod link;
mod outlook;
mod paths;
mod relief;
mod rows;
mod search;
mod sets;
mod worth;

use std::time::Instant;

use rayon::prelude::*;

pub use outlook::Outlook;

use crate::balance::{Budget, Fuel};
use crate::error::{Code, Error, Result, require_positive};
use crate::load::Load;
use crate::migrate::check_previous;
use crate::placement::{Placement, Replica};
use crate::planner::Planner;
use crate::topology::Topology;
use layer::Layer;
use paths::Path;
use relief::FewMoves;
use rows::Futures;
use search::Limits;

/// The most scenarios of a plan: more would tell little and cost much.
pub const MAX_SCENARIOS: usize = 256;

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

/// Loads of the same experts at several times, or as they may be: `[K, L, E]`, checked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scenarios<'a> {
    values: &'a [f32],
    num_scenarios: usize,
    num_layers: usize,
    num_experts: usize,
}

impl<'a> Scenarios<'a> {
    /// Checks a row-major `[num_scenarios, num_layers, num_experts]` buffer.
    ///
    /// # Errors
    /// As [`Load::new`], for `scenarios`.
    pub fn new(
        values: &'a [f32],
        num_scenarios: usize,
        num_layers: usize,
        num_experts: usize,
    ) -> Result<Self> {
        require_positive("num_scenarios", num_scenarios)?;
        let each = num_layers.saturating_mul(num_experts);
        if num_scenarios.checked_mul(each) != Some(values.len()) {
            return Err(Error::invalid(
                Code::WrongShape,
                "scenarios",
                format!("{} values", values.len()),
                format!("{num_scenarios} x {num_layers} x {num_experts} values"),
                "",
            ));
        }
        for scenario in 0..num_scenarios {
            let load = &values[scenario * each..][..each];
            if let Err(error) = Load::new(load, num_layers, num_experts) {
                let refusal = error.refusal();
                return Err(Error::invalid(
                    refusal.code,
                    "scenarios",
                    format!("{}, scenario {scenario}", refusal.got),
                    refusal.expected.clone(),
                    refusal.hint.clone(),
                ));
            }
        }
        Ok(Self {
            values,
            num_scenarios,
            num_layers,
            num_experts,
        })
    }

    /// How many there are (K).
    #[must_use]
    pub fn num_scenarios(&self) -> usize {
        self.num_scenarios
    }

    /// How many layers each has (L).
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// How many experts each layer has (E).
    #[must_use]
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// The load of one layer in one scenario, `[E]`.
    fn layer(&self, scenario: usize, layer: usize) -> &'a [f32] {
        let begin = (scenario * self.num_layers + layer) * self.num_experts;
        &self.values[begin..begin + self.num_experts]
    }

    /// The mean load over scenarios, `[L, E]`.
    fn mean(&self, weights: &[f64]) -> Vec<f32> {
        let each = self.num_layers * self.num_experts;
        let all: f64 = weights.iter().sum();
        let mut mean = vec![0.0f64; each];
        for (load, weight) in self.values.chunks_exact(each).zip(weights) {
            for (mean, &load) in mean.iter_mut().zip(load) {
                *mean += f64::from(load) * (weight / all);
            }
        }
        mean.into_iter().map(|load| load as f32).collect()
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
    /// It starts from the placement in force; without one, from what this planner plans for the
    /// mean load. The [budget](Planner::with_budget) limits how many exchanges are tried for each
    /// layer, or how long. The answer is the same on any number of threads.
    ///
    /// # Cost
    /// An exchange takes about 0.15 us for 16 scenarios where replicas share evenly, and 0.2 to 0.5
    /// us where shares are made anew; a step of the budget is 16 of them. 26 layers of 64 experts
    /// in 1,000 steps: 0.06 to 0.08 s, and with 32 scenarios and shares 0.3 to 0.7 s; see
    /// `benches/results/next_window.json`.
    ///
    /// # Errors
    /// As [`plan`](Planner::plan); [`Code::TooLarge`] for more than [`MAX_SCENARIOS`];
    /// [`Code::WrongShape`] or [`Code::OutOfRange`] for the weights; [`Code::Inconsistent`] for
    /// machines that are not all alike, or a placement in force on other machines,
    /// [`Code::WrongShape`] for one of other layers or experts.
    pub fn plan_scenarios(&self, scenarios: &Scenarios<'_>, aim: &Aim<'_>) -> Result<Placement> {
        let topology = self.topology();
        check_even(topology)?;
        check_windows(scenarios.num_scenarios)?;
        let even = vec![1.0; scenarios.num_scenarios];
        let weights = aim.weights.unwrap_or(&even);
        check_weights(weights, scenarios.num_scenarios)?;
        let mean = scenarios.mean(weights);
        let mean = Load::new(&mean, scenarios.num_layers, scenarios.num_experts)?;
        let planned;
        let start = match aim.previous {
            Some(previous) => {
                check_previous(topology, &mean, previous)?;
                previous
            }
            None => {
                planned = self.plan(&mean)?;
                &planned
            }
        };
        let moved = aim.previous.is_some();
        let max_moves = aim.max_moves.filter(|_| moved);
        let per_layer = aim.max_moves_per_layer.filter(|_| moved);
        let most = max_moves.unwrap_or(usize::MAX).min(topology.num_slots());
        let limits = Limits {
            max_moves: per_layer.unwrap_or(usize::MAX).min(most),
        };
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
                max_moves_per_layer: limits.max_moves,
            };
            return self.follow(start, &few.paths(), &layer_sums, max_moves);
        }
        let work = Work {
            planner: self,
            scenarios,
            weights,
            split: aim.split,
            limits,
            over_layers: max_moves.is_some(),
            start,
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

/// What all layers of a plan share.
struct Work<'a> {
    planner: &'a Planner,
    scenarios: &'a Scenarios<'a>,
    weights: &'a [f64],
    split: Split,
    limits: Limits,
    /// Whether moves are handed out over all layers.
    over_layers: bool,
    start: &'a Placement,
}

impl Work<'_> {
    /// Improves layers from `first` on: writes what their slots hold then, and how it came to it.
    fn improve(&self, first: usize, slots: &mut [u32], paths: &mut [Path]) {
        let num_slots = self.planner.topology().num_slots();
        let num_layers = paths.len();
        let mut futures = Futures::default();
        let mut scratch = search::Scratch::default();
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
            let mut fuel = match self.planner.budget() {
                Budget::Iterations(steps) => Fuel::steps(steps),
                // What earlier layers left over is shared by those that follow.
                Budget::Time(time) => {
                    let now = Instant::now();
                    let left = (began + time).saturating_duration_since(now);
                    Fuel::until(now + left / (num_layers - index) as u32)
                }
            };
            let most = self.limits.max_moves;
            match self.split {
                Split::Uniform if self.over_layers => {
                    search::improve_even(
                        &mut layer,
                        &futures,
                        self.limits,
                        &mut fuel,
                        &mut scratch,
                    );
                    path.take(scratch.first, &scratch.path);
                }
                Split::Uniform => climb::climb_even(&mut layer, &futures, most, &mut fuel),
                Split::Shares => climb::climb_shared(&mut layer, &futures, most, &mut fuel),
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

fn check_windows(num_scenarios: usize) -> Result<()> {
    if num_scenarios <= MAX_SCENARIOS {
        return Ok(());
    }
    Err(Error::invalid(
        Code::TooLarge,
        "scenarios",
        num_scenarios,
        format!("at most {MAX_SCENARIOS}"),
        "16 to 32 tell most of what there is to tell",
    ))
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
