"""A policy for vLLM-Ascend's dynamic expert load balancing.

vLLM-Ascend moves weights between NPUs alone: an expert that stays on its NPU must stay in its slot,
and none may be twice on one. Both hold for plans that are made from the placement in force.

vLLM-Ascend has no plug-ins for policies; its factory makes them by number. One of these is replaced,
before vLLM-Ascend starts its planning process::

    from eplb_rs.integrations.vllm_ascend import AscendPolicy
    from vllm_ascend.eplb.core.policy import policy_factory

    policy_factory.DynamicEplb = AscendPolicy  # number 1

>>> from eplb_rs.integrations.vllm_ascend import AscendPolicy
>>> table = [[[0, 1, 2], [3, 0, 1]]]  # a layer of four experts on two NPUs
>>> work = [[[40, 20, 30], [10, 40, 20]]]
>>> changed, priority, new_table = AscendPolicy().rebalance_experts(table, work)
>>> changed, priority.tolist(), new_table.tolist()
(1, [0], [[[0, 3, 2], [3, 0, 1]]])
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from eplb_rs.errors import InfeasibleError, InvalidInputError
from eplb_rs.integrations.planning import EnginePlanner
from eplb_rs.integrations.settings import EngineSettings

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["AscendPolicy"]


class AscendPolicy:
    """Plans with eplb-rs where vLLM-Ascend's ``EplbPolicy`` is asked for.

    Args:
        config: What vLLM-Ascend hands to its policies; of no use here.
        settings: How to plan; by default as the environment says.

    Raises:
        InvalidInputError: For a variable of the environment.
    """

    def __init__(self, config: object = None, *, settings: EngineSettings | None = None) -> None:
        self.config = config
        settings = settings or EngineSettings.from_environment() or EngineSettings()
        self._planner = EnginePlanner(settings, logging.getLogger("vllm.eplb_rs"))

    def rebalance_experts(
        self, current_expert_table: npt.ArrayLike, expert_workload: npt.ArrayLike
    ) -> tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """A new table of experts. Where there can be none, the table as it was: a planner's
        complaint, which is logged, must not end the engine.

        Args:
            current_expert_table: `[L, D, S]`, the expert in each slot of each NPU.
            expert_workload: `[L, D, S]`, the load of each slot.

        Returns:
            Whether anything changes (1 or 0); the layers, those that gain most first, `[L]`; and
            the new table, `[L, D, S]`.

        Raises:
            InvalidInputError: ``wrong_shape`` for tables that do not fit each other.
        """
        table = np.ascontiguousarray(current_expert_table, dtype=np.int64)
        work = np.asarray(expert_workload, dtype=np.float64)
        if table.ndim != 3 or table.shape != work.shape or not table.size:
            raise InvalidInputError(
                code="wrong_shape",
                argument="expert_workload",
                got=f"{list(work.shape)}, beside a table of {list(table.shape)}",
                expected="two tables of the same shape [layers, NPUs, slots]",
            )
        return self._planner.or_theirs(
            lambda: self._planned(table, work),
            lambda: (0, np.arange(len(table)), table.copy()),
        )

    def _planned(
        self, table: npt.NDArray[np.int64], work: npt.NDArray[np.float64]
    ) -> tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        layers, ranks, slots = table.shape
        flat = table.reshape(layers, -1)
        if flat.min() < 0:
            raise InvalidInputError(
                code="out_of_range",
                argument="current_expert_table",
                got=str(flat.min()),
                expected="an expert in every slot: one that stays on its NPU cannot change slots",
            )
        load = np.zeros((layers, int(flat.max()) + 1))
        rows = np.arange(layers)[:, None]
        np.add.at(load, (np.broadcast_to(rows, flat.shape), flat), work.reshape(layers, -1))
        plan = self._planner.plan(
            load,
            num_replicas=ranks * slots,
            num_groups=None,
            num_nodes=1,
            num_ranks=ranks,
            previous=flat,
            repeats=False,
        )
        if plan.duplicates:
            raise InfeasibleError(
                code="duplicate",
                argument="current_expert_table",
                got=f"{plan.duplicates} experts twice on an NPU in any plan",
                expected="fewer slots an NPU than experts",
            )
        new = plan.phy2log.reshape(table.shape)
        heaviest = work.sum(axis=2).max(axis=1)
        gain = heaviest - plan.rank_load.max(axis=1)
        changed = int(not np.array_equal(new, table))
        return changed, np.argsort(-gain, kind="stable"), new.copy()
