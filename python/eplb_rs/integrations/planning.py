"""Plans for engines, from what they say of themselves and the placement they serve with.

Letters: L layers, E logical experts, R slots, D ranks, G groups.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from eplb_rs import _core
from eplb_rs.errors import PlanError
from eplb_rs.plan import Plan
from eplb_rs.planner import Planner

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

    import numpy.typing as npt

    from eplb_rs.integrations.settings import EngineSettings

__all__ = ["EnginePlanner"]

_T = TypeVar("_T")

_MUCH_BETTER = 1.05
"""How much more balance is worth a plan from scratch, where moves are not limited."""


class EnginePlanner:
    """Plans as the environment asks for; the same calls give the same plans in every process.

    Args:
        settings: How to plan.
        logger: Where people look: the engine's.
    """

    def __init__(self, settings: EngineSettings, logger: logging.Logger) -> None:
        self.settings = settings
        self._logger = logger
        self._planners: dict[tuple[int, ...], Planner] = {}
        self._told: set[str] = set()

    def plan(
        self,
        load: npt.ArrayLike,
        *,
        num_replicas: int,
        num_groups: int | None,
        num_nodes: int,
        num_ranks: int,
        previous: npt.ArrayLike | None = None,
        repeats: bool | None = None,
    ) -> Plan:
        """A plan for what an engine says of itself.

        Groups count where they divide over the nodes, as in the engines' own policies. A placement
        in force that breaks the rule for them, as the one that engines start with does, cannot be
        mended by a few moves: the plan is then made from scratch, whatever ``max_moves`` says.
        Where moves are not limited, it is also made from scratch if that is better by a twentieth.
        Either way an expert that stays on its rank stays in its slot.

        Args:
            load: `[L, E]`.
            num_replicas: R.
            num_groups: G, or ``None``.
            num_nodes: Nodes.
            num_ranks: D.
            previous: `[L, R]`, the expert in each slot now; -1 in all slots of ranks that have
                just joined. What cannot be built upon (fewer ranks than before, an expert without
                a slot) is left alone.
            repeats: Whether an expert may be twice on a rank; see :meth:`eplb_rs.Planner.plan`.

        Raises:
            InvalidInputError: As :meth:`eplb_rs.Planner.plan`.
            InfeasibleError: As :meth:`eplb_rs.Planner.plan`.
        """
        begun = time.perf_counter()
        array = np.ascontiguousarray(load, dtype=np.float32)
        planner = self._planner(array, num_replicas, num_groups or 1, num_nodes, num_ranks)
        before = self._in_force(planner, previous, array)
        if before is None:
            plan = planner.plan(array)
        elif planner.group_rule == "strict" and not _keeps_groups(before):
            self.warn_once(
                "the placement in force has groups of experts on several nodes; the next plan "
                "moves what it takes to keep each on one (EPLB_RS_GROUP_RULE=free would not)"
            )
            plan = _in_place(planner.plan(array), before)
        else:
            limit = self.settings.max_moves
            most = None if limit is None else int(limit * before.phy2log.size)
            plan = planner.plan(array, previous=before, max_moves=most, repeats=repeats)
            fresh = planner.plan(array) if limit is None else plan
            if fresh.balance > _MUCH_BETTER * plan.balance:
                plan = _in_place(fresh, before)
        self._report(plan, before, time.perf_counter() - begun)
        return plan

    def or_theirs(self, ours: Callable[[], _T], theirs: Callable[[], _T]) -> _T:
        """What we plan; or, where a plan is refused, what the engine's own policy does.

        A planner's complaint must not end a server that could go on. Only complaints about the
        input count, which all ranks come to alike: anything else (memory, say) might befall one
        rank alone, and ranks that plan differently are worse than one that ends.
        """
        try:
            return ours()
        except PlanError as error:
            if str(error) not in self._told:
                self._told.add(str(error))
                self._logger.exception("eplb-rs cannot plan; the engine's own policy does instead")
            return theirs()

    def warn_once(self, message: str) -> None:
        """Logs a warning, the first time it is given."""
        if message not in self._told:
            self._told.add(message)
            self._logger.warning("eplb-rs: %s", message)

    def _planner(
        self, load: npt.NDArray[np.float32], replicas: int, groups: int, nodes: int, ranks: int
    ) -> Planner:
        """The one for a size of engine, kept for its memory."""
        count = groups % nodes == 0 and load.shape[-1] % groups == 0
        if self.settings.policy == "deepseek" and self.settings.group_rule == "free":
            count = False  # the reference knows no such rule: without groups it has none to keep
        sizes = (replicas, groups if count else 1, nodes if ranks % nodes == 0 else 1, ranks)
        if sizes not in self._planners:
            topology = _core.Topology.from_totals(
                num_replicas=sizes[0], num_nodes=sizes[2], num_gpus=sizes[3]
            )
            self._planners[sizes] = Planner(
                topology,
                sizes[1],
                self.settings.policy,
                group_rule=self.settings.group_rule,
                iterations=self.settings.iterations,
            )
        return self._planners[sizes]

    def _in_force(
        self, planner: Planner, previous: npt.ArrayLike | None, load: npt.NDArray[np.float32]
    ) -> Plan | None:
        """The placement to build upon, if there is one."""
        if previous is None or self.settings.policy != "balanced":
            return None
        held = np.ascontiguousarray(previous, dtype=np.int64)
        topology = planner.topology
        if held.shape != (len(load), topology.num_slots):
            return None
        empty = (held < 0).reshape(len(held), topology.num_gpus, -1)
        joined = empty.all(axis=(0, 2))
        whole = not empty[:, ~joined].any() and not joined.all()
        counts = np.zeros(load.shape, dtype=np.int64)
        layer, slot = np.nonzero((held >= 0) & (held < load.shape[1]))
        np.add.at(counts, (layer, held[layer, slot]), 1)
        if not whole or (counts == 0).any() or counts.sum() != (held >= 0).sum():
            return None
        if joined.any():
            topology = topology.with_dead(np.flatnonzero(joined).tolist())
        return Plan.from_phy2log(topology, held, load, num_groups=planner.num_groups)

    def _report(self, plan: Plan, before: Plan | None, seconds: float) -> None:
        """A line for the log, from the first rank."""
        distributed = getattr(sys.modules.get("torch"), "distributed", None)
        together = distributed and distributed.is_available() and distributed.is_initialized()
        if distributed and together and distributed.get_rank() > 0:
            return
        change = f"balance {plan.balance:.4f}"
        if before is not None:
            sent = plan.transfers(before)
            moves = int((sent.source != sent.target).sum())
            change = f"balance {before.balance:.4f} -> {plan.balance:.4f}, {moves:,} experts move"
        self._logger.info(
            "eplb-rs planned %d layers in %.1f ms: %s", plan.num_layers, 1e3 * seconds, change
        )


def _keeps_groups(plan: Plan) -> bool:
    """Whether each group is on one node."""
    groups, topology = plan.num_groups, plan.topology
    if groups == 1 or topology.num_nodes == 1:
        return True
    slots = plan.phy2log
    layer, slot = np.nonzero(slots >= 0)
    group = slots[layer, slot] // (plan.num_experts // groups)
    node = slot // (slots.shape[1] // topology.num_nodes)
    first = np.full((len(slots), groups), topology.num_nodes)
    last = np.full((len(slots), groups), -1)
    np.minimum.at(first, (layer, group), node)
    np.maximum.at(last, (layer, group), node)
    return bool((first == last).all())


def _in_place(plan: Plan, before: Plan) -> Plan:
    """The plan with each rank's slots in another order: experts that stay are where they were."""
    shape = (plan.num_layers, plan.topology.num_gpus, -1)
    new, old = plan.phy2log.reshape(shape), before.phy2log.reshape(shape)
    # Pairs new slot, old slot of the same expert; of several, the first of either.
    same = new[..., :, None] == old[..., None, :]
    same &= same.cumsum(axis=-1) == 1
    same &= same.cumsum(axis=-2) == 1
    stays, kept = same.any(axis=-1), same.any(axis=-2)
    # Slots that stay first, in the order of where they were; the others in their own order.
    where = np.where(stays, same.argmax(axis=-1), new.shape[-1])
    sources = np.argsort(where, axis=-1, kind="stable")
    targets = np.argsort(~kept, axis=-1, kind="stable")
    placed = np.empty_like(new)
    np.put_along_axis(placed, targets, np.take_along_axis(new, sources, axis=-1), axis=-1)
    return Plan.from_phy2log(
        plan.topology,
        placed.reshape(plan.phy2log.shape),
        plan.expert_load,
        num_groups=plan.num_groups,
        policy=plan.policy,
    )
