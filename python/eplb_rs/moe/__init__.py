"""Experts of a running model: placed, moved and routed as a plan says. Needs torch."""

from eplb_rs.moe.checkpoint import LAYOUTS, Checkpoint, Layout, write_index
from eplb_rs.moe.layer import ExpertParallelMoE, Pass, Recorded, TopK, TopKRouter
from eplb_rs.moe.move import ExpertMover, MoveError, MoveStats, StoreLostError
from eplb_rs.moe.rebalance import (
    MoveCost,
    PrometheusCollector,
    RebalancedLayer,
    Rebalancer,
    RebalancerMetrics,
    RebalancerSettings,
    RebalancerState,
)
from eplb_rs.moe.routing import (
    Routed,
    RoutingRule,
    RoutingTable,
    predicted_tokens,
    routing_rows,
)
from eplb_rs.moe.sites import Sites
from eplb_rs.moe.training import sum_replica_gradients, with_optimizer_state
from eplb_rs.moe.weights import ExpertField, ExpertWeights, checksum, slots_of

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "ExpertField",
    "ExpertMover",
    "ExpertParallelMoE",
    "ExpertWeights",
    "Layout",
    "MoveCost",
    "MoveError",
    "MoveStats",
    "Pass",
    "PrometheusCollector",
    "RebalancedLayer",
    "Rebalancer",
    "RebalancerMetrics",
    "RebalancerSettings",
    "RebalancerState",
    "Recorded",
    "Routed",
    "RoutingRule",
    "RoutingTable",
    "Sites",
    "StoreLostError",
    "TopK",
    "TopKRouter",
    "checksum",
    "predicted_tokens",
    "routing_rows",
    "slots_of",
    "sum_replica_gradients",
    "with_optimizer_state",
    "write_index",
]
