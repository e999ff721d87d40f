//! Plans for several scenarios, and scenarios from windows.

use eplb::Load;
use eplb::scenario::{Aim, Outlook, Scenarios, Split};
use numpy::{
    PyArray1, PyArray2, PyArray3, PyArrayMethods, PyReadonlyArray3, PyUntypedArrayMethods, ndarray,
};
use pyo3::prelude::*;

use crate::arguments::LoadArray;
use crate::buffers::{readable, values};
use crate::errors::{invalid_input, plan_error};
use crate::placement::Placement;
use crate::planner::Planner;

/// Loads `[K, L, E]` that may change once others run, copied.
struct Loads {
    values: Vec<f32>,
    shape: [usize; 3],
}

impl Loads {
    fn new(array: &Bound<'_, PyArray3<f32>>, argument: &'static str) -> PyResult<Self> {
        let array: PyReadonlyArray3<'_, f32> = readable(array, argument)?;
        let mut shape = [0; 3];
        shape.copy_from_slice(array.shape());
        let values = values::<_, ndarray::Ix3>(&array, argument)?.to_vec();
        Ok(Self { values, shape })
    }

    fn checked(&self) -> eplb::Result<Scenarios<'_>> {
        let [scenarios, layers, experts] = self.shape;
        Scenarios::new(&self.values, scenarios, layers, experts)
    }
}

/// Plans a placement for a load, float32 `[L, E]`, whose replicas link ranks.
#[pyfunction]
pub(crate) fn plan_linked(
    py: Python<'_>,
    planner: &Planner,
    load: &Bound<'_, PyArray2<f32>>,
    slack: f64,
    spread: f64,
) -> PyResult<Placement> {
    let load = LoadArray::new(load)?;
    let (num_layers, num_experts) = load.shape();
    let copy = load.values()?.to_vec();
    let planner = planner.inner();
    let plan = || planner.plan_linked(&Load::new(&copy, num_layers, num_experts)?, slack, spread);
    py.detach(plan)
        .map(Placement)
        .map_err(|error| plan_error(py, &error))
}

/// Plans a placement for several loads, float32 `[K, L, E]`, at once.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "what Python names")]
pub(crate) fn plan_scenarios(
    py: Python<'_>,
    planner: &Planner,
    scenarios: &Bound<'_, PyArray3<f32>>,
    weights: Option<Vec<f64>>,
    split: &str,
    previous: Option<&Placement>,
    max_moves: Option<usize>,
    max_moves_per_layer: Option<usize>,
) -> PyResult<Placement> {
    let loads = Loads::new(scenarios, "scenarios")?;
    let known = Split::from_name(split).ok_or_else(|| {
        let names: Vec<_> = Split::ALL.iter().map(|split| split.name()).collect();
        let expected = format!("one of: {}", names.join(", "));
        invalid_input(py, "unknown", "split", &format!("{split:?}"), &expected, "")
    })?;
    let aim = Aim {
        split: known,
        weights: weights.as_deref(),
        previous: previous.map(|previous| &previous.0),
        max_moves,
        max_moves_per_layer,
    };
    let planner = planner.inner();
    py.detach(|| planner.plan_scenarios(&loads.checked()?, &aim))
        .map(Placement)
        .map_err(|error| plan_error(py, &error))
}

/// Scenarios, float32 `[K, L, E]`, of windows, float32 `[T, L, E]`.
#[pyfunction]
pub(crate) fn outlook_scenarios<'py>(
    py: Python<'py>,
    windows: &Bound<'py, PyArray3<f32>>,
    shift_threshold: Option<f64>,
    most_windows: usize,
    copies: usize,
    spread: f64,
) -> PyResult<Bound<'py, PyArray3<f32>>> {
    let loads = Loads::new(windows, "windows")?;
    let outlook = Outlook {
        shift_threshold,
        most_windows,
        copies,
        spread,
    };
    let [_, layers, experts] = loads.shape;
    let scenarios = py
        .detach(|| outlook.scenarios(&loads.checked()?))
        .map_err(|error| plan_error(py, &error))?;
    let count = scenarios.len() / (layers * experts);
    PyArray1::from_vec(py, scenarios).reshape([count, layers, experts])
}

/// The first of some windows, float32 `[T, L, E]`, after the last shift.
#[pyfunction]
pub(crate) fn windows_since_shift(
    py: Python<'_>,
    windows: &Bound<'_, PyArray3<f32>>,
    shift_threshold: Option<f64>,
) -> PyResult<usize> {
    let loads = Loads::new(windows, "windows")?;
    let outlook = Outlook {
        shift_threshold,
        ..Outlook::default()
    };
    let since = loads
        .checked()
        .and_then(|windows| outlook.since_shift(&windows));
    since.map_err(|error| plan_error(py, &error))
}
