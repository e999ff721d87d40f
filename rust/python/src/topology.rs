//! `Topology`.

use std::hash::{DefaultHasher, Hash, Hasher};

use pyo3::prelude::*;

use crate::arguments::count;
use crate::errors::plan_error;

/// The machines: nodes, the GPUs in them, and the expert slots on each GPU.
///
/// Each GPU is one rank of expert parallelism. Ranks are numbered node by node, slots rank by
/// rank.
///
/// Raises:
///     InvalidInputError: ``not_positive``, ``not_integer`` or ``too_large`` for a count.
#[pyclass(frozen, eq, module = "eplb_rs")]
#[derive(PartialEq, Eq, Hash)]
pub(crate) struct Topology(pub(crate) eplb::Topology);

#[pymethods]
impl Topology {
    #[new]
    fn new(
        py: Python<'_>,
        num_nodes: &Bound<'_, PyAny>,
        gpus_per_node: &Bound<'_, PyAny>,
        slots_per_gpu: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let topology = eplb::Topology::new(
            count(num_nodes, "num_nodes")?,
            count(gpus_per_node, "gpus_per_node")?,
            count(slots_per_gpu, "slots_per_gpu")?,
        );
        topology.map(Self).map_err(|error| plan_error(py, &error))
    }

    /// The topology with these totals, as :func:`eplb_rs.rebalance_experts` takes them.
    ///
    /// Raises:
    ///     InvalidInputError: As the constructor; ``not_multiple`` if ``num_gpus`` does not divide
    ///         over the nodes or ``num_replicas`` over the GPUs.
    #[staticmethod]
    #[pyo3(signature = (*, num_replicas, num_nodes, num_gpus))]
    fn from_totals(
        py: Python<'_>,
        num_replicas: &Bound<'_, PyAny>,
        num_nodes: &Bound<'_, PyAny>,
        num_gpus: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let topology = eplb::Topology::from_totals(
            count(num_replicas, "num_replicas")?,
            count(num_nodes, "num_nodes")?,
            count(num_gpus, "num_gpus")?,
        );
        topology.map(Self).map_err(|error| plan_error(py, &error))
    }

    /// How many nodes there are.
    #[getter]
    fn num_nodes(&self) -> usize {
        self.0.num_nodes()
    }

    /// How many GPUs each node has.
    #[getter]
    fn gpus_per_node(&self) -> usize {
        self.0.gpus_per_node()
    }

    /// How many expert slots each GPU has.
    #[getter]
    fn slots_per_gpu(&self) -> usize {
        self.0.slots_per_gpu()
    }

    /// How many GPUs there are, over all nodes.
    #[getter]
    fn num_gpus(&self) -> usize {
        self.0.num_gpus()
    }

    /// How many slots there are, over all GPUs.
    #[getter]
    fn num_slots(&self) -> usize {
        self.0.num_slots()
    }

    fn __repr__(&self) -> String {
        format!(
            "Topology(num_nodes={}, gpus_per_node={}, slots_per_gpu={})",
            self.0.num_nodes(),
            self.0.gpus_per_node(),
            self.0.slots_per_gpu()
        )
    }

    fn __hash__(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }

    fn __getnewargs__(&self) -> (usize, usize, usize) {
        (
            self.0.num_nodes(),
            self.0.gpus_per_node(),
            self.0.slots_per_gpu(),
        )
    }
}
