"""The loop that keeps experts where the load is: record, plan, move, measure."""

from eplb_rs.moe.rebalance.layers import RebalancedLayer
from eplb_rs.moe.rebalance.metrics import PrometheusCollector, RebalancerMetrics
from eplb_rs.moe.rebalance.rebalancer import Rebalancer
from eplb_rs.moe.rebalance.settings import MoveCost, RebalancerSettings
from eplb_rs.moe.rebalance.state import RebalancerState

__all__ = [
    "MoveCost",
    "PrometheusCollector",
    "RebalancedLayer",
    "Rebalancer",
    "RebalancerMetrics",
    "RebalancerSettings",
    "RebalancerState",
]
