"""A policy for vLLM-Ascend's dynamic expert load balancing.

vLLM-Ascend moves weights between NPUs alone: an expert that stays on its NPU must stay in its slot,
and none may be twice on one. Both hold for plans that are made from the placement in force.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eplb_rs.errors import InfeasibleError
from eplb_rs.integrations.settings import EngineSettings

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["AscendPolicy"]


class AscendPolicy:
    """Plans with eplb-rs where vLLM-Ascend's ``EplbPolicy`` is asked for.

    Args:
        settings: How to plan; by default as the environment says.
    """

    def __init__(self, settings: EngineSettings | None = None) -> None:
        self._settings = settings or EngineSettings.from_environment() or EngineSettings()

    def rebalance_experts(
        self, current_expert_table: npt.ArrayLike, expert_workload: npt.ArrayLike
    ) -> tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """A new table of experts.

        Args:
            current_expert_table: `[L, D, S]`, the expert in each slot of each NPU.
            expert_workload: `[L, D, S]`, the load of each slot.

        Returns:
            Whether anything changes (1 or 0); the layers, those that gain most first, `[L]`; and
            the new table, `[L, D, S]`.

        Raises:
            InvalidInputError: As :meth:`eplb_rs.Planner.plan`.
            InfeasibleError: ``duplicate`` if an expert has to be twice on an NPU.
        """
        table = np.ascontiguousarray(current_expert_table, dtype=np.int64)
        layers, ranks, slots = table.shape
        flat = table.reshape(layers, -1)
        work = np.asarray(expert_workload, dtype=np.float64).reshape(layers, -1)
        load = np.zeros((layers, int(flat.max()) + 1))
        for layer in range(layers):
            np.add.at(load[layer], flat[layer], work[layer])
        plan = self._settings.plan(
            load,
            num_replicas=ranks * slots,
            num_groups=None,
            num_nodes=1,
            num_ranks=ranks,
            previous=flat,
        )
        if plan.duplicates:
            raise InfeasibleError(
                code="duplicate",
                argument="current_expert_table",
                got=f"{plan.duplicates} experts twice on an NPU in any plan",
                expected="fewer slots an NPU than experts",
            )
        new = plan.phy2log.reshape(table.shape)
        before = np.take_along_axis(load / _counts(flat, load.shape[1]), flat, axis=1)
        largest = before.reshape(table.shape).sum(axis=2).max(axis=1)
        gain = largest - plan.rank_load.max(axis=1)
        changed = int(not np.array_equal(new, table))
        return changed, np.argsort(-gain, kind="stable"), new.copy()


def _counts(flat: npt.NDArray[np.int64], num_experts: int) -> npt.NDArray[np.int64]:
    return np.stack([np.maximum(np.bincount(row, minlength=num_experts), 1) for row in flat])
