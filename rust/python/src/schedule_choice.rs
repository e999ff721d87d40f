//! `partition` and `search`.

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pipeline::{
    Candidate, Layer, Method, Pairs, Partition, PartitionOptions, Request, SearchRequest, Sends,
};
use pyo3::prelude::*;

use crate::schedule::links;
use crate::schedule_errors::schedule_error;

type Numbers<'py> = PyReadonlyArray1<'py, f64>;
type Bytes<'py> = PyReadonlyArray1<'py, u64>;

/// Forward, input part and weight part of every layer; parameter, activation and message bytes.
type LayerArrays<'py> = (
    (Numbers<'py>, Numbers<'py>, Numbers<'py>),
    (Bytes<'py>, Bytes<'py>, Bytes<'py>),
);

/// Rank factors, latency, bandwidth; overlap factor, early forward, blocking; bytes, simulations.
type Machine<'py> = (
    (Numbers<'py>, Numbers<'py>, Numbers<'py>),
    (f64, bool, bool),
    (Option<u64>, usize),
);

/// Bounds, makespan, lower bound, exact, bytes per rank, bubble ratio, simulations, gap.
type Cut<'py> = (
    Vec<usize>,
    f64,
    f64,
    bool,
    Bound<'py, PyArray1<u64>>,
    f64,
    usize,
    f64,
);

/// Method, micro-batches, stages a rank, cut, time per micro-batch, winning overlap, why.
type Tried<'py> = (
    &'static str,
    u32,
    Option<usize>,
    Option<Cut<'py>>,
    f64,
    Option<f64>,
    String,
);

#[pyfunction]
pub(crate) fn partition_layers<'py>(
    py: Python<'py>,
    layers: LayerArrays<'py>,
    method: &str,
    num_ranks: usize,
    num_micro_batches: u32,
    stages_per_rank: Option<usize>,
    machine: Machine<'py>,
) -> PyResult<Cut<'py>> {
    let layers = layers_of(&layers)?;
    let options = options_of(&machine)?;
    let found = py.detach(|| {
        let request = Request {
            stages_per_rank,
            ..Request::new(Method::from_name(method)?, num_ranks, num_micro_batches)
        };
        pipeline::partition(&layers, &request, &options)
    });
    match found {
        Ok(found) => Ok(cut(py, found)),
        Err(error) => Err(schedule_error(py, &error)),
    }
}

#[pyfunction]
pub(crate) fn search_schedules<'py>(
    py: Python<'py>,
    num_ranks: usize,
    methods: Vec<String>,
    loads: Vec<(u32, LayerArrays<'py>)>,
    stages_per_rank: Vec<usize>,
    machine: Machine<'py>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Vec<Tried<'py>>> {
    let methods: pipeline::Result<Vec<Method>> =
        methods.iter().map(|name| Method::from_name(name)).collect();
    let loads: PyResult<Vec<(u32, Vec<Layer>)>> = loads
        .iter()
        .map(|(count, layers)| Ok((*count, layers_of(layers)?)))
        .collect();
    let request = SearchRequest {
        num_ranks,
        methods: methods.map_err(|error| schedule_error(py, &error))?,
        loads: loads?,
        stages_per_rank,
        options: options_of(&machine)?,
    };
    // What stops the search from Python: an exception of the callback, or Ctrl-C.
    let mut raised = None;
    let candidates = py.detach(|| {
        pipeline::search(&request, &mut |done, total| {
            let told = Python::attach(|py| {
                py.check_signals()?;
                progress
                    .as_ref()
                    .map_or(Ok(()), |tell| tell.call1(py, (done, total)).map(drop))
            });
            raised = told.err();
            raised.is_none()
        })
    });
    if let Some(raised) = raised {
        return Err(raised);
    }
    let candidates = candidates.map_err(|error| schedule_error(py, &error))?;
    Ok(candidates
        .into_iter()
        .map(|candidate| tried(py, candidate))
        .collect())
}

fn tried(py: Python<'_>, candidate: Candidate) -> Tried<'_> {
    let Request {
        method,
        num_micro_batches,
        stages_per_rank,
        ..
    } = candidate.request;
    (
        method.name(),
        num_micro_batches,
        stages_per_rank,
        candidate.partition.map(|found| cut(py, found)),
        candidate.time_per_micro_batch,
        candidate.wins_below_overlap,
        candidate.why,
    )
}

fn cut(py: Python<'_>, found: Partition) -> Cut<'_> {
    let gap = found.gap();
    (
        found.bounds,
        found.makespan,
        found.lower_bound,
        found.exact,
        found.rank_bytes.into_pyarray(py),
        found.bubble_ratio,
        found.num_simulations,
        gap,
    )
}

fn options_of(machine: &Machine<'_>) -> PyResult<PartitionOptions> {
    let ((rank_factor, latency, bandwidth), (overlap_factor, early, blocking), limits) = machine;
    Ok(PartitionOptions {
        rank_factor: rank_factor.as_slice()?.to_vec(),
        latency: links(latency)?,
        bandwidth: links(bandwidth)?,
        overlap_factor: *overlap_factor,
        pairs: if *early {
            Pairs::EarlyForward
        } else {
            Pairs::Atomic
        },
        sends: if *blocking {
            Sends::Blocking
        } else {
            Sends::Asynchronous
        },
        max_bytes: limits.0,
        max_simulations: limits.1,
    })
}

fn layers_of(arrays: &LayerArrays<'_>) -> PyResult<Vec<Layer>> {
    let ((forward, input, weight), (parameters, activations, messages)) = arrays;
    let (forward, input, weight) = (forward.as_slice()?, input.as_slice()?, weight.as_slice()?);
    let parameters = parameters.as_slice()?;
    let (activations, messages) = (activations.as_slice()?, messages.as_slice()?);
    // The package has given all six the same length.
    let times = forward.iter().zip(input).zip(weight);
    let bytes = parameters.iter().zip(activations).zip(messages);
    Ok(times
        .zip(bytes)
        .map(
            |(((&forward, &backward_input), &backward_weight), ((&p, &a), &m))| Layer {
                forward,
                backward_input,
                backward_weight,
                parameter_bytes: p,
                activation_bytes: a,
                message_bytes: m,
            },
        )
        .collect())
}
