//! `StepPlanner`: one layer, planned from the load of this micro-batch.

use std::sync::{Mutex, PoisonError};

use eplb::realtime::Count;
use eplb::{Limits, StepMut};
use numpy::ndarray::{Ix2, Ix3};
use numpy::{Element, PyArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::arguments::count;
use crate::buffers::{readable, values, values_mut, writable};
use crate::errors::{invalid_input, plan_error};

/// Plans one layer of experts that keep their home slots.
#[pyclass(frozen, module = "eplb_rs._core")]
pub(crate) struct StepPlanner {
    /// One call at a time: it works in memory of its own.
    planner: Mutex<eplb::StepPlanner>,
    num_ranks: usize,
    num_experts: usize,
    spare_slots: usize,
}

#[pymethods]
impl StepPlanner {
    #[new]
    fn new(
        py: Python<'_>,
        num_ranks: &Bound<'_, PyAny>,
        home_slots: &Bound<'_, PyAny>,
        spare_slots: &Bound<'_, PyAny>,
        target_imbalance: f64,
        limits: (Option<usize>, Option<usize>, Option<usize>),
        min_tokens: i64,
    ) -> PyResult<Self> {
        let (max_copies, max_out, max_in) = limits;
        let limits = Limits {
            target_imbalance,
            max_copies: max_copies.unwrap_or(usize::MAX),
            max_out: max_out.unwrap_or(usize::MAX),
            max_in: max_in.unwrap_or(usize::MAX),
            min_tokens,
        };
        let planner = eplb::StepPlanner::new(
            count(num_ranks, "num_ranks")?,
            count(home_slots, "home_slots")?,
            count(spare_slots, "spare_slots")?,
            limits,
        )
        .map_err(|error| plan_error(py, &error))?;
        Ok(Self {
            num_ranks: planner.num_ranks(),
            num_experts: planner.num_experts(),
            spare_slots: planner.spare_slots(),
            planner: Mutex::new(planner),
        })
    }

    /// Plans tokens, int32 or int64, `[E]` or `[D, E]`, into arrays: experts and tokens, int64
    /// `[D, S]`, and tokens by source, `[D, S, D]` of the load's dtype, or `None`. Returns the
    /// level, all tokens and the number of copies.
    #[pyo3(signature = (load, experts, tokens, by_source=None))]
    fn plan_into(
        &self,
        load: &Bound<'_, PyAny>,
        experts: &Bound<'_, PyAny>,
        tokens: &Bound<'_, PyAny>,
        by_source: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<(i64, i64, usize)> {
        if let Ok(load) = load.cast::<PyArrayDyn<i32>>() {
            return self.plan(load, experts, tokens, by_source);
        }
        if let Ok(load) = load.cast::<PyArrayDyn<i64>>() {
            return self.plan(load, experts, tokens, by_source);
        }
        let got = load.get_type().to_string();
        Err(invalid_input(
            load.py(),
            "wrong_dtype",
            "load",
            &got,
            "an int32 or int64 array",
            "",
        ))
    }
}

impl StepPlanner {
    fn plan<T: Count + Element>(
        &self,
        load: &Bound<'_, PyArrayDyn<T>>,
        experts: &Bound<'_, PyAny>,
        tokens: &Bound<'_, PyAny>,
        by_source: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<(i64, i64, usize)> {
        let py = load.py();
        let (ranks, slots) = (self.num_ranks, self.spare_slots);
        if load.shape() != [self.num_experts] && load.shape() != [ranks, self.num_experts] {
            return Err(invalid_input(
                py,
                "wrong_shape",
                "load",
                &format!("shape {}", load.getattr("shape")?),
                &format!(
                    "of shape ({},) or ({ranks}, {})",
                    self.num_experts, self.num_experts
                ),
                "tokens of each expert, or of each source rank and expert",
            ));
        }
        let load = readable(load, "load")?;
        let mut experts = writable::<i64, Ix2>(experts, "experts", &[ranks, slots])?;
        let mut tokens = writable::<i64, Ix2>(tokens, "tokens", &[ranks, slots])?;
        let mut by_source = by_source
            .map(|array| writable::<T, Ix3>(array, "by_source", &[ranks, slots, ranks]))
            .transpose()?;
        let mut out = StepMut {
            experts: values_mut(py, &mut experts, "experts")?,
            tokens: values_mut(py, &mut tokens, "tokens")?,
            by_source: match &mut by_source {
                Some(array) => Some(values_mut(py, array, "by_source")?),
                None => None,
            },
        };
        let mut planner = self.planner.lock().unwrap_or_else(PoisonError::into_inner);
        let step = planner.plan_step(values(&load, "load")?, &mut out);
        let step = step.map_err(|error| plan_error(py, &error))?;
        Ok((step.level, step.total, step.num_copies))
    }
}
