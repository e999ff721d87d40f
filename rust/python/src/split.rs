//! `Splitter`: tokens over the replicas of a placement.

use std::sync::{Mutex, MutexGuard, PoisonError};

use eplb::{Load, SharesMut, split};
use numpy::ndarray::{Ix1, Ix2};
use numpy::{Element, PyArray1, PyArray2, PyArray3, PyArrayMethods};
use pyo3::prelude::*;

use crate::arguments::{LoadArray, count, index};
use crate::buffers::{readable, values, values_mut, writable};
use crate::errors::plan_error;
use crate::placement::Placement;

/// The most slots, over all layers, that are split without letting go of the interpreter: about
/// 50 us of work.
const ATTACHED_SLOTS: usize = 8192;

/// Shares, levels, rank loads and certificates.
type Split<'py> = (
    Bound<'py, PyArray2<f64>>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray2<f64>>,
    Bound<'py, PyArray2<bool>>,
);

/// Splits loads over the replicas of one placement.
#[pyclass(frozen, module = "eplb_rs._core")]
pub(crate) struct Splitter {
    placement: Py<Placement>,
    /// One call at a time: it works in memory of its own.
    splitter: Mutex<eplb::Splitter>,
    num_layers: usize,
    num_experts: usize,
    num_slots: usize,
    num_ranks: usize,
}

#[pymethods]
impl Splitter {
    #[new]
    fn new(placement: Py<Placement>) -> Self {
        let splitter = eplb::Splitter::new(&placement.get().0);
        Self {
            placement,
            num_layers: splitter.num_layers(),
            num_experts: splitter.num_experts(),
            num_slots: splitter.num_slots(),
            num_ranks: splitter.num_ranks(),
            splitter: Mutex::new(splitter),
        }
    }

    #[getter]
    fn placement(&self, py: Python<'_>) -> Py<Placement> {
        self.placement.clone_ref(py)
    }

    /// The best split of a load, float32 `[L, E]`: shares `[L, R]`, levels `[L]`, rank loads
    /// `[L, D]` and the tight ranks `[L, D]`.
    fn split<'py>(
        &self,
        py: Python<'py>,
        load: &Bound<'py, PyArray2<f32>>,
    ) -> PyResult<Split<'py>> {
        let load = LoadArray::new(load)?;
        let (layers, slots, ranks) = (self.num_layers, self.num_slots, self.num_ranks);
        let mut shares = vec![0.0; layers * slots];
        let mut level = vec![0.0; layers];
        let mut rank_load = vec![0.0; layers * ranks];
        let mut tight = vec![false; layers * ranks];
        let mut work = |load: &Load<'_>| {
            let mut out = SharesMut {
                shares: &mut shares,
                level: &mut level,
                rank_load: Some(&mut rank_load),
                tight: Some(&mut tight),
            };
            self.lock().split(load, &mut out)
        };
        let done = if layers * slots > ATTACHED_SLOTS {
            // The array may change once others run.
            let (num_layers, num_experts) = load.shape();
            let copy = load.values()?.to_vec();
            py.detach(|| Load::new(&copy, num_layers, num_experts).and_then(|load| work(&load)))
        } else {
            work(&load.checked()?)
        };
        done.map_err(|error| plan_error(py, &error))?;
        Ok((
            PyArray1::from_vec(py, shares).reshape([layers, slots])?,
            PyArray1::from_vec(py, level),
            PyArray1::from_vec(py, rank_load).reshape([layers, ranks])?,
            PyArray1::from_vec(py, tight).reshape([layers, ranks])?,
        ))
    }

    /// The same into float64 arrays: shares `[L, R]` and levels `[L]`.
    fn split_into(
        &self,
        py: Python<'_>,
        load: &Bound<'_, PyArray2<f32>>,
        shares: &Bound<'_, PyAny>,
        level: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let load = LoadArray::new(load)?;
        let shape = [self.num_layers, self.num_slots];
        let mut shares = writable::<f64, Ix2>(shares, "shares", &shape)?;
        let mut level = writable::<f64, Ix1>(level, "level", &[self.num_layers])?;
        let mut out = SharesMut {
            shares: values_mut(py, &mut shares, "shares")?,
            level: values_mut(py, &mut level, "level")?,
            rank_load: None,
            tight: None,
        };
        let done = self.lock().split(&load.checked()?, &mut out);
        done.map_err(|error| plan_error(py, &error))
    }

    /// The best split of one layer's load, float32 `[E]`, into shares, float64 `[R]`. Returns the
    /// level.
    fn split_step(
        &self,
        load: &Bound<'_, PyArray1<f32>>,
        layer: &Bound<'_, PyAny>,
        shares: &Bound<'_, PyAny>,
    ) -> PyResult<f64> {
        let split = |splitter: &mut eplb::Splitter, layer, load: &[f32], shares: &mut [f64]| {
            splitter.split_layer(layer, &Load::new(load, 1, load.len())?, shares)
        };
        self.step((load, "load"), layer, shares, split)
    }

    /// The best split of one layer's tokens, int64 `[E]`, into whole numbers by slot, int64 `[R]`.
    /// Returns the largest number on a rank.
    fn split_tokens(
        &self,
        tokens: &Bound<'_, PyArray1<i64>>,
        layer: &Bound<'_, PyAny>,
        quotas: &Bound<'_, PyAny>,
    ) -> PyResult<i64> {
        let split = eplb::Splitter::quotas_layer;
        self.step((tokens, "tokens"), layer, quotas, split)
    }

    /// The shares of replicas that share evenly, `[L, R]`.
    fn uniform<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f64>>> {
        self.filled(py, self.num_slots, |shares| {
            self.lock().uniform_into(shares)
        })
    }

    /// What each rank carries, float64 `[L, D]`, if a load is split by given shares.
    fn rank_load<'py>(
        &self,
        py: Python<'py>,
        load: &Bound<'py, PyArray2<f32>>,
        shares: &Bound<'py, PyArray2<f64>>,
    ) -> PyResult<Bound<'py, PyArray2<f64>>> {
        let load = LoadArray::new(load)?;
        let load = load.checked()?;
        let shares = readable(shares, "shares")?;
        let shares = values(&shares, "shares")?;
        self.filled(py, self.num_ranks, |ranks| {
            self.lock().rank_load_into(&load, shares, ranks)
        })
    }

    /// Shares as repeated entries, int64 `[L, E, width]`.
    fn entries<'py>(
        &self,
        py: Python<'py>,
        shares: &Bound<'py, PyArray2<f64>>,
        width: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyArray3<i64>>> {
        let width = count(width, "width")?;
        let shares = readable(shares, "shares")?;
        let table = split::entries(&self.placement.get().0, values(&shares, "shares")?, width)
            .map_err(|error| plan_error(py, &error))?;
        PyArray1::from_vec(py, table).reshape([self.num_layers, self.num_experts, width])
    }

    /// Tokens, int64 `[L, E]`, split by given shares into whole numbers by slot, int64 `[L, R]`.
    fn quotas<'py>(
        &self,
        py: Python<'py>,
        shares: &Bound<'py, PyArray2<f64>>,
        tokens: &Bound<'py, PyArray2<i64>>,
    ) -> PyResult<Bound<'py, PyArray2<i64>>> {
        let (shares, tokens) = (readable(shares, "shares")?, readable(tokens, "tokens")?);
        let (shares, tokens) = (values(&shares, "shares")?, values(&tokens, "tokens")?);
        self.filled(py, self.num_slots, |quotas| {
            split::quotas_into(&self.placement.get().0, shares, tokens, quotas)
        })
    }
}

impl Splitter {
    /// Splits one layer of what an array holds, `[E]`, into a buffer, `[R]`.
    fn step<T: Element, U: Element, R>(
        &self,
        (array, argument): (&Bound<'_, PyArray1<T>>, &'static str),
        layer: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        split: impl FnOnce(&mut eplb::Splitter, usize, &[T], &mut [U]) -> eplb::Result<R>,
    ) -> PyResult<R> {
        let py = array.py();
        let layer = index(layer, "layer")?;
        let array = readable(array, argument)?;
        let mut out = writable::<U, Ix1>(out, "out", &[self.num_slots])?;
        let out = values_mut(py, &mut out, "out")?;
        split(&mut self.lock(), layer, values(&array, argument)?, out)
            .map_err(|error| plan_error(py, &error))
    }

    /// A new array, `[L, width]`.
    fn filled<'py, T: Element + Clone + Default>(
        &self,
        py: Python<'py>,
        width: usize,
        fill: impl FnOnce(&mut [T]) -> eplb::Result<()>,
    ) -> PyResult<Bound<'py, PyArray2<T>>> {
        let mut values = vec![T::default(); self.num_layers * width];
        fill(&mut values).map_err(|error| plan_error(py, &error))?;
        PyArray1::from_vec(py, values).reshape([self.num_layers, width])
    }

    fn lock(&self) -> MutexGuard<'_, eplb::Splitter> {
        self.splitter.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
