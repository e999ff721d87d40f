//! `Forecaster`: the load of the next window.

use std::sync::{Mutex, MutexGuard, PoisonError};

use eplb::forecast::{self, Estimator};
use numpy::ndarray::Ix2;
use numpy::{PyArray1, PyArray2};
use pyo3::prelude::*;

use crate::arguments::{LoadArray, count};
use crate::buffers::{values_mut, writable};
use crate::errors::{invalid_input, plan_error};

/// Estimates the next window's load from those it has been fed.
#[pyclass(frozen, module = "eplb_rs._core")]
pub(crate) struct Forecaster {
    /// One call at a time.
    forecaster: Mutex<eplb::Forecaster>,
    shape: [usize; 2],
}

#[pymethods]
impl Forecaster {
    #[new]
    #[pyo3(signature = (num_layers, num_experts, estimator, windows, shift_threshold))]
    fn new(
        py: Python<'_>,
        num_layers: &Bound<'_, PyAny>,
        num_experts: &Bound<'_, PyAny>,
        estimator: &str,
        windows: usize,
        shift_threshold: Option<f64>,
    ) -> PyResult<Self> {
        let shape = [
            count(num_layers, "num_layers")?,
            count(num_experts, "num_experts")?,
        ];
        let estimator = named(py, estimator, windows)?;
        let forecaster = eplb::Forecaster::new(shape[0], shape[1], estimator, shift_threshold)
            .map_err(|error| plan_error(py, &error))?;
        Ok(Self {
            forecaster: Mutex::new(forecaster),
            shape,
        })
    }

    /// Feeds a window, float32 `[L, E]`; whether the domain shifted with it.
    fn observe(&self, py: Python<'_>, window: &Bound<'_, PyArray2<f32>>) -> PyResult<bool> {
        let window = LoadArray::new(window)?;
        let shifted = self.lock().observe(&window.checked()?);
        shifted.map_err(|error| plan_error(py, &error))
    }

    /// The estimate of the next window, float32 `[L, E]`.
    fn estimate_into(&self, py: Python<'_>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut out = writable::<f32, Ix2>(out, "out", &self.shape)?;
        let out = values_mut(py, &mut out, "out")?;
        let forecaster = self.lock();
        let estimate = forecaster
            .estimate()
            .map_err(|error| plan_error(py, &error))?;
        out.copy_from_slice(estimate);
        Ok(())
    }

    /// The standard deviation of its error, float32 `[L, E]`.
    fn uncertainty_into(&self, py: Python<'_>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut out = writable::<f32, Ix2>(out, "out", &self.shape)?;
        let out = values_mut(py, &mut out, "out")?;
        let done = self.lock().uncertainty_into(out);
        done.map_err(|error| plan_error(py, &error))
    }

    #[getter]
    fn num_windows(&self) -> usize {
        self.lock().num_windows()
    }

    #[getter]
    fn windows_since_shift(&self) -> usize {
        self.lock().windows_since_shift()
    }

    /// Float64 `[L]`: how far the last window was from the mean of those before it.
    #[getter]
    fn distance<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f64>> {
        PyArray1::from_slice(py, self.lock().distance())
    }

    /// The estimator of each layer, and its windows; 0 for those without.
    #[getter]
    fn chosen(&self) -> Vec<(&'static str, usize)> {
        let forecaster = self.lock();
        let chosen = forecaster.chosen();
        chosen
            .map(|one| (name(one), one.windows().unwrap_or(0)))
            .collect()
    }
}

impl Forecaster {
    fn lock(&self) -> MutexGuard<'_, eplb::Forecaster> {
        self.forecaster
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The total variation of two loads, float32 `[L, E]`, by layer: float64 `[L]`.
#[pyfunction]
pub(crate) fn total_variation<'py>(
    py: Python<'py>,
    load: &Bound<'py, PyArray2<f32>>,
    other: &Bound<'py, PyArray2<f32>>,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let (load, other) = (LoadArray::new(load)?, LoadArray::new(other)?);
    let apart = forecast::total_variation(&load.checked()?, &other.checked()?);
    Ok(PyArray1::from_vec(
        py,
        apart.map_err(|error| plan_error(py, &error))?,
    ))
}

fn named(py: Python<'_>, name: &str, windows: usize) -> PyResult<Estimator> {
    Ok(match name {
        "last" => Estimator::Last,
        "average" => Estimator::Average { windows },
        "mean" => Estimator::Mean,
        "exponential" => Estimator::Exponential { windows },
        "trend" => Estimator::Trend { windows },
        "shrinkage" => Estimator::Shrinkage,
        "backtest" => Estimator::Backtest,
        _ => {
            return Err(invalid_input(
                py,
                "unknown",
                "estimator",
                &format!("{name:?}"),
                "last, average, mean, exponential, trend, shrinkage or backtest",
                "",
            ));
        }
    })
}

fn name(estimator: Estimator) -> &'static str {
    match estimator {
        Estimator::Last => "last",
        Estimator::Average { .. } => "average",
        Estimator::Mean => "mean",
        Estimator::Exponential { .. } => "exponential",
        Estimator::Trend { .. } => "trend",
        Estimator::Shrinkage => "shrinkage",
        _ => "backtest",
    }
}
