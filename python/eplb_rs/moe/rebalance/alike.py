"""Whether what a loop is given fits, on every rank, and is the same on all.

What is wrong on one rank is told to all, lest the others wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_rs.errors import InvalidInputError
from eplb_rs.moe.layer import ExpertParallelMoE
from eplb_rs.moe.rebalance.layers import RebalancedLayer
from eplb_rs.moe.rebalance.side import Side, Vote, digest
from eplb_rs.moe.rebalance.state import RebalancerState
from eplb_rs.moe.sites import Sites
from eplb_rs.moe.weights import ExpertWeights
from eplb_rs.plan import Plan
from eplb_rs.planner import Planner

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from eplb_rs.moe.rebalance.settings import RebalancerSettings

__all__ = ["check_alike", "check_type"]


def check_alike(
    side: Side,
    planner: Planner,
    layers: Sequence[RebalancedLayer],
    weights: ExpertWeights,
    plan: Plan,
    settings: RebalancerSettings,
    state: RebalancerState | None,
) -> None:
    """Refuses what does not fit, on this rank or on another; a collective call.

    Raises:
        InvalidInputError: As :class:`~eplb_rs.moe.Rebalancer`.
    """
    refusal, content = None, 0
    try:
        _check_types(planner, layers, weights, plan, state)
        _check_sizes(side, layers, weights, plan)
        _check_memory(layers, weights)
        _check_planner(planner, plan, settings)
        _check_state(state, plan)
    except InvalidInputError as error:
        refusal = error
    else:
        parts: list[np.ndarray] = [plan.phy2log, plan.log2phy]
        parts += [] if state is None else [state.windows]
        # Not the function that rebuilds a planner: its address is another in each process.
        _, planner_settings = planner.__reduce__()
        content = digest(
            repr((settings, planner_settings, plan.topology.__getnewargs_ex__())).encode(),
            *(part.tobytes() for part in parts),
        )
    verdict = side.verdict(side.begin_vote(Vote(good=refusal is None, digest=content)))
    if refusal is None and verdict.good and verdict.same:
        return
    side.close()
    raise refusal or InvalidInputError(
        code="inconsistent",
        argument="settings" if verdict.good else "group",
        got="a planner, plan, settings or state that differ from another rank's"
        if verdict.good
        else "another rank that was refused what it was given",
        expected="the same on all ranks" if verdict.good else "ranks whose arguments fit",
        hint="" if verdict.good else "that rank says what is wrong",
    )


def check_type(value: object, argument: str, kind: type, hint: str = "") -> None:
    """Refuses what is of another type.

    Raises:
        InvalidInputError: ``wrong_type``.
    """
    if not isinstance(value, kind):
        raise InvalidInputError(
            code="wrong_type",
            argument=argument,
            got=type(value).__name__,
            expected=f"of type {kind.__name__}",
            hint=hint,
        )


def _check_types(
    planner: object, layers: Sequence[object], weights: object, plan: object, state: object
) -> None:
    check_type(planner, "planner", Planner)
    check_type(weights, "weights", ExpertWeights, "`ExpertWeights.adopt` takes tensors as they are")
    check_type(plan, "plan", Plan, "`Plan.from_phy2log` makes one of an engine's map")
    if state is not None:
        check_type(state, "state", RebalancerState)
    for layer in layers:
        check_type(layer, "layers", RebalancedLayer, "with `record`, `follow` and `max_replicas`")


def _check_sizes(side: Side, layers: Sequence[object], weights: ExpertWeights, plan: Plan) -> None:
    slots = Sites.of(plan, side.group).num_slots
    found = {
        "layers": (len(layers), slots),
        "weights": (weights.num_layers, weights.num_slots),
    }
    for argument, got in found.items():
        if got != (plan.num_layers, slots):
            raise InvalidInputError(
                code="wrong_shape",
                argument=argument,
                got=f"{got[0]} layers" + f" of {got[1]} slots" * (argument == "weights"),
                expected=f"{plan.num_layers} layers of {slots} slots, as the plan has here",
            )


def _check_memory(layers: Sequence[object], weights: ExpertWeights) -> None:
    for number, layer in enumerate(layers):
        if not isinstance(layer, ExpertParallelMoE):
            continue
        held = {one.data_ptr() for one in weights[number].values()}
        if not {layer.gate_up.data_ptr(), layer.down.data_ptr()} <= held:
            raise InvalidInputError(
                code="inconsistent",
                argument="weights",
                got=f"other memory than layer {number} computes with",
                expected="the tensors that the layers were made of",
                hint="`.to(...)` gives a layer new ones: convert weights before",
            )


def _check_planner(planner: Planner, plan: Plan, settings: RebalancerSettings) -> None:
    if planner.topology != plan.topology:
        raise InvalidInputError(
            code="inconsistent",
            argument="planner",
            got=repr(planner.topology),
            expected=f"a planner for the machines of the plan, {plan.topology!r}",
        )
    if settings.plan_on == "all" and planner.time_limit_us is not None:
        raise InvalidInputError(
            code="inconsistent",
            argument="planner",
            got="one whose search is limited by time, so that ranks plan differently",
            expected="one limited by iterations where all ranks plan",
            hint='`iterations=` for the planner, or `plan_on="rank 0"`',
        )
    needs_balanced = {
        "max_moves": settings.max_moves is not None,
        "cost": settings.cost is not None,
        "outlook": settings.outlook is not None,
    }
    for setting, given in needs_balanced.items():
        if given and planner.policy != "balanced":
            raise InvalidInputError(
                code="inconsistent",
                argument="planner",
                got=f'policy "{planner.policy}", with `{setting}`',
                expected="one that looks at the placement in force",
                hint='policy="balanced", or leave that setting out',
            )


def _check_state(state: RebalancerState | None, plan: Plan) -> None:
    if state is not None and not (
        state.plan.topology == plan.topology
        and state.plan.phy2log.shape == plan.phy2log.shape
        and (state.plan.phy2log == plan.phy2log).all()
        and state.windows.shape[1:] == (plan.num_layers, plan.num_experts)
    ):
        raise InvalidInputError(
            code="inconsistent",
            argument="state",
            got=f"the state of another placement, {state.plan!r}",
            expected="that of the plan that weights were placed by",
            hint="place them by `state.plan`",
        )
