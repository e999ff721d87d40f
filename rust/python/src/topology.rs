//! `Topology`.

use std::hash::{DefaultHasher, Hash, Hasher};

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arguments::{count, index, listed, number};
use crate::errors::plan_error;

/// The machines: nodes, the GPUs in them, and the expert slots on each GPU.
///
/// Each GPU is one rank of expert parallelism. Ranks are numbered node by node, slots rank by
/// rank.
///
/// Raises:
///     InvalidInputError: ``not_positive``, ``not_integer`` or ``too_large`` for a count; for
///         ``slots``, ``speeds`` and ``dead`` as :meth:`with_slots`, :meth:`with_speeds` and
///         :meth:`with_dead`.
#[pyclass(frozen, eq, module = "eplb_rs")]
#[derive(PartialEq, Eq, Hash)]
pub(crate) struct Topology(pub(crate) eplb::Topology);

#[pymethods]
impl Topology {
    #[new]
    #[pyo3(signature = (num_nodes, gpus_per_node, slots_per_gpu, *, slots=None, speeds=None, dead=None))]
    fn new(
        py: Python<'_>,
        num_nodes: &Bound<'_, PyAny>,
        gpus_per_node: &Bound<'_, PyAny>,
        slots_per_gpu: &Bound<'_, PyAny>,
        slots: Option<&Bound<'_, PyAny>>,
        speeds: Option<&Bound<'_, PyAny>>,
        dead: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let topology = eplb::Topology::new(
            count(num_nodes, "num_nodes")?,
            count(gpus_per_node, "gpus_per_node")?,
            count(slots_per_gpu, "slots_per_gpu")?,
        );
        let mut topology = topology.map(Self).map_err(|error| plan_error(py, &error))?;
        if let Some(slots) = slots {
            topology = topology.with_slots(py, slots)?;
        }
        if let Some(speeds) = speeds {
            topology = topology.with_speeds(py, speeds)?;
        }
        if let Some(dead) = dead {
            topology = topology.with_dead(py, dead)?;
        }
        Ok(topology)
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

    /// The same machines with ``slots[gpu]`` expert slots on each GPU.
    ///
    /// Raises:
    ///     InvalidInputError: ``wrong_shape`` unless there is one number for each GPU,
    ///         ``not_integer``, ``not_positive`` or ``too_large`` for a number, ``wrong_type`` for
    ///         what is no list.
    fn with_slots(&self, py: Python<'_>, slots: &Bound<'_, PyAny>) -> PyResult<Self> {
        let expected = "a whole number for each GPU";
        let slots = listed(slots, "slots", expected, |one| count(one, "slots"))?;
        let topology = self.0.with_slots(&slots);
        topology.map(Self).map_err(|error| plan_error(py, &error))
    }

    /// The same machines with GPUs of these speeds: how much load each serves in the same time, in
    /// any unit.
    ///
    /// Raises:
    ///     InvalidInputError: ``wrong_shape`` unless there is one number for each GPU,
    ///         ``out_of_range`` for one that is not above zero, or if one is more than 1,000 times
    ///         another; ``wrong_type`` for what is no list of numbers.
    fn with_speeds(&self, py: Python<'_>, speeds: &Bound<'_, PyAny>) -> PyResult<Self> {
        let expected = "a number for each GPU";
        let speeds = listed(speeds, "speeds", expected, |one| number(one, "speeds"))?;
        let topology = self.0.with_speeds(&speeds);
        topology.map(Self).map_err(|error| plan_error(py, &error))
    }

    /// The same machines when these GPUs, and no others, are dead. Their slots keep their numbers
    /// and hold -1. If more have died, ``topology.with_dead([*topology.dead, 7])``.
    ///
    /// Raises:
    ///     InvalidInputError: ``out_of_range`` for a GPU that does not exist, ``too_small`` if none
    ///         is left; ``not_integer`` or ``negative`` for what is no number of a GPU,
    ///         ``wrong_type`` for what is no list.
    fn with_dead(&self, py: Python<'_>, dead: &Bound<'_, PyAny>) -> PyResult<Self> {
        let expected = "the numbers of the GPUs that are dead";
        let dead = listed(dead, "dead", expected, |one| index(one, "dead"))?;
        let topology = self.0.with_dead(&dead);
        topology.map(Self).map_err(|error| plan_error(py, &error))
    }

    /// How many slots each GPU has, by GPU.
    #[getter]
    fn slots(&self) -> Vec<usize> {
        (0..self.0.num_gpus())
            .map(|gpu| self.0.slots_of(gpu).len())
            .collect()
    }

    /// How fast each GPU is, by GPU.
    #[getter]
    fn speeds(&self) -> Vec<f64> {
        (0..self.0.num_gpus())
            .map(|gpu| self.0.speed(gpu))
            .collect()
    }

    /// The GPUs that are dead.
    #[getter]
    fn dead(&self) -> Vec<usize> {
        (0..self.0.num_gpus())
            .filter(|&gpu| self.0.is_dead(gpu))
            .collect()
    }

    /// Whether all GPUs have the same number of slots and the same speed, and none is dead.
    #[getter]
    fn is_even(&self) -> bool {
        self.0.is_even()
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
        let mut text = format!(
            "Topology(num_nodes={}, gpus_per_node={}, slots_per_gpu={}",
            self.0.num_nodes(),
            self.0.gpus_per_node(),
            self.0.slots_per_gpu()
        );
        if self
            .slots()
            .iter()
            .any(|&slots| slots != self.0.slots_per_gpu())
        {
            text += &format!(", slots={:?}", self.slots());
        }
        if self.speeds().iter().any(|&speed| speed != 1.0) {
            text += &format!(", speeds={:?}", self.speeds());
        }
        if !self.dead().is_empty() {
            text += &format!(", dead={:?}", self.dead());
        }
        text + ")"
    }

    fn __hash__(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }

    fn __getnewargs_ex__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<((usize, usize, usize), Bound<'py, PyDict>)> {
        let totals = (
            self.0.num_nodes(),
            self.0.gpus_per_node(),
            self.0.slots_per_gpu(),
        );
        let differences = PyDict::new(py);
        if !self.0.is_even() {
            differences.set_item("slots", self.slots())?;
            differences.set_item("speeds", self.speeds())?;
            differences.set_item("dead", self.dead())?;
        }
        Ok((totals, differences))
    }
}
