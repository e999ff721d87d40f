//! `Planner`: when to let go of the interpreter, and what that costs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use eplb::{Budget, GroupRule, Load, PlacementMut, Policy, Reach, TransferLimits};
use numpy::ndarray::{Ix2, Ix3};
use numpy::{PyArray1, PyArray2, PyArray3, PyArrayMethods};
use pyo3::prelude::*;

use crate::arguments::{LoadArray, count};
use crate::buffers::{values_mut, writable_of};
use crate::errors::{invalid_input, plan_error};
use crate::placement::Placement;
use crate::topology::Topology;
use crate::transfers::links_of;

/// The most slots, over all layers, that are planned without letting go of the interpreter:
/// about 50 us of work. Getting it back costs 0.2 us from nobody, and up to a switch interval
/// (5 ms) from a thread that computes in Python.
const ATTACHED_SLOTS: usize = 4096;
/// The same where placements are searched for, with no more steps than by default: a layer of a
/// large model takes 30 us where it is easy to even out, and up to 1 ms.
const ATTACHED_SEARCH: usize = 512;

/// The most moves, what a move costs, the balance that is enough, and whether slots may repeat an
/// expert of their rank.
type ReachTuple = (Option<usize>, f64, Option<f64>, bool);
/// Expert bytes by layer, most bytes of a rank, most seconds, links, whether each layer has rounds.
type LimitsTuple = (Vec<f64>, Option<f64>, Option<f64>, (f64, f64, f64), bool);

fn reach_of((max_moves, move_cost, min_balance, repeats): ReachTuple) -> Reach {
    Reach {
        max_moves,
        max_moves_per_layer: None,
        move_cost,
        min_balance,
        repeats,
    }
}

/// `phy2log`, `log2phy` and `logcnt`.
type Arrays<'py> = (
    Bound<'py, PyArray2<i64>>,
    Bound<'py, PyArray3<i64>>,
    Bound<'py, PyArray2<i64>>,
);

/// Plans placements on one topology.
#[pyclass(frozen, module = "eplb_rs._core")]
pub(crate) struct Planner {
    planner: eplb::Planner,
    /// Whether to let go of the interpreter; where unset, by the size of the work.
    release_gil: Option<bool>,
    /// Copies of loads, for calls that have let go: their arrays may change meanwhile.
    copies: Mutex<Vec<Vec<f32>>>,
    native_ns: AtomicU64,
    wait_ns: AtomicU64,
}

#[pymethods]
impl Planner {
    #[new]
    #[pyo3(signature = (
        topology, num_groups, policy, threads, release_gil,
        group_rule="strict", iterations=None, time_limit_us=None, crossing_cost=1.0,
    ))]
    #[expect(
        clippy::too_many_arguments,
        reason = "the settings of the Python class"
    )]
    fn new(
        py: Python<'_>,
        topology: &Topology,
        num_groups: &Bound<'_, PyAny>,
        policy: &str,
        threads: &Bound<'_, PyAny>,
        release_gil: Option<bool>,
        group_rule: &str,
        iterations: Option<u32>,
        time_limit_us: Option<f64>,
        crossing_cost: f64,
    ) -> PyResult<Self> {
        let known = Policy::from_name(policy).ok_or_else(|| {
            let names: Vec<_> = Policy::ALL.iter().map(|policy| policy.name()).collect();
            let expected = format!("one of: {}", names.join(", "));
            invalid_input(
                py,
                "unknown",
                "policy",
                &format!("{policy:?}"),
                &expected,
                "",
            )
        })?;
        let rule = GroupRule::from_name(group_rule).ok_or_else(|| {
            let names: Vec<_> = GroupRule::ALL.iter().map(|rule| rule.name()).collect();
            let expected = format!("one of: {}", names.join(", "));
            invalid_input(py, "unknown", "group_rule", group_rule, &expected, "")
        })?;
        let budget = match (iterations, time_limit_us) {
            (_, Some(us)) => Budget::Time(Duration::from_secs_f64(us / 1e6)),
            (Some(steps), None) => Budget::Iterations(steps),
            (None, None) => Budget::DEFAULT,
        };
        let planner = eplb::Planner::new(
            topology.0.clone(),
            count(num_groups, "num_groups")?,
            known,
            count(threads, "threads")?,
        )
        .and_then(|planner| planner.with_crossing_cost(crossing_cost));
        Ok(Self {
            planner: planner
                .map_err(|error| plan_error(py, &error))?
                .with_group_rule(rule)
                .with_budget(budget),
            release_gil,
            copies: Mutex::default(),
            native_ns: AtomicU64::new(0),
            wait_ns: AtomicU64::new(0),
        })
    }

    #[getter]
    fn topology(&self) -> Topology {
        Topology(self.planner.topology().clone())
    }

    #[getter]
    fn num_groups(&self) -> usize {
        self.planner.num_groups()
    }

    #[getter]
    fn policy(&self) -> &'static str {
        self.planner.policy().name()
    }

    #[getter]
    fn group_rule(&self) -> &'static str {
        self.planner.group_rule().name()
    }

    #[getter]
    fn crossing_cost(&self) -> f64 {
        self.planner.crossing_cost()
    }

    #[getter]
    fn iterations(&self) -> Option<u32> {
        match self.planner.budget() {
            Budget::Iterations(steps) => Some(steps),
            _ => None,
        }
    }

    #[getter]
    fn time_limit_us(&self) -> Option<f64> {
        match self.planner.budget() {
            Budget::Time(time) => Some(time.as_secs_f64() * 1e6),
            _ => None,
        }
    }

    #[getter]
    fn threads(&self) -> usize {
        self.planner.num_threads()
    }

    #[getter]
    fn release_gil(&self) -> Option<bool> {
        self.release_gil
    }

    #[getter]
    fn keeps_groups(&self) -> bool {
        self.planner.keeps_groups()
    }

    /// Of the call that ended last: microseconds of native work, and microseconds of waiting to
    /// get the interpreter back.
    #[getter]
    fn last_timing(&self) -> (f64, f64) {
        let us = |ns: &AtomicU64| ns.load(Ordering::Relaxed) as f64 / 1e3;
        (us(&self.native_ns), us(&self.wait_ns))
    }

    /// Plans a load, float32 `[num_layers, num_experts]`, C-contiguous.
    fn plan(&self, py: Python<'_>, load: &Bound<'_, PyArray2<f32>>) -> PyResult<Placement> {
        let load = LoadArray::new(load)?;
        self.run(py, &load, |load| self.planner.plan(load))
            .map(Placement)
    }

    /// Plans the best placement within reach of another.
    fn plan_from(
        &self,
        py: Python<'_>,
        load: &Bound<'_, PyArray2<f32>>,
        previous: &Placement,
        reach: ReachTuple,
    ) -> PyResult<Placement> {
        let load = LoadArray::new(load)?;
        let reach = reach_of(reach);
        let plan = |load: &Load<'_>| self.planner.plan_from(load, &previous.0, &reach);
        self.run(py, &load, plan).map(Placement)
    }

    /// The same within limits on what has to be sent: the bytes of an expert of each layer, the most
    /// that a rank sends or receives, the longest that the rounds take and over what links, and
    /// whether each layer has its own.
    fn plan_within(
        &self,
        py: Python<'_>,
        load: &Bound<'_, PyArray2<f32>>,
        previous: &Placement,
        reach: ReachTuple,
        limits: LimitsTuple,
    ) -> PyResult<Placement> {
        let load = LoadArray::new(load)?;
        let reach = reach_of(reach);
        let (expert_bytes, max_bytes_per_rank, max_seconds, links, by_layer) = limits;
        let limits = TransferLimits {
            expert_bytes: &expert_bytes,
            max_bytes_per_rank,
            max_seconds: max_seconds.map(|seconds| (seconds, links_of(links))),
            by_layer,
        };
        let plan = |load: &Load<'_>| {
            let planner = &self.planner;
            planner.plan_within(load, &previous.0, &reach, &limits)
        };
        self.run(py, &load, plan).map(Placement)
    }

    /// Moves and balance along the frontier from another placement.
    fn frontier(
        &self,
        py: Python<'_>,
        load: &Bound<'_, PyArray2<f32>>,
        previous: &Placement,
        repeats: bool,
    ) -> PyResult<Vec<(usize, f64)>> {
        let load = LoadArray::new(load)?;
        let frontier = |load: &Load<'_>| self.planner.frontier(load, &previous.0, repeats);
        let milestones = self.run(py, &load, frontier)?;
        Ok(milestones
            .into_iter()
            .map(|stone| (stone.moves, stone.balance))
            .collect())
    }

    /// Plans a load and hands out `phy2log`, `log2phy` and `logcnt` as arrays of their own.
    fn plan_arrays<'py>(
        &self,
        py: Python<'py>,
        load: &Bound<'py, PyArray2<f32>>,
    ) -> PyResult<Arrays<'py>> {
        let placement = self.plan(py, load)?.0;
        let (layers, experts) = (placement.num_layers(), placement.num_experts());
        let slots = placement.topology().num_slots();
        let width = placement.max_replicas();
        let (phy2log, log2phy, logcnt) = placement.into_parts();
        Ok((
            PyArray1::from_vec(py, phy2log).reshape([layers, slots])?,
            PyArray1::from_vec(py, log2phy).reshape([layers, experts, width])?,
            PyArray1::from_vec(py, logcnt).reshape([layers, experts])?,
        ))
    }

    /// Plans a load into int64 arrays: `phy2log` `[L, R]`, `log2phy` `[L, E, width]` or `None`,
    /// `logcnt` `[L, E]`.
    fn plan_into(
        &self,
        py: Python<'_>,
        load: &Bound<'_, PyArray2<f32>>,
        phy2log: &Bound<'_, PyAny>,
        log2phy: Option<&Bound<'_, PyAny>>,
        logcnt: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let load = LoadArray::new(load)?;
        let (layers, experts) = load.shape();
        let slots = self.planner.topology().num_slots();
        let makes = "Planner.allocate makes buffers that fit";
        let [layers, slots, experts] = [layers, slots, experts].map(Some);
        let mut phy2log = writable_of::<i64, Ix2>(phy2log, "phy2log", &[layers, slots], makes)?;
        let mut logcnt = writable_of::<i64, Ix2>(logcnt, "logcnt", &[layers, experts], makes)?;
        let shape = [layers, experts, None];
        let mut log2phy = log2phy
            .map(|log2phy| writable_of::<i64, Ix3>(log2phy, "log2phy", &shape, makes))
            .transpose()?;
        let mut out = PlacementMut {
            phy2log: values_mut(py, &mut phy2log, "phy2log")?,
            log2phy: match &mut log2phy {
                Some(log2phy) => Some(values_mut(py, log2phy, "log2phy")?),
                None => None,
            },
            logcnt: values_mut(py, &mut logcnt, "logcnt")?,
        };
        let draft = self.run(py, &load, |load| self.planner.draft(load))?;
        // Attached: nobody may see the buffers half written.
        let start = Instant::now();
        let written = draft.write_into(&mut out);
        self.native_ns
            .fetch_add(nanoseconds(start.elapsed()), Ordering::Relaxed);
        written.map_err(|error| plan_error(py, &error))
    }
}

impl Planner {
    /// The planner itself.
    pub(crate) fn inner(&self) -> &eplb::Planner {
        &self.planner
    }

    /// Runs `work` on a load, with or without the interpreter, and keeps the time.
    fn run<T: Send>(
        &self,
        py: Python<'_>,
        load: &LoadArray<'_>,
        work: impl FnOnce(&Load<'_>) -> eplb::Result<T> + Send,
    ) -> PyResult<T> {
        let start = Instant::now();
        let (num_layers, num_experts) = load.shape();
        let slots = num_layers.saturating_mul(self.planner.topology().num_slots());
        let (result, end) = if self.release_gil.unwrap_or(slots > self.most_attached()) {
            let mut copy = self.copies().pop().unwrap_or_default();
            copy.clear();
            copy.extend_from_slice(load.values()?);
            let done = py.detach(|| {
                let load = Load::new(&copy, num_layers, num_experts);
                (load.and_then(|load| work(&load)), Instant::now())
            });
            self.copies().push(copy);
            done
        } else {
            let load = Load::new(load.values()?, num_layers, num_experts);
            (load.and_then(|load| work(&load)), Instant::now())
        };
        let native = nanoseconds(end - start);
        self.native_ns.store(native, Ordering::Relaxed);
        self.wait_ns
            .store(nanoseconds(end.elapsed()), Ordering::Relaxed);
        result.map_err(|error| plan_error(py, &error))
    }

    /// The most slots that are planned without letting go of the interpreter.
    fn most_attached(&self) -> usize {
        let planner = &self.planner;
        let Budget::Iterations(default) = Budget::DEFAULT else {
            return 0;
        };
        match (planner.policy(), planner.budget()) {
            (Policy::DeepSeek | Policy::Trivial, _) => ATTACHED_SLOTS,
            _ if planner.group_rule() == GroupRule::Priced => 0,
            (_, Budget::Iterations(steps)) if steps <= default => ATTACHED_SEARCH,
            _ => 0,
        }
    }

    fn copies(&self) -> MutexGuard<'_, Vec<Vec<f32>>> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Refuses a number of groups that experts do not divide into.
#[pyfunction]
pub(crate) fn check_groups(
    py: Python<'_>,
    num_groups: &Bound<'_, PyAny>,
    num_experts: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let num_groups = count(num_groups, "num_groups")?;
    let num_experts = count(num_experts, "num_experts")?;
    eplb::planner::check_groups(num_groups, num_experts).map_err(|error| plan_error(py, &error))
}
