//! `Schedule`: generated, proved, simulated, exchanged.

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pipeline::verify::{Transport, VerifyOptions, verify};
use pipeline::{
    Costs, CsvOptions, Dialect, Form, Links, Method, Pairs, Peak, Request, Sends, SimulateOptions,
    Sizes, place_transfers, simulate,
};
use pyo3::prelude::*;

use crate::schedule_errors::schedule_error;

/// From this many micro-batches times stages on, work takes longer than letting go of the
/// interpreter and taking it back.
const DETACH_FROM: usize = 512;

type Array<'py, T> = Bound<'py, PyArray1<T>>;
type Numbers<'py> = PyReadonlyArray1<'py, f64>;
type Bytes<'py> = PyReadonlyArray1<'py, u64>;

/// The instruction stream of every rank.
#[pyclass(frozen, eq, module = "eplb_rs._core")]
#[derive(PartialEq, Eq)]
pub(crate) struct Schedule(pipeline::Schedule);

#[pymethods]
impl Schedule {
    #[staticmethod]
    fn generate(
        py: Python<'_>,
        method: &str,
        num_ranks: usize,
        num_micro_batches: u32,
        stages_per_rank: Option<usize>,
        forward_only: bool,
        transfers: bool,
    ) -> PyResult<Self> {
        let run = || {
            let request = Request {
                method: Method::from_name(method)?,
                num_ranks,
                num_micro_batches,
                stages_per_rank,
                forward_only,
            };
            if transfers {
                request.generate()
            } else {
                request.order()
            }
        };
        let work = num_ranks.saturating_mul(num_micro_batches as usize);
        Self::made(py, work, run)
    }

    #[staticmethod]
    fn parse(py: Python<'_>, text: &str) -> PyResult<Self> {
        Self::made(py, text.len(), || pipeline::Schedule::parse(text))
    }

    #[staticmethod]
    fn from_csv(py: Python<'_>, text: &str, name: &str) -> PyResult<Self> {
        Self::made(py, text.len(), || {
            pipeline::Schedule::from_torch_csv(text, name)
        })
    }

    fn text(&self, py: Python<'_>) -> String {
        self.detached(py, pipeline::Schedule::text)
    }

    fn to_csv(&self, py: Python<'_>, comms: bool, older: bool, waits: bool) -> PyResult<String> {
        let options = CsvOptions {
            form: if comms {
                Form::ComputeComms
            } else {
                Form::ComputeOnly
            },
            dialect: if older {
                Dialect::Older
            } else {
                Dialect::Current
            },
            waits,
        };
        self.detached(py, |schedule| schedule.to_torch_csv(options))
            .map_err(|error| schedule_error(py, &error))
    }

    fn compute_only(&self, py: Python<'_>) -> Self {
        Self(self.detached(py, pipeline::Schedule::compute_only))
    }

    fn forward_only(&self, py: Python<'_>) -> Self {
        Self(self.detached(py, pipeline::Schedule::forward_only))
    }

    fn place_transfers(&self, py: Python<'_>) -> PyResult<Self> {
        self.detached(py, place_transfers)
            .map(Self)
            .map_err(|error| schedule_error(py, &error))
    }

    /// (peaks, transports, messages), or the exception for the first rule broken.
    fn verify<'py>(
        &self,
        py: Python<'py>,
        transports: Vec<String>,
        activation_bytes: Option<Bytes<'py>>,
        message_bytes: Option<Bytes<'py>>,
        max_activations: Option<u32>,
        max_bytes: Option<u64>,
    ) -> PyResult<(PeakArrays<'py>, Vec<&'static str>, usize)> {
        let options = VerifyOptions {
            transports: transports
                .iter()
                .filter_map(|name| {
                    Transport::ALL
                        .into_iter()
                        .find(|transport| transport.name() == name)
                })
                .collect(),
            sizes: sizes(activation_bytes, message_bytes)?,
            max_activations,
            max_bytes,
        };
        let proof = self
            .detached(py, |schedule| verify(schedule, &options))
            .map_err(|error| schedule_error(py, &error))?;
        let transports = proof
            .transports
            .iter()
            .map(|transport| transport.name())
            .collect();
        Ok((
            peak_arrays(py, &proof.peaks),
            transports,
            proof.num_messages,
        ))
    }

    /// (makespan, busy, bubble ratio, peaks, (op, start, end) of every computation, bounds).
    #[expect(
        clippy::type_complexity,
        reason = "it is taken apart at once by its one caller"
    )]
    #[expect(clippy::too_many_arguments, reason = "one argument for every array")]
    fn simulate<'py>(
        &self,
        py: Python<'py>,
        times: (Numbers<'py>, Numbers<'py>, Numbers<'py>, Numbers<'py>),
        rank_factor: Numbers<'py>,
        overlap_factor: f64,
        pair: Option<Numbers<'py>>,
        latency: Numbers<'py>,
        bandwidth: Numbers<'py>,
        message_bytes: Numbers<'py>,
        blocking: bool,
        early_forward: bool,
        sizes_bytes: Option<(Bytes<'py>, Bytes<'py>)>,
    ) -> PyResult<(
        f64,
        Array<'py, f64>,
        f64,
        PeakArrays<'py>,
        (Array<'py, i64>, Array<'py, f64>, Array<'py, f64>),
        Array<'py, i64>,
    )> {
        let (forward, backward, backward_input, backward_weight) = times;
        let costs = Costs {
            forward: forward.as_slice()?.to_vec(),
            backward: backward.as_slice()?.to_vec(),
            backward_input: backward_input.as_slice()?.to_vec(),
            backward_weight: backward_weight.as_slice()?.to_vec(),
            rank_factor: rank_factor.as_slice()?.to_vec(),
            overlap_factor,
            pair: pair
                .map(|pair| pair.as_slice().map(<[f64]>::to_vec))
                .transpose()?,
            latency: links(&latency)?,
            bandwidth: links(&bandwidth)?,
            message_bytes: message_bytes.as_slice()?.to_vec(),
        };
        let (activation_bytes, output_bytes) = sizes_bytes.unzip();
        let options = SimulateOptions {
            sends: if blocking {
                Sends::Blocking
            } else {
                Sends::Asynchronous
            },
            pairs: if early_forward {
                Pairs::EarlyForward
            } else {
                Pairs::Atomic
            },
            sizes: sizes(activation_bytes, output_bytes)?,
        };
        let timeline = self
            .detached(py, |schedule| simulate(schedule, &costs, &options))
            .map_err(|error| schedule_error(py, &error))?;
        let spans = &timeline.spans;
        let ops: Vec<i64> = spans.iter().map(|span| span.op as i64).collect();
        let starts: Vec<f64> = spans.iter().map(|span| span.start).collect();
        let ends: Vec<f64> = spans.iter().map(|span| span.end).collect();
        let bounds: Vec<i64> = timeline.starts.iter().map(|&start| start as i64).collect();
        Ok((
            timeline.makespan,
            timeline.busy.into_pyarray(py),
            timeline.bubble_ratio,
            peak_arrays(py, &timeline.peaks),
            (
                ops.into_pyarray(py),
                starts.into_pyarray(py),
                ends.into_pyarray(py),
            ),
            bounds.into_pyarray(py),
        ))
    }

    #[getter]
    fn name(&self) -> &str {
        self.0.name()
    }

    #[getter]
    fn num_ranks(&self) -> usize {
        self.0.layout().num_ranks()
    }

    #[getter]
    fn num_stages(&self) -> usize {
        self.0.layout().num_stages()
    }

    #[getter]
    fn num_copies(&self) -> usize {
        self.0.layout().num_copies()
    }

    #[getter]
    fn micro_batches(&self) -> Vec<u32> {
        let layout = self.0.layout();
        (0..layout.num_copies() as u8)
            .map(|copy| layout.micro_batches(copy))
            .collect()
    }

    /// The rank of every stage, copy by copy.
    #[getter]
    fn placement(&self) -> Vec<u32> {
        self.0.layout().placement().to_vec()
    }

    #[getter]
    fn has_transfers(&self) -> bool {
        self.0.has_transfers()
    }

    #[getter]
    fn has_backward(&self) -> bool {
        self.0.has_backward()
    }

    /// Kind, copy, stage and micro-batch of every instruction, rank by rank.
    fn arrays<'py>(
        &self,
        py: Python<'py>,
    ) -> (
        Array<'py, u8>,
        Array<'py, u8>,
        Array<'py, u16>,
        Array<'py, u32>,
    ) {
        let ops = self.0.ops();
        let kinds: Vec<u8> = ops.iter().map(|op| op.kind as u8).collect();
        let copies: Vec<u8> = ops.iter().map(|op| op.copy).collect();
        let stages: Vec<u16> = ops.iter().map(|op| op.stage).collect();
        let micro_batches: Vec<u32> = ops.iter().map(|op| op.micro_batch).collect();
        (
            kinds.into_pyarray(py),
            copies.into_pyarray(py),
            stages.into_pyarray(py),
            micro_batches.into_pyarray(py),
        )
    }

    /// Where each rank's stream begins in `arrays`, and the end.
    #[getter]
    fn starts<'py>(&self, py: Python<'py>) -> Array<'py, i64> {
        let starts: Vec<i64> = self.0.starts().iter().map(|&start| start as i64).collect();
        starts.into_pyarray(py)
    }

    fn __len__(&self) -> usize {
        self.0.ops().len()
    }
}

impl Schedule {
    fn made(
        py: Python<'_>,
        work: usize,
        make: impl FnOnce() -> pipeline::Result<pipeline::Schedule> + Send,
    ) -> PyResult<Self> {
        let made = if work < DETACH_FROM {
            make()
        } else {
            py.detach(make)
        };
        made.map(Self).map_err(|error| schedule_error(py, &error))
    }

    fn detached<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&pipeline::Schedule) -> T + Send,
    ) -> T {
        if self.0.layout().num_slots() < DETACH_FROM {
            work(&self.0)
        } else {
            py.detach(|| work(&self.0))
        }
    }
}

/// Every method's name, and the words for the kinds of instructions.
#[pyfunction]
pub(crate) fn schedule_methods() -> Vec<&'static str> {
    Method::ALL.into_iter().map(Method::name).collect()
}

/// Activations, kept, receive buffers, send buffers and bytes, each per rank.
type PeakArrays<'py> = (
    Array<'py, i64>,
    Array<'py, i64>,
    Array<'py, i64>,
    Array<'py, i64>,
    Array<'py, u64>,
);

fn peak_arrays<'py>(py: Python<'py>, peaks: &[Peak]) -> PeakArrays<'py> {
    let counts = |count: fn(&Peak) -> u32| {
        let counts: Vec<i64> = peaks.iter().map(|peak| i64::from(count(peak))).collect();
        counts.into_pyarray(py)
    };
    let bytes: Vec<u64> = peaks.iter().map(|peak| peak.bytes).collect();
    (
        counts(|peak| peak.activations),
        counts(|peak| peak.kept),
        counts(|peak| peak.receive_buffers),
        counts(|peak| peak.send_buffers),
        bytes.into_pyarray(py),
    )
}

fn sizes(activation: Option<Bytes<'_>>, message: Option<Bytes<'_>>) -> PyResult<Option<Sizes>> {
    let (Some(activation), Some(message)) = (activation, message) else {
        return Ok(None);
    };
    Ok(Some(Sizes {
        activation_bytes: activation.as_slice()?.to_vec(),
        message_bytes: message.as_slice()?.to_vec(),
    }))
}

/// One figure for all links, or one for each.
pub(crate) fn links(figures: &Numbers<'_>) -> PyResult<Links> {
    Ok(match figures.as_slice()? {
        [figure] => Links::Uniform(*figure),
        figures => Links::Each(figures.to_vec()),
    })
}
