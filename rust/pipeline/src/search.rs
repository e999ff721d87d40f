//! Choosing a schedule, a partition and a number of micro-batches.

use crate::error::{Error, Result};
use crate::generate::{Method, Request};
use crate::op::Kind;
use crate::partition::{Layer, Partition, PartitionOptions, partition, stage_costs};
use crate::simulate::{SimulateOptions, simulate};

/// What to try.
#[derive(Clone, Debug, PartialEq)]
pub struct SearchRequest {
    /// How many ranks there are.
    pub num_ranks: usize,
    /// The schedules to try.
    pub methods: Vec<Method>,
    /// Each number of micro-batches, with the layers' costs for one micro-batch of that size.
    pub loads: Vec<(u32, Vec<Layer>)>,
    /// Stages a rank, for schedules that take any number.
    pub stages_per_rank: Vec<usize>,
    /// The machine and its memory.
    pub options: PartitionOptions,
}

/// One combination that was tried.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Schedule, micro-batches and stages.
    pub request: Request,
    /// The cut; `None` where the combination cannot be or does not fit.
    pub partition: Option<Partition>,
    /// The step's time divided by its micro-batches; infinite without a cut.
    pub time_per_micro_batch: f64,
    /// For overlapped pairs: below this part of their halves' time, this combination beats the
    /// best one without pairs at the same number of micro-batches.
    pub wins_below_overlap: Option<f64>,
    /// Why it stands where it stands.
    pub why: String,
}

/// Tries every combination and ranks them, fastest a micro-batch first; what cannot be or does
/// not fit comes last, with the reason.
///
/// Costs as many simulations as [`PartitionOptions::max_simulations`] allows for each combination.
/// After each one, `progress` is told how many are done, and of how many; it stops the search by
/// answering `false`.
///
/// # Errors
///
/// [`Error::Input`] when there is nothing to try, a cost or the machine cannot be, or the search
/// was stopped.
pub fn search(
    request: &SearchRequest,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Vec<Candidate>> {
    let nothing = |argument| {
        Err(Error::input(
            "nothing_to_try",
            argument,
            "none",
            "at least one",
            "leave it out for the usual ones",
        ))
    };
    if request.methods.is_empty() {
        return nothing("methods");
    }
    if request.loads.is_empty() {
        return nothing("micro_batches");
    }
    let combinations = combinations(request);
    let total = combinations.len() * request.loads.len();
    let mut candidates = Vec::with_capacity(total);
    for (num_micro_batches, layers) in &request.loads {
        let first = candidates.len();
        for &(method, stages_per_rank) in &combinations {
            let asked = Request {
                stages_per_rank,
                ..Request::new(method, request.num_ranks, *num_micro_batches)
            };
            candidates.push(attempt(asked, layers, &request.options)?);
            if !progress(candidates.len(), total) {
                return Err(Error::input(
                    "stopped",
                    "progress",
                    format!("false after {} of {total}", candidates.len()),
                    "true to go on",
                    "search less: fewer methods, or fewer simulations for each",
                ));
            }
        }
        compare_overlap(&mut candidates[first..], layers, &request.options)?;
    }
    candidates.sort_by(|a, b| a.time_per_micro_batch.total_cmp(&b.time_per_micro_batch));
    explain(&mut candidates, &request.options);
    Ok(candidates)
}

/// The schedules to try, those that take any number of stages a rank with every number asked for.
fn combinations(request: &SearchRequest) -> Vec<(Method, Option<usize>)> {
    let stages = |method: Method| -> Vec<Option<usize>> {
        if method.takes_stages_per_rank() && !request.stages_per_rank.is_empty() {
            request.stages_per_rank.iter().copied().map(Some).collect()
        } else {
            vec![None]
        }
    };
    let methods = request.methods.iter();
    methods
        .flat_map(|&method| stages(method).into_iter().map(move |v| (method, v)))
        .collect()
}

fn attempt(request: Request, layers: &[Layer], options: &PartitionOptions) -> Result<Candidate> {
    let (partition, why) = match partition(layers, &request, options) {
        Ok(found) => (Some(found), String::new()),
        Err(
            error @ Error::Input {
                code: "memory" | "odd_ranks" | "too_few_layers",
                ..
            },
        ) => (None, error.to_string()),
        Err(error) => return Err(error),
    };
    let time_per_micro_batch = partition.as_ref().map_or(f64::INFINITY, |found| {
        found.makespan / f64::from(request.num_micro_batches)
    });
    Ok(Candidate {
        request,
        partition,
        time_per_micro_batch,
        wins_below_overlap: None,
        why,
    })
}

/// For candidates with overlapped pairs: how much of a pair's time overlap must save.
fn compare_overlap(
    candidates: &mut [Candidate],
    layers: &[Layer],
    options: &PartitionOptions,
) -> Result<()> {
    let mut rival = f64::INFINITY;
    let mut with_pairs = Vec::new();
    for (index, candidate) in candidates.iter().enumerate() {
        let Some(found) = &candidate.partition else {
            continue;
        };
        let schedule = candidate.request.generate()?;
        if schedule
            .ops()
            .iter()
            .any(|op| op.kind == Kind::OverlapForward)
        {
            with_pairs.push((index, schedule));
        } else {
            rival = rival.min(found.makespan);
        }
    }
    if !rival.is_finite() {
        return Ok(());
    }
    let simulate_options = SimulateOptions {
        sends: options.sends,
        pairs: options.pairs,
        sizes: None,
    };
    for (index, schedule) in with_pairs {
        let Some(found) = &candidates[index].partition else {
            continue;
        };
        let mut costs = stage_costs(layers, &found.bounds, schedule.layout(), options)?;
        let mut wins = |factor: f64| -> Result<bool> {
            costs.overlap_factor = factor;
            Ok(simulate(&schedule, &costs, &simulate_options)?.makespan < rival)
        };
        // A pair cannot take less than half of its halves' time: one of the two runs alone.
        let (mut low, mut high) = (0.5, 1.5);
        if !wins(low)? {
            continue;
        }
        for _ in 0..20 {
            let middle = (low + high) / 2.0;
            if wins(middle)? {
                low = middle;
            } else {
                high = middle;
            }
        }
        candidates[index].wins_below_overlap = Some(low);
    }
    Ok(())
}

fn explain(candidates: &mut [Candidate], options: &PartitionOptions) {
    let best = candidates
        .first()
        .map_or(f64::INFINITY, |best| best.time_per_micro_batch);
    for candidate in candidates {
        let Some(found) = &candidate.partition else {
            continue;
        };
        let mut why = vec![format!("bubble {:.1} %", 100.0 * found.bubble_ratio)];
        if candidate.time_per_micro_batch > best {
            why.push(format!(
                "{:.1} % slower than the best",
                100.0 * (candidate.time_per_micro_batch / best - 1.0)
            ));
        }
        if let Some(factor) = candidate.wins_below_overlap {
            let now = options.overlap_factor;
            why.push(if now < factor {
                format!("pays because pairs take {now:.3} of their halves' time, less than {factor:.3}")
            } else {
                format!("would pay once pairs took less than {factor:.3} of their halves' time, not {now:.3}")
            });
        }
        if let Some(most) = options.max_bytes {
            let fullest = found.rank_bytes.iter().copied().max().unwrap_or(0);
            why.push(format!(
                "fullest rank {:.0} % of the memory",
                100.0 * fullest as f64 / most as f64
            ));
        }
        why.push(if found.exact {
            "partition optimal".to_owned()
        } else {
            format!("partition within {:.1} % of any", 100.0 * found.gap())
        });
        candidate.why = why.join("; ");
    }
}
