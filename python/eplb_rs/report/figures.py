"""What is measured of a plan.

Letters: L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from eplb_rs._core import Topology
    from eplb_rs.plan import Plan

__all__ = [
    "above_bound",
    "bound_imbalance",
    "groups_stay",
    "layer_figures",
    "topology_figures",
    "totals",
]


def topology_figures(topology: Topology) -> dict[str, int]:
    """The machines, where GPUs are alike."""
    return {
        "num_nodes": topology.num_nodes,
        "gpus_per_node": topology.gpus_per_node,
        "slots_per_gpu": topology.slots_per_gpu,
    }


def totals(plan: Plan) -> dict[str, Any]:
    """A plan, over all layers."""
    worst = int(np.argmax(plan.layer_imbalance))
    return {
        "balance": plan.balance,
        "imbalance": plan.imbalance,
        "worst_layer": plan.layer_ids[worst],
        "worst_layer_imbalance": float(plan.layer_imbalance[worst]),
        "largest_rank_load": float(plan.rank_load.max(axis=1).sum()),
        "duplicates": plan.duplicates,
    }


def above_bound(plan: Plan) -> float:
    """By how much the largest rank loads exceed their bound; 0.01 is one per cent."""
    bound = float(plan.lower_bound.sum())
    return float(plan.rank_load.max(axis=1).sum()) / bound - 1.0 if bound > 0 else 0.0


def bound_imbalance(plan: Plan) -> npt.NDArray[np.float64]:
    """`[L]`, the least imbalance of each layer that the bound leaves open."""
    mean = plan.rank_load.mean(axis=1)
    ones = np.ones(plan.num_layers)
    least: npt.NDArray[np.float64] = np.divide(plan.lower_bound, mean, out=ones, where=mean > 0)
    return least


def groups_stay(plan: Plan) -> bool:
    """Whether all replicas of each group's experts are on one node, in every layer."""
    if plan.num_experts % plan.num_groups:
        return False
    experts_per_group = plan.num_experts // plan.num_groups
    slots_per_node = plan.topology.num_slots // plan.topology.num_nodes
    groups = plan.phy2log // experts_per_group
    nodes = np.arange(plan.topology.num_slots) // slots_per_node
    pairs = np.zeros((plan.num_layers, plan.num_groups, plan.topology.num_nodes), dtype=np.bool_)
    pairs[np.arange(plan.num_layers)[:, None], groups, nodes] = True
    return bool((pairs.sum(axis=2) == 1).all())


def layer_figures(plan: Plan, before: Plan, row: int, *, with_ranks: bool) -> dict[str, Any]:
    """One layer of a plan, and of the placement before it."""
    figures = {
        "layer": plan.layer_ids[row],
        "imbalance_before": float(before.layer_imbalance[row]),
        "imbalance_after": float(plan.layer_imbalance[row]),
        "mean_rank_load": float(plan.rank_load[row].mean()),
        "largest_rank_load_before": float(before.rank_load[row].max()),
        "largest_rank_load_after": float(plan.rank_load[row].max()),
        "lower_bound": float(plan.lower_bound[row]),
        "duplicates": int(plan.layer_duplicates[row]),
    }
    if with_ranks:
        figures["rank_load_before"] = before.rank_load[row].tolist()
        figures["rank_load_after"] = plan.rank_load[row].tolist()
    return figures
