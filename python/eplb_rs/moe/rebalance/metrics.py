"""What a loop has done, as plain values: for programs, for a log, for Prometheus."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from eplb_rs.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["PrometheusCollector", "RebalancerMetrics"]


def _count(about: str) -> int:
    """A count that only grows."""
    return field(default=0, metadata={"kind": "counter", "about": about})


def _total(about: str) -> float:
    """A sum that only grows."""
    return field(default=0.0, metadata={"kind": "counter", "about": about})


def _gauge(about: str, first: float = math.nan) -> float:
    """What goes up and down; not a number until it is known."""
    return field(default=first, metadata={"kind": "gauge", "about": about})


@dataclass(slots=True, kw_only=True)
class RebalancerMetrics:
    """What a :class:`~eplb_rs.moe.Rebalancer` has done since it was made.

    Balances are as :class:`eplb_rs.Plan` has them, 1 is perfect; not a number until they are known.
    But for the times and ``bytes_received`` all values are the same on all ranks.
    """

    passes: int = _count("Forward passes")
    windows: int = _count("Windows whose load has been added up")
    shifts: int = _count("Windows with which the domain of the load shifted")
    balance_measured: float = _gauge("Balance of the tokens that ranks computed in the last window")
    balance_predicted: float = _gauge(
        "Balance predicted for the next window, as experts are placed"
    )
    plans: int = _count("Plans considered")
    plans_failed: int = _count("Plans that failed, or differed between ranks")
    plans_not_worth: int = _count("Plans that were not worth their moves")
    plans_adopted: int = _count("Plans carried out")
    moves: int = _count("Experts moved from rank to rank or read from storage")
    moved_bytes: int = _count("Bytes moved from rank to rank")
    received_bytes: int = _count("Bytes that this rank has received from others")
    plan_seconds: float = _total("Seconds spent planning on this rank")
    plan_passes: int = _count("Passes that went by from a plan's beginning to its adoption")
    move_seconds: float = _total("Seconds that this rank's host has spent moving")
    move_passes: int = _count("Passes that went by while experts were moved")
    moving: int = field(
        default=0, metadata={"kind": "gauge", "about": "Whether experts are being moved"}
    )
    stall_seconds: float = _total("Seconds that passes have waited for the loop on this rank")
    stall_seconds_last: float = _gauge("Seconds that the last pass waited for the loop", 0.0)
    stall_seconds_max: float = _gauge("Longest wait of a pass since the last window ended", 0.0)

    def line(self) -> str:
        """A line for a log."""
        return (
            f"{self.passes} passes: balance {self.balance_measured:.4f} measured, "
            f"{self.balance_predicted:.4f} predicted; {self.plans_adopted} of {self.plans} plans "
            f"adopted ({self.plans_not_worth} not worth it, {self.plans_failed} failed), "
            f"{self.moves} experts and {self.moved_bytes / 1e9:.3f} GB moved; "
            f"{self.plan_seconds:.3f} s planning, {self.move_seconds:.3f} s moving, "
            f"longest stall {self.stall_seconds_max * 1e3:.2f} ms"
        )


class PrometheusCollector:
    """Shows metrics to Prometheus: ``prometheus_client.REGISTRY.register(collector)``.

    Values are read when they are asked for; nothing is done between.

    Args:
        source: Gives the metrics: ``rebalancer.metrics``.
        labels: On every value: of the model, the rank.
        prefix: Of every name.

    Raises:
        InvalidInputError: ``missing_dependency`` without the package `prometheus-client`.
    """

    def __init__(
        self,
        source: Callable[[], RebalancerMetrics],
        *,
        labels: Mapping[str, str] | None = None,
        prefix: str = "eplb",
    ) -> None:
        try:
            from prometheus_client import core
        except ImportError as error:
            raise InvalidInputError(
                code="missing_dependency",
                argument="source",
                got="no package prometheus-client",
                expected="shown with it",
                hint="pip install prometheus-client; or read `rebalancer.metrics()`",
            ) from error
        self._families: dict[str, Any] = {
            "counter": core.CounterMetricFamily,
            "gauge": core.GaugeMetricFamily,
        }
        self._source = source
        self._labels = dict(labels or {})
        self._prefix = prefix

    def collect(self) -> Iterator[Any]:
        """The metrics, each a family of one value; what is not known yet is left out."""
        metrics = self._source()
        for one in fields(metrics):
            value = float(getattr(metrics, one.name))
            if math.isnan(value):
                continue
            family = self._families[one.metadata["kind"]](
                f"{self._prefix}_{one.name}", one.metadata["about"], labels=tuple(self._labels)
            )
            family.add_metric(tuple(self._labels.values()), value)
            yield family
