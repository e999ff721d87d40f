//! Cutting a model's layers into stages.
//!
//! Stages are runs of neighbouring layers. What counts is the simulated makespan of the schedule
//! that will run, within each rank's memory. Where all cuts can be tried, all are; otherwise the
//! search starts from cuts that are optimal for bounds of the makespan, and moves layers between
//! stages as long as that helps. Either way the answer carries a lower bound that no cut can beat.

mod search;

use crate::cost::{Costs, Links};
use crate::error::{Error, Result};
use crate::generate::Request;
use crate::schedule::Layout;
use crate::simulate::{Pairs, Sends};
use search::Search;

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
