//! Cutting a model's layers into stages.
//!
//! Stages are runs of neighbouring layers. What counts is the simulated makespan of the schedule
//! that will run, within each rank's memory. Where all cuts can be tried, all are; otherwise the
//! search starts from cuts that are optimal for bounds of the makespan, and moves layers between
//! stages as long as that helps. Either way the answer carries a lower bound that no cut can beat.

use std::collections::BTreeMap;

use crate::cost::{Costs, Links};
use crate::error::{Error, Result};
use crate::generate::Request;
use crate::memory::{Sizes, peaks};
use crate::op::Kind;
use crate::schedule::{Layout, Schedule};
use crate::simulate::{Pairs, Sends, SimulateOptions, simulate};
use crate::wires::Wires;

/// What one layer costs for one micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Layer {
    /// Time of its forward.
    pub forward: f64,
    /// Time of the input part of its backward.
    pub backward_input: f64,
    /// Time of the weight part of its backward.
    pub backward_weight: f64,
    /// What it holds all the time: parameters, gradients, optimizer state.
    pub parameter_bytes: u64,
    /// What one micro-batch keeps from F to the end of its backward.
    pub activation_bytes: u64,
    /// Its output for one micro-batch, sent on where the next layer lives elsewhere.
    pub message_bytes: u64,
}

/// The machine, and how far to search.
#[derive(Clone, Debug, PartialEq)]
pub struct PartitionOptions {
    /// How much slower each rank is, `[num_ranks]`; empty for equal ranks.
    pub rank_factor: Vec<f64>,
    /// Latency of links.
    pub latency: Links,
    /// Bytes a unit of time.
    pub bandwidth: Links,
    /// What an overlapped pair takes, as a part of its halves one after the other.
    pub overlap_factor: f64,
    /// When a pair hands out its forward's result.
    pub pairs: Pairs,
    /// When a rank goes on after a send.
    pub sends: Sends,
    /// What a rank may hold, in bytes.
    pub max_bytes: Option<u64>,
    /// At most this many cuts are simulated.
    pub max_simulations: usize,
}

impl Default for PartitionOptions {
    fn default() -> Self {
        Self {
            rank_factor: Vec::new(),
            latency: Links::Uniform(0.0),
            bandwidth: Links::Uniform(f64::INFINITY),
            overlap_factor: 1.0,
            pairs: Pairs::Atomic,
            sends: Sends::Asynchronous,
            max_bytes: None,
            max_simulations: 4000,
        }
    }
}

/// A cut of the layers into stages.
#[derive(Clone, Debug, PartialEq)]
pub struct Partition {
    /// Stage `s` holds layers `bounds[s]..bounds[s + 1]`.
    pub bounds: Vec<usize>,
    /// The simulated makespan.
    pub makespan: f64,
    /// No cut has a shorter one.
    pub lower_bound: f64,
    /// Whether every cut has been tried, so that this one is optimal.
    pub exact: bool,
    /// What each rank holds at most, parameters included.
    pub rank_bytes: Vec<u64>,
    /// The part of all ranks' time in which no one computes.
    pub bubble_ratio: f64,
    /// Cuts simulated.
    pub num_simulations: usize,
}

impl Partition {
    /// How far from optimal it may be at most: `makespan / lower_bound - 1`, 0 where it is exact.
    #[must_use]
    pub fn gap(&self) -> f64 {
        if self.exact || self.lower_bound <= 0.0 {
            0.0
        } else {
            (self.makespan / self.lower_bound - 1.0).max(0.0)
        }
    }
}

/// Cuts layers into the stages of a schedule.
///
/// # Errors
///
/// [`Error::Input`] when there are fewer layers than stages, a cost is negative, or no cut that
/// was found fits the memory; and as [`Request::generate`].
pub fn partition(
    layers: &[Layer],
    request: &Request,
    options: &PartitionOptions,
) -> Result<Partition> {
    let schedule = request.generate()?;
    check(layers, schedule.layout())?;
    let mut search = Search::new(layers, &schedule, options)?;
    let (bounds, exact) = search.run()?;
    let value = search.evaluate(&bounds)?;
    if value.excess > 0 {
        return Err(Error::input(
            "memory",
            "max_bytes",
            options.max_bytes.unwrap_or(0),
            format!(
                "at least {}, what the leanest cut found takes on its fullest rank",
                options.max_bytes.unwrap_or(0) + value.excess
            ),
            "use more ranks, smaller micro-batches, or a schedule that holds fewer activations",
        ));
    }
    let lower_bound = search.lower_bound();
    Ok(Partition {
        makespan: value.makespan,
        lower_bound: if exact {
            value.makespan
        } else {
            lower_bound.min(value.makespan)
        },
        exact,
        rank_bytes: search.rank_bytes(&bounds),
        bubble_ratio: value.bubble_ratio,
        num_simulations: search.simulations,
        bounds,
    })
}

/// The costs of stages that a cut makes.
///
/// # Errors
///
/// [`Error::Input`] when the bounds are not a cut of the layers into the layout's stages.
pub fn stage_costs(
    layers: &[Layer],
    bounds: &[usize],
    layout: &Layout,
    options: &PartitionOptions,
) -> Result<Costs> {
    let cuts = bounds.len() == layout.num_stages() + 1
        && bounds.first() == Some(&0)
        && bounds.last() == Some(&layers.len())
        && bounds.is_sorted();
    if !cuts {
        return Err(Error::input(
            "bounds",
            "bounds",
            format!("{bounds:?}"),
            format!(
                "{} ascending bounds from 0 to {}",
                layout.num_stages() + 1,
                layers.len()
            ),
            "stage s holds the layers from bounds[s] to bounds[s + 1]",
        ));
    }
    let sum = |of: fn(&Layer) -> f64| -> Vec<f64> {
        bounds
            .windows(2)
            .map(|cut| layers[cut[0]..cut[1]].iter().map(of).sum())
            .collect()
    };
    let (backward_input, backward_weight) = (sum(|l| l.backward_input), sum(|l| l.backward_weight));
    Ok(Costs {
        forward: sum(|l| l.forward),
        backward: backward_input
            .iter()
            .zip(&backward_weight)
            .map(|(i, w)| i + w)
            .collect(),
        backward_input,
        backward_weight,
        rank_factor: match options.rank_factor.as_slice() {
            [] => vec![1.0; layout.num_ranks()],
            factors => factors.to_vec(),
        },
        overlap_factor: options.overlap_factor,
        pair: None,
        latency: options.latency.clone(),
        bandwidth: options.bandwidth.clone(),
        message_bytes: bounds[1..]
            .iter()
            .map(|&end| message_bytes(layers, end) as f64)
            .collect(),
    })
}

/// What a stage that ends before layer `end` hands on.
fn message_bytes(layers: &[Layer], end: usize) -> u64 {
    end.checked_sub(1)
        .map_or(0, |last| layers[last].message_bytes)
}

fn check(layers: &[Layer], layout: &Layout) -> Result<()> {
    if layers.len() < layout.num_stages() {
        return Err(Error::input(
            "too_few_layers",
            "layers",
            layers.len(),
            format!("at least {}, one for every stage", layout.num_stages()),
            "use fewer ranks or fewer stages a rank",
        ));
    }
    for (index, layer) in layers.iter().enumerate() {
        let times = [layer.forward, layer.backward_input, layer.backward_weight];
        if let Some(time) = times
            .iter()
            .find(|time| !(**time >= 0.0 && time.is_finite()))
        {
            return Err(Error::input(
                "negative_time",
                "layers",
                format!("{time} in layer {index}"),
                "times of 0 or more, and finite",
                "check the measurement",
            ));
        }
        let bytes = [
            layer.parameter_bytes,
            layer.activation_bytes,
            layer.message_bytes,
        ];
        if let Some(size) = bytes.iter().find(|&&size| size >= 1 << 53) {
            return Err(Error::input(
                "sizes",
                "layers",
                format!("{size} bytes in layer {index}"),
                "less than 2**53 bytes",
                "check the unit",
            ));
        }
    }
    Ok(())
}

/// What a cut is worth; less is better.
#[derive(Clone, Copy, PartialEq)]
struct Value {
    /// Bytes over the limit on the fullest rank.
    excess: u64,
    makespan: f64,
    bubble_ratio: f64,
}

impl Value {
    /// Better by more than what rounding may make of it.
    fn beats(self, other: Self) -> bool {
        self.excess < other.excess
            || (self.excess == other.excess && self.makespan < other.makespan * (1.0 - 1e-12))
    }
}

struct Search<'a> {
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
    simulations: usize,
}

impl<'a> Search<'a> {
    fn new(
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

    fn run(&mut self) -> Result<(Vec<usize>, bool)> {
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
    fn evaluate(&mut self, bounds: &[usize]) -> Result<Value> {
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

    fn rank_bytes(&self, bounds: &[usize]) -> Vec<u64> {
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

    /// F + I + W of the layers from `begin` to `end`.
    fn work(&self, begin: usize, end: usize) -> f64 {
        (self.forward_before[end] - self.forward_before[begin])
            + (self.input_before[end] - self.input_before[begin])
            + (self.weight_before[end] - self.weight_before[begin])
    }

    /// What a stage of these layers costs the step at least: all of its micro-batches, and with
    /// `fill` the way of the first one down to it and of the last one back from it.
    fn stage_time(&self, stage: usize, begin: usize, end: usize, fill: bool) -> f64 {
        let layout = self.schedule.layout();
        // With copies every rank runs two stages, each half of the micro-batches.
        let micro_batches = f64::from(layout.num_micro_batches()) / layout.num_copies() as f64;
        let factor = self.stage_factor[stage];
        let whole = micro_batches * self.work(begin, end) * factor;
        if !fill {
            return whole;
        }
        let fastest = self
            .stage_factor
            .iter()
            .copied()
            .fold(f64::INFINITY, f64::min);
        let down = fastest * self.forward_before[begin];
        let back = if self.splits {
            // The last input part may be followed by all weight parts, while others go back.
            let weights = micro_batches * (self.weight_before[end] - self.weight_before[begin]);
            (fastest * self.input_before[begin] - factor * weights).max(0.0)
        } else {
            fastest * (self.input_before[begin] + self.weight_before[begin])
        };
        down + whole + back
    }

    /// The cut whose worst stage is best, by dynamic programming over stages and layers.
    fn bottleneck(&self, fill: bool) -> Vec<usize> {
        let (stages, layers) = (self.num_stages(), self.layers.len());
        let mut best = vec![f64::INFINITY; layers + 1];
        best[0] = 0.0;
        let mut choices = Vec::with_capacity(stages);
        for stage in 0..stages {
            let mut next = vec![f64::INFINITY; layers + 1];
            let mut choice = vec![0; layers + 1];
            for end in stage + 1..=layers - (stages - stage - 1) {
                for begin in stage..end {
                    let worst = best[begin].max(self.stage_time(stage, begin, end, fill));
                    if worst < next[end] {
                        next[end] = worst;
                        choice[end] = begin;
                    }
                }
            }
            best = next;
            choices.push(choice);
        }
        let mut bounds = vec![layers; stages + 1];
        for stage in (0..stages).rev() {
            bounds[stage] = choices[stage][bounds[stage + 1]];
        }
        bounds
    }

    /// Below this no cut can come: perfectly spread work, the largest layer, and, where every
    /// rank has one stage, the best cut's worst stage with the way to it.
    fn lower_bound(&self) -> f64 {
        let layout = self.schedule.layout();
        // Overlapped pairs may shorten everything but the single instructions.
        let overlap = self.options.overlap_factor.min(1.0);
        let pairs = if self
            .schedule
            .ops()
            .iter()
            .any(|op| op.kind == Kind::OverlapForward)
        {
            overlap
        } else {
            1.0
        };
        let factor = |rank: usize| self.options.rank_factor.get(rank).copied().unwrap_or(1.0);
        let speed: f64 = (0..layout.num_ranks()).map(|rank| 1.0 / factor(rank)).sum();
        let all = f64::from(layout.num_micro_batches()) * self.work(0, self.layers.len());
        let spread = pairs * all / speed;
        if !self.stage_time_bounds() {
            return spread;
        }
        let cut = self.bottleneck(true);
        let worst = cut
            .windows(2)
            .enumerate()
            .map(|(stage, cut)| self.stage_time(stage, cut[0], cut[1], true))
            .fold(0.0, f64::max);
        spread.max(worst)
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
