//! Looking for the cut whose schedule ends first.

mod bounds;

use std::collections::BTreeMap;

use super::{Layer, PartitionOptions, message_bytes, stage_costs};
use crate::error::Result;
use crate::memory::{Sizes, peaks};
use crate::op::Kind;
use crate::schedule::Schedule;
use crate::simulate::{SimulateOptions, simulate};
use crate::wires::Wires;

/// What a cut is worth; less is better.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Value {
    /// Bytes over the limit on the fullest rank.
    pub(super) excess: u64,
    pub(super) makespan: f64,
    pub(super) bubble_ratio: f64,
}

impl Value {
    /// Better by more than what rounding may make of it.
    fn beats(self, other: Self) -> bool {
        self.excess < other.excess
            || (self.excess == other.excess && self.makespan < other.makespan * (1.0 - 1e-12))
    }
}

/// Looks for the best cut; whatever was simulated is known.
pub(super) struct Search<'a> {
    layers: &'a [Layer],
    schedule: &'a Schedule,
    options: &'a PartitionOptions,
    wires: Wires,
    simulate: SimulateOptions,
    /// Slowness of the rank of every stage, the fastest of its copies.
    stage_factor: Vec<f64>,
    /// Sums of forward and of whole work of the layers before each.
    forward_before: Vec<f64>,
    input_before: Vec<f64>,
    weight_before: Vec<f64>,
    /// Whether backwards are split, so that weight parts may come after the last input part.
    splits: bool,
    known: BTreeMap<Vec<usize>, Value>,
    pub(super) simulations: usize,
}

impl<'a> Search<'a> {
    pub(super) fn new(
        layers: &'a [Layer],
        schedule: &'a Schedule,
        options: &'a PartitionOptions,
    ) -> Result<Self> {
        let layout = schedule.layout();
        // Any cut has costs of the right shape; this one shows whether the machine's figures fit.
        let any: Vec<usize> = (0..layout.num_stages()).chain([layers.len()]).collect();
        stage_costs(layers, &any, layout, options)?.check(layout)?;
        let factor = |rank: usize| options.rank_factor.get(rank).copied().unwrap_or(1.0);
        let stage_factor = (0..layout.num_stages() as u16)
            .map(|stage| {
                let copies = 0..layout.num_copies() as u8;
                let fastest = copies.map(|copy| factor(layout.rank_of(copy, stage)));
                fastest.fold(f64::INFINITY, f64::min)
            })
            .collect();
        let before = |of: fn(&Layer) -> f64| {
            let mut sums = vec![0.0];
            let mut sum = 0.0;
            for layer in layers {
                sum += of(layer);
                sums.push(sum);
            }
            sums
        };
        Ok(Self {
            wires: Wires::new(layout),
            simulate: SimulateOptions {
                sends: options.sends,
                pairs: options.pairs,
                sizes: None,
            },
            stage_factor,
            forward_before: before(|l| l.forward),
            input_before: before(|l| l.backward_input),
            weight_before: before(|l| l.backward_weight),
            splits: schedule
                .ops()
                .iter()
                .any(|op| op.kind == Kind::BackwardWeight),
            known: BTreeMap::new(),
            simulations: 0,
            layers,
            schedule,
            options,
        })
    }

    fn num_stages(&self) -> usize {
        self.schedule.layout().num_stages()
    }

    pub(super) fn run(&mut self) -> Result<(Vec<usize>, bool)> {
        let (stages, layers) = (self.num_stages(), self.layers.len());
        if cuts(layers, stages).is_some_and(|count| count <= self.options.max_simulations) {
            return Ok((self.best_of_all()?, true));
        }
        let mut best: Option<(Value, Vec<usize>)> = None;
        for fill in [false, true] {
            let start = self.bottleneck(fill);
            let (value, bounds) = self.descend(start)?;
            if best.as_ref().is_none_or(|(known, _)| value.beats(*known)) {
                best = Some((value, bounds));
            }
        }
        let Some((mut value, mut bounds)) = best else {
            return Ok((Vec::new(), false));
        };
        if let Some((found, better)) = self.best_of_remaining(value)? {
            return Ok((if found.beats(value) { better } else { bounds }, true));
        }
        let bound = self.lower_bound();
        let mut random = 0x9E37_79B9_7F4A_7C15;
        // As many kicks as simulations, so that kicks to known cuts come to an end too.
        for _ in 0..self.options.max_simulations {
            let optimal = value.excess == 0 && value.makespan <= bound * (1.0 + 1e-9);
            if optimal || self.simulations >= self.options.max_simulations {
                break;
            }
            let start = self.kick(&bounds, &mut random);
            let (found, better) = self.descend(start)?;
            if found.beats(value) {
                (value, bounds) = (found, better);
            }
        }
        Ok((bounds, false))
    }

    fn best_of_all(&mut self) -> Result<Vec<usize>> {
        let (stages, layers) = (self.num_stages(), self.layers.len());
        let mut bounds: Vec<usize> = (0..stages).chain([layers]).collect();
        let mut best = (self.evaluate(&bounds)?, bounds.clone());
        // The inner bounds count up like an odometer whose digits ascend.
        while let Some(at) = (1..stages)
            .rev()
            .find(|&at| bounds[at] < layers - (stages - at))
        {
            bounds[at] += 1;
            for next in at + 1..stages {
                bounds[next] = bounds[next - 1] + 1;
            }
            let value = self.evaluate(&bounds)?;
            if value.beats(best.0) {
                best = (value, bounds.clone());
            }
        }
        Ok(best.1)
    }

    /// Whether [`stage_time`](Self::stage_time) with the fill bounds the makespan from below.
    fn stage_time_bounds(&self) -> bool {
        let layout = self.schedule.layout();
        let overlaps = self
            .schedule
            .ops()
            .iter()
            .any(|op| op.kind == Kind::OverlapForward);
        layout.num_copies() == 1 && layout.num_stages() == layout.num_ranks() && !overlaps
    }

    /// The best of all cuts whose stages could each allow less than `known`, if they are few
    /// enough to try them all; then nothing else can beat it.
    fn best_of_remaining(&mut self, known: Value) -> Result<Option<(Value, Vec<usize>)>> {
        if !self.stage_time_bounds() || known.excess > 0 {
            return Ok(None);
        }
        let (stages, layers) = (self.num_stages(), self.layers.len());
        // How many ways stages from here on have to cut what is left after `begin`.
        let mut ways = vec![vec![0u64; layers + 1]; stages + 1];
        ways[stages][layers] = 1;
        for stage in (0..stages).rev() {
            for begin in stage..layers {
                ways[stage][begin] = (begin + 1..=layers)
                    .filter(|&end| self.stage_time(stage, begin, end, true) < known.makespan)
                    .fold(0, |sum, end| sum.saturating_add(ways[stage + 1][end]));
            }
        }
        let left = self
            .options
            .max_simulations
            .saturating_sub(self.simulations);
        if ways[0][0] > left as u64 {
            return Ok(None);
        }
        let mut best = (known, Vec::new());
        let mut bounds = vec![0];
        self.try_remaining(&ways, &mut bounds, &mut best)?;
        Ok(Some(best))
    }

    fn try_remaining(
        &mut self,
        ways: &[Vec<u64>],
        bounds: &mut Vec<usize>,
        best: &mut (Value, Vec<usize>),
    ) -> Result<()> {
        let stage = bounds.len() - 1;
        let begin = bounds[stage];
        if stage == self.num_stages() {
            let found = self.evaluate(bounds)?;
            if found.beats(best.0) {
                *best = (found, bounds.clone());
            }
            return Ok(());
        }
        for end in begin + 1..=self.layers.len() {
            if ways[stage + 1][end] > 0
                && self.stage_time(stage, begin, end, true) < best.0.makespan
            {
                bounds.push(end);
                self.try_remaining(ways, bounds, best)?;
                bounds.pop();
            }
        }
        Ok(())
    }

    /// What a cut is worth; remembered, since moves and kicks come back to the same cuts.
    pub(super) fn evaluate(&mut self, bounds: &[usize]) -> Result<Value> {
        if let Some(&value) = self.known.get(bounds) {
            return Ok(value);
        }
        let value = self.simulated(bounds)?;
        self.known.insert(bounds.to_vec(), value);
        Ok(value)
    }

    fn simulated(&mut self, bounds: &[usize]) -> Result<Value> {
        self.simulations += 1;
        let layout = self.schedule.layout();
        let costs = stage_costs(self.layers, bounds, layout, self.options)?;
        let timeline = simulate(self.schedule, &costs, &self.simulate)?;
        let excess = self.options.max_bytes.map_or(0, |most| {
            let fullest = self.rank_bytes(bounds).into_iter().max().unwrap_or(0);
            fullest.saturating_sub(most)
        });
        Ok(Value {
            excess,
            makespan: timeline.makespan,
            bubble_ratio: timeline.bubble_ratio,
        })
    }

    pub(super) fn rank_bytes(&self, bounds: &[usize]) -> Vec<u64> {
        let layout = self.schedule.layout();
        let per_stage = |of: fn(&Layer) -> u64| -> Vec<u64> {
            bounds
                .windows(2)
                .map(|cut| self.layers[cut[0]..cut[1]].iter().map(of).sum())
                .collect()
        };
        let parameters = per_stage(|l| l.parameter_bytes);
        let sizes = Sizes {
            activation_bytes: per_stage(|l| l.activation_bytes),
            message_bytes: bounds[1..]
                .iter()
                .map(|&end| message_bytes(self.layers, end))
                .collect(),
        };
        let mut bytes: Vec<u64> = peaks(self.schedule, &self.wires, Some(&sizes))
            .into_iter()
            .map(|peak| peak.bytes)
            .collect();
        for (place, &rank) in layout.placement().iter().enumerate() {
            bytes[rank as usize] += parameters[place % layout.num_stages()];
        }
        bytes
    }

    /// Moves a layer at a time from one stage to another, through those between, as long as any
    /// such move helps.
    fn descend(&mut self, mut bounds: Vec<usize>) -> Result<(Value, Vec<usize>)> {
        let stages = self.num_stages();
        let mut value = self.evaluate(&bounds)?;
        // Moves are tried round and round; once none of a whole round has helped, none will.
        let mut in_vain = 0;
        let mut at = 0;
        while in_vain < stages * stages && self.simulations < self.options.max_simulations {
            let (from, to) = (at / stages, at % stages);
            at = (at + 1) % (stages * stages);
            in_vain += 1;
            let Some(moved) = moved(&bounds, from, to) else {
                continue;
            };
            let found = self.evaluate(&moved)?;
            if found.beats(value) {
                (value, bounds) = (found, moved);
                in_vain = 0;
            }
        }
        Ok((value, bounds))
    }

    /// Some random moves away from a cut.
    fn kick(&self, bounds: &[usize], random: &mut u64) -> Vec<usize> {
        let stages = self.num_stages();
        let mut draw = |below: usize| {
            // Marsaglia's xorshift; the seed is fixed, so the answer is too.
            *random ^= *random << 13;
            *random ^= *random >> 7;
            *random ^= *random << 17;
            (*random % below as u64) as usize
        };
        let mut kicked = bounds.to_vec();
        for _ in 0..2 + draw(4) {
            let (from, to) = (draw(stages), draw(stages));
            kicked = moved(&kicked, from, to).unwrap_or(kicked);
        }
        kicked
    }
}

/// The cut with one layer moved from a stage to another; `None` where a stage would be empty.
fn moved(bounds: &[usize], from: usize, to: usize) -> Option<Vec<usize>> {
    let mut moved = bounds.to_vec();
    if from < to {
        moved[from + 1..=to]
            .iter_mut()
            .for_each(|bound| *bound -= 1);
    } else if from > to {
        moved[to + 1..=from]
            .iter_mut()
            .for_each(|bound| *bound += 1);
    } else {
        return None;
    }
    moved.windows(2).all(|cut| cut[0] < cut[1]).then_some(moved)
}

/// How many cuts of layers into stages there are; `None` beyond counting.
fn cuts(layers: usize, stages: usize) -> Option<usize> {
    let mut count: usize = 1;
    for step in 1..stages {
        count = count.checked_mul(layers - step)? / step;
    }
    Some(count)
}
