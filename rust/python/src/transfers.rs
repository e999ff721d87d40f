//! What has to be sent for one placement to take the place of another, and within what limits.

use eplb::{Links, Transfer};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::plan_error;
use crate::placement::Placement;
use crate::topology::Topology;

/// How many numbers a transfer is to Python: layer, expert, source slot, source rank, slot, rank,
/// round; -1 stands for none.
const WIDTH: usize = 7;

/// What has to be sent for one placement to take the place of another, int64 `[T, 7]`.
#[pyfunction]
pub(crate) fn transfers<'py>(
    py: Python<'py>,
    previous: &Placement,
    following: &Placement,
    by_layer: bool,
) -> PyResult<Bound<'py, PyArray2<i64>>> {
    let list = eplb::transfers(&previous.0, &following.0, by_layer);
    let list = list.map_err(|error| plan_error(py, &error))?;
    let or_none = |value: Option<u32>| value.map_or(-1, i64::from);
    let mut table = Vec::with_capacity(list.len() * WIDTH);
    for transfer in &list {
        table.extend([
            i64::from(transfer.layer),
            i64::from(transfer.expert),
            or_none(transfer.source_slot),
            or_none(transfer.source),
            i64::from(transfer.slot),
            i64::from(transfer.target),
            or_none(transfer.round),
        ]);
    }
    PyArray1::from_vec(py, table).reshape([list.len(), WIDTH])
}

/// How long such transfers take, in seconds; `links` are the speeds within a node and between
/// nodes, in GB/s, and the latency of a round in microseconds.
#[pyfunction]
pub(crate) fn predicted_s(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    topology: &Topology,
    by_layer: bool,
    expert_bytes: PyReadonlyArray1<'_, f64>,
    links: (f64, f64, f64),
) -> PyResult<f64> {
    let list: Option<Vec<Transfer>> = table.as_slice()?.chunks_exact(WIDTH).map(listed).collect();
    let list = list.ok_or_else(|| PyValueError::new_err("no table of transfers"))?;
    let (bytes, links) = (expert_bytes.as_slice()?, links_of(links));
    let seconds = eplb::predicted_s(&list, &topology.0, by_layer, bytes, &links);
    seconds.map_err(|error| plan_error(py, &error))
}

/// A transfer as [`transfers`] lists it.
fn listed(row: &[i64]) -> Option<Transfer> {
    let &[layer, expert, source_slot, source, slot, target, round] = row else {
        return None;
    };
    let some = |value: i64| u32::try_from(value).ok();
    Some(Transfer {
        layer: some(layer)?,
        expert: some(expert)?,
        source_slot: some(source_slot),
        source: some(source),
        slot: some(slot)?,
        target: some(target)?,
        round: some(round),
    })
}

pub(crate) fn links_of((intra_node_gb_s, inter_node_gb_s, latency_us): (f64, f64, f64)) -> Links {
    Links {
        intra_node_gb_s,
        inter_node_gb_s,
        latency_us,
    }
}
