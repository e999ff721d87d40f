"""What the environment asks of the plug-ins."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from eplb_rs import _core
from eplb_rs.errors import InvalidInputError
from eplb_rs.plan import Plan
from eplb_rs.planner import Planner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy.typing as npt

    from eplb_rs.planner import GroupRule, PolicyName

__all__ = ["EngineSettings", "logger"]

logger = logging.getLogger("eplb_rs")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How plug-ins plan; the same settings and loads give the same plan in every process.

    Attributes:
        policy: As for :class:`eplb_rs.Planner`.
        max_moves: The part of all slots that a replan may change; ``None`` for all.
        group_rule: As for :class:`eplb_rs.Planner`.
        iterations: As for :class:`eplb_rs.Planner`.
        share_width: How many entries of `log2phy` an expert may have; ``None`` splits evenly.
    """

    policy: PolicyName = "balanced"
    max_moves: float | None = None
    group_rule: GroupRule = "strict"
    iterations: int | None = None
    share_width: int | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self | None:
        """The settings that the environment names; ``None`` unless it chooses eplb-rs.

        Raises:
            InvalidInputError: ``unknown`` or ``out_of_range`` for a variable.
        """
        given = os.environ if environment is None else environment
        chosen = given.get("EPLB_RS_POLICY", "")
        if not chosen:
            return None
        policy: PolicyName = _one_of("EPLB_RS_POLICY", chosen, ("balanced", "deepseek"))
        rule: GroupRule = _one_of(
            "EPLB_RS_GROUP_RULE", given.get("EPLB_RS_GROUP_RULE", "strict"), ("strict", "free")
        )
        moves = _number(given, "EPLB_RS_MAX_MOVES", "0 to 1", lambda n: 0 <= n <= 1)
        steps = _number(given, "EPLB_RS_ITERATIONS", "a whole number above 0", _is_count)
        width = _number(given, "EPLB_RS_SHARES", "a whole number above 0", _is_count)
        return cls(
            policy=policy,
            max_moves=moves,
            group_rule=rule,
            iterations=None if steps is None else int(steps),
            share_width=None if width is None else int(width),
        )

    def plan(
        self,
        load: npt.ArrayLike,
        *,
        num_replicas: int,
        num_groups: int | None,
        num_nodes: int,
        num_ranks: int,
        previous: npt.ArrayLike | None = None,
    ) -> Plan:
        """A plan for what an engine says of itself.

        Groups count where they divide over the nodes, as in the engines' own policies.

        Args:
            load: `[L, E]`.
            num_replicas: Slots of all ranks.
            num_groups: Groups of experts, or ``None``.
            num_nodes: Nodes.
            num_ranks: Ranks.
            previous: `[L, R]`, the expert in each slot now, -1 for none; of another shape, as
                when ranks join or leave, it is left alone.

        Raises:
            InvalidInputError: As :meth:`eplb_rs.Planner.plan`.
            InfeasibleError: As :meth:`eplb_rs.Planner.plan`.
        """
        array = np.ascontiguousarray(load, dtype=np.float32)
        groups = num_groups or 1
        grouped = groups > 1 and groups % num_nodes == 0 and array.shape[1] % groups == 0
        planner = _planner(
            self,
            num_replicas,
            groups if grouped else 1,
            num_nodes if num_ranks % num_nodes == 0 else 1,
            num_ranks,
        )
        if previous is None or self.policy != "balanced":
            return planner.plan(array)
        held = np.ascontiguousarray(previous, dtype=np.int64)
        whole = held.shape == (len(array), num_replicas) and (held >= 0).all()
        if not whole or any(len(np.unique(row)) < array.shape[1] for row in held):
            return planner.plan(array)
        before = Plan.from_phy2log(planner.topology, held, array)
        limit = None if self.max_moves is None else int(self.max_moves * held.size)
        return planner.plan(array, previous=before, max_moves=limit)


@cache
def _planner(
    settings: EngineSettings, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int
) -> Planner:
    topology = _core.Topology.from_totals(
        num_replicas=num_replicas, num_nodes=num_nodes, num_gpus=num_ranks
    )
    return Planner(
        topology,
        num_groups,
        settings.policy,
        group_rule=settings.group_rule,
        iterations=settings.iterations,
    )


def _one_of(name: str, value: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise InvalidInputError(
            code="unknown", argument=name, got=repr(value), expected=" or ".join(known)
        )
    return value


def _is_count(number: float) -> bool:
    return number >= 1 and number == int(number)


def _number(
    given: Mapping[str, str], name: str, wanted: str, fits: Callable[[float], bool]
) -> float | None:
    text = given.get(name, "")
    if not text:
        return None
    try:
        number = float(text)
        good = fits(number)
    except (ValueError, OverflowError):
        good = False
    if not good:
        raise InvalidInputError(code="out_of_range", argument=name, got=repr(text), expected=wanted)
    return number
