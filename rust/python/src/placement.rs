//! `Placement`, and what is asked of one.

use numpy::ndarray::{ArrayView, Dim, Dimension, IntoDimension};
use numpy::{PyArray, PyArray1, PyArray2, PyArray3, PyArrayMethods};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::arguments::{LoadArray, borrowed, count, flat};
use crate::errors::plan_error;
use crate::topology::Topology;

/// Which expert each slot holds. Its arrays are views of its own memory and cannot be written.
#[pyclass(frozen, eq, module = "eplb_rs._core")]
#[derive(PartialEq)]
pub(crate) struct Placement(pub(crate) eplb::Placement);

#[pymethods]
impl Placement {
    /// Takes flattened arrays and checks that they are a placement. Without `log2phy` and
    /// `logcnt`, replicas are numbered by slot.
    #[new]
    #[pyo3(signature = (topology, num_experts, phy2log, log2phy=None, logcnt=None))]
    fn new(
        py: Python<'_>,
        topology: &Topology,
        num_experts: &Bound<'_, PyAny>,
        phy2log: &Bound<'_, PyArray1<i64>>,
        log2phy: Option<&Bound<'_, PyArray1<i64>>>,
        logcnt: Option<&Bound<'_, PyArray1<i64>>>,
    ) -> PyResult<Self> {
        let num_experts = count(num_experts, "num_experts")?;
        let topology = topology.0.clone();
        let values =
            |array, argument| Ok::<_, PyErr>(flat(&borrowed(array, argument)?, argument)?.to_vec());
        let phy2log = values(phy2log, "phy2log")?;
        let placement = match (log2phy, logcnt) {
            (Some(log2phy), Some(logcnt)) => eplb::Placement::new(
                topology,
                num_experts,
                phy2log,
                values(log2phy, "log2phy")?,
                values(logcnt, "logcnt")?,
            ),
            _ => eplb::Placement::from_phy2log(topology, num_experts, phy2log),
        };
        placement.map(Self).map_err(|error| plan_error(py, &error))
    }

    #[getter]
    fn topology(&self) -> Topology {
        Topology(self.0.topology().clone())
    }

    #[getter]
    fn num_layers(&self) -> usize {
        self.0.num_layers()
    }

    #[getter]
    fn num_experts(&self) -> usize {
        self.0.num_experts()
    }

    #[getter]
    fn max_replicas(&self) -> usize {
        self.0.max_replicas()
    }

    #[getter]
    fn phy2log<'py>(this: Bound<'py, Self>) -> PyResult<Bound<'py, PyArray2<i64>>> {
        let placement = &this.get().0;
        let shape = [placement.num_layers(), placement.topology().num_slots()];
        view(&this, shape, placement.phy2log())
    }

    #[getter]
    fn log2phy<'py>(this: Bound<'py, Self>) -> PyResult<Bound<'py, PyArray3<i64>>> {
        let placement = &this.get().0;
        let shape = [
            placement.num_layers(),
            placement.num_experts(),
            placement.max_replicas(),
        ];
        view(&this, shape, placement.log2phy())
    }

    #[getter]
    fn logcnt<'py>(this: Bound<'py, Self>) -> PyResult<Bound<'py, PyArray2<i64>>> {
        let placement = &this.get().0;
        let shape = [placement.num_layers(), placement.num_experts()];
        view(&this, shape, placement.logcnt())
    }

    /// The load of each rank, float64 `[num_layers, num_gpus]`, tokens split evenly over replicas.
    fn rank_load<'py>(
        &self,
        py: Python<'py>,
        load: &Bound<'py, PyArray2<f32>>,
    ) -> PyResult<Bound<'py, PyArray2<f64>>> {
        let load = LoadArray::new(load)?;
        let ranks = self.0.rank_load(&load.checked()?);
        let ranks = ranks.map_err(|error| plan_error(py, &error))?;
        PyArray1::from_vec(py, ranks).reshape([self.num_layers(), self.0.topology().num_gpus()])
    }

    /// How many slots repeat an expert of their rank, int64 `[num_layers]`.
    fn duplicates<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        let duplicates: Vec<i64> = self.0.duplicates().iter().map(|&n| n as i64).collect();
        PyArray1::from_vec(py, duplicates)
    }
}

/// A read-only array over memory that `owner` holds, and keeps as it is while it lives.
fn view<'py, const N: usize>(
    owner: &Bound<'py, Placement>,
    shape: [usize; N],
    values: &[i64],
) -> PyResult<Bound<'py, PyArray<i64, Dim<[usize; N]>>>>
where
    [usize; N]: IntoDimension<Dim = Dim<[usize; N]>>,
    Dim<[usize; N]>: Dimension,
{
    let values = ArrayView::from_shape(shape, values)
        .map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
    // SAFETY: the array holds a reference to `owner`, whose vectors `values` borrows from. The
    // class is frozen and no method changes or moves them, and the array is made read-only
    // before anyone else sees it, so nobody writes to them.
    let array = unsafe { PyArray::borrow_from_array(&values, owner.clone().into_any()) };
    drop(array.try_readwrite()?.make_nonwriteable());
    Ok(array)
}

/// Lower bounds on the largest rank load of each layer, float64 `[num_layers, 4]`, for any placement
/// on these machines: by the mean, the least largest share, ranks that differ, groups that stay.
#[pyfunction]
pub(crate) fn bounds<'py>(
    py: Python<'py>,
    load: &Bound<'py, PyArray2<f32>>,
    topology: &Topology,
    num_groups: usize,
) -> PyResult<Bound<'py, PyArray2<f64>>> {
    let load = LoadArray::new(load)?;
    let bounds = eplb::bounds(&load.checked()?, &topology.0, num_groups);
    let bounds = bounds.map_err(|error| plan_error(py, &error))?;
    let values = bounds
        .iter()
        .flat_map(|bound| [bound.mean, bound.share, bound.ranks, bound.groups]);
    PyArray1::from_iter(py, values).reshape([bounds.len(), 4])
}

/// A tighter bound, which costs more; `upper` is what a placement reaches in each layer.
#[pyfunction]
pub(crate) fn tight_lower_bound<'py>(
    py: Python<'py>,
    load: &Bound<'py, PyArray2<f32>>,
    topology: &Topology,
    num_groups: usize,
    upper: Vec<f64>,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let load = LoadArray::new(load)?;
    let bound = eplb::tight_lower_bound(&load.checked()?, &topology.0, num_groups, &upper);
    let bound = bound.map_err(|error| plan_error(py, &error))?;
    Ok(PyArray1::from_vec(py, bound))
}
