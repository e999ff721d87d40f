"""The planner: machines, a policy and the memory they need, for those who replan in a loop.

Letters: L layers, E logical experts, R slots, D ranks (GPUs), X the most replicas of an expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from eplb_rs import _core
from eplb_rs._inputs import as_count, as_load, as_number, as_topology, wrong_type
from eplb_rs._settings import checked_budget, checked_cost, reach_of
from eplb_rs.buffers import PlanBuffers
from eplb_rs.errors import InvalidInputError
from eplb_rs.plan import Plan, as_plan
from eplb_rs.scenarios import Outlook, as_scenarios, as_weights
from eplb_rs.transfers import TransferLimits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eplb_rs._inputs import Load, LoadLike
    from eplb_rs.realtime import Step, StepLimits
    from eplb_rs.worth import Worth

__all__ = ["GroupRule", "Milestone", "Planner", "PolicyName", "Split", "Timing"]

PolicyName: TypeAlias = Literal["balanced", "deepseek", "trivial"]
GroupRule: TypeAlias = Literal["strict", "priced", "free"]
Split: TypeAlias = Literal["uniform", "shares"]


class Timing(NamedTuple):
    """Where the time of a call went, in microseconds."""

    native_us: float
    """Planning and writing, in native code."""
    wait_us: float
    """Waiting to get the interpreter back, where it was let go."""


class Milestone(NamedTuple):
    """A point of the frontier of balance against moves."""

    moves: int
    """Experts that arrive on a rank that did not hold them, over all layers."""
    balance: float
    """The balance of the plan then; see :class:`Plan`."""


class Planner:
    """Plans placements of experts on one topology.

    A planner may be used from many threads at once, and gives the same bytes on any number of
    threads, on any machine.

    Args:
        topology: The machines.
        num_groups: In how many groups the model's experts are (DeepSeek-V3 and R1: 8). What
            becomes of them ``group_rule`` says. Under ``policy="deepseek"``, if groups divide over
            nodes, each group stays on one node; otherwise groups and nodes are ignored.
        policy: ``"balanced"``, replica counts and packing improved together by local search;
            ``"deepseek"``, the reference algorithm, to the last slot; or ``"trivial"``, what
            engines start from: slot `i` holds expert `i mod E`, whatever the load.
        threads: How many threads a call computes on. 1 is the caller's own; more are a pool that
            belongs to this planner. One is fastest below about 0.5 ms of work.
        release_gil: Whether a call lets go of the interpreter while it computes. ``None`` does so
            above about 50 us of work, where it is known beforehand: the balanced policy keeps it
            for 512 slots, over all layers, and up to 1,000 iterations. Others can then run; but getting it back from a thread that
            computes in Python takes up to :func:`sys.getswitchinterval` (5 ms), many times the
            plan. A caller with a latency budget passes ``False``; one whose other threads must not
            wait, ``True``. :attr:`last_timing` reports the wait.
        group_rule: Under ``policy="balanced"``, ``"strict"`` keeps each group of experts on one
            node, ``"free"`` ignores groups, and ``"priced"`` lets experts leave the home of their
            group, the node that serves most of its tokens, at ``crossing_cost``. A model with one
            group has no rule. :attr:`Plan.group_cost` says what a rule costs and saves.
        crossing_cost: Under ``group_rule="priced"``, what a token costs that is expected to cross to
            another node (:attr:`Plan.crossing_tokens`), in tokens that a rank computes; by default
            1. Made least is the load of the heaviest rank plus this times the tokens that cross, as
            a mean over ranks: 0 is ``"free"``, a high price ``"strict"``. Where nodes have no room
            for whole groups, groups are ignored. Such a plan takes long: 0.05 to 0.2 s for 58
            layers of 288 slots on 4 nodes.
        iterations: Under ``policy="balanced"``, how many steps the search may take for a layer;
            by default 1,000. The same plan on every machine. Layers that are even enough stop
            sooner; more steps never give a worse plan.
        time_limit_us: Instead of ``iterations``, how long a call may search, in microseconds. The
            plan then depends on how fast the machine happens to be: where several processes must
            come to the same plan, as in an engine, use ``iterations``. Only the search is limited:
            a model takes a few milliseconds besides, a frontier up to 20, and priced groups as
            long as they take.

    Raises:
        InvalidInputError: ``not_positive``, ``not_integer``, ``too_large`` for a count,
            ``unknown`` for a policy, ``wrong_type`` for the topology, the policy or
            ``release_gil``.

    Example:
        >>> import eplb_rs
        >>> topology = eplb_rs.Topology(num_nodes=2, gpus_per_node=4, slots_per_gpu=2)
        >>> planner = eplb_rs.Planner(topology, num_groups=4)
        >>> plan = planner.plan([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]])
        >>> plan.phy2log.shape
        (1, 16)
    """

    __slots__ = ("_core",)

    def __init__(
        self,
        topology: _core.Topology,
        num_groups: int = 1,
        policy: PolicyName = "balanced",
        threads: int = 1,
        *,
        release_gil: bool | None = None,
        group_rule: GroupRule = "strict",
        iterations: int | None = None,
        time_limit_us: float | None = None,
        crossing_cost: float | None = None,
    ) -> None:
        if not isinstance(policy, str):
            raise wrong_type("policy", policy, "a string")
        if not isinstance(release_gil, bool | np.bool_ | None):
            raise wrong_type("release_gil", release_gil, "True, False or None")
        known = policy.encode(errors="replace").decode()  # lone surrogates have no UTF-8
        release = None if release_gil is None else bool(release_gil)
        if not isinstance(group_rule, str):
            raise wrong_type("group_rule", group_rule, "a string")
        rule = group_rule.encode(errors="replace").decode()
        cost = checked_cost(crossing_cost, rule)
        limit = checked_budget(iterations, time_limit_us)
        self._core = _core.Planner(
            as_topology(topology), num_groups, known, threads, release, rule, *limit, cost
        )

    @property
    def topology(self) -> _core.Topology:
        """The machines it plans for."""
        return self._core.topology

    @property
    def num_groups(self) -> int:
        """In how many groups the model's experts are."""
        return self._core.num_groups

    @property
    def policy(self) -> str:
        """The name of the policy."""
        return self._core.policy

    @property
    def threads(self) -> int:
        """On how many threads a call computes."""
        return self._core.threads

    @property
    def release_gil(self) -> bool | None:
        """Whether a call lets go of the interpreter; ``None`` decides by the size of the work."""
        return self._core.release_gil

    @property
    def group_rule(self) -> str:
        """What the balanced policy makes of groups of experts."""
        return self._core.group_rule

    @property
    def crossing_cost(self) -> float | None:
        """What a token that crosses costs; ``None`` unless the rule for groups is priced."""
        return self._core.crossing_cost if self.group_rule == "priced" else None

    @property
    def iterations(self) -> int | None:
        """How many steps the search may take for a layer; ``None`` if its time is limited."""
        return self._core.iterations

    @property
    def time_limit_us(self) -> float | None:
        """How long a call may search, in microseconds; ``None`` if its steps are limited."""
        return self._core.time_limit_us

    @property
    def last_timing(self) -> Timing:
        """Where the time of the call that ended last went."""
        return Timing(*self._core.last_timing)

    def plan(
        self,
        load: LoadLike,
        *,
        previous: Plan | None = None,
        max_moves: int | None = None,
        move_cost: float = 0.0,
        min_balance: float | None = None,
        limits: TransferLimits | None = None,
        repeats: bool | None = None,
        layer_ids: Sequence[int] | None = None,
    ) -> Plan:
        """Plans a placement.

        Args:
            load: `[L, E]`, tokens per expert and layer (any unit): a NumPy array or torch tensor
                of any integer or floating dtype, or nested lists. Read as float32. All zero gives
                an even plan.
            previous: The plan in force, for ``policy="balanced"``: the new one is made from it, and
                experts that stay on their rank keep their slot. Its GPUs may have been dead or
                alive otherwise.
            max_moves: With ``previous``, how many experts may arrive on a rank that did not hold
                them, over all layers. What has to move because GPUs died or joined moves even
                beyond this and the other limits. Without any limit, the plan is as even as one
                made without ``previous``, to within about 0.1 % of the largest rank loads, with as
                few moves as were found for that.
            move_cost: With ``previous``, what a move costs, in the unit of the load: moves are made
                only where they lower the largest rank loads, summed over layers, by more than that
                each.
            min_balance: With ``previous``, the balance that is enough: the plan has as few moves as
                were found for it.
            limits: With ``previous``, limits on bytes a rank or on seconds, in which the moves have
                to be sent. Of the plans along the frontier, the furthest that keeps to them.
            repeats: With ``previous``, whether a slot may hold an expert that its rank holds already.
                That takes no move, and shifts load where other ranks hold the expert too; by default
                where one of the four above is given. Without it, each slot that repeats an expert
                or came free takes a move that cannot be avoided.
            layer_ids: The number of each layer in the model, `[L]`; by default from 0.

        Returns:
            The plan, with a copy of the load it was made for.

        Raises:
            InvalidInputError: For the load, see :func:`eplb_rs.rebalance_experts`;
                ``too_small`` if there are fewer slots than experts, ``not_divisor`` if experts
                do not divide into groups; ``wrong_type``, ``wrong_shape``, ``not_integer`` or
                ``negative`` for ``layer_ids``.

        Cost: O(L R log R): see ``benches/results``.
        """
        array = as_load(load)
        core = self._core
        if previous is None:
            for name, given in (
                ("max_moves", max_moves),
                ("move_cost", move_cost or None),
                ("min_balance", min_balance),
                ("limits", limits),
                ("repeats", repeats),
            ):
                if given is not None:
                    raise InvalidInputError(
                        code="inconsistent",
                        argument=name,
                        got=repr(given),
                        expected="left out where there is no previous plan",
                        hint="previous=plan says what the moves start from",
                    )
            placement = core.plan(array)
        else:
            limited = limits is not None or min_balance is not None or max_moves is not None
            repeats = bool(move_cost) or limited if repeats is None else bool(repeats)
            reach = reach_of(max_moves, move_cost, min_balance, repeats)
            held = self._placement_of(previous)
            if limits is None:
                placement = core.plan_from(array, held, reach)
            elif isinstance(limits, TransferLimits):
                checked = limits._checked(previous.num_layers)
                placement = core.plan_within(array, held, reach, checked)
            else:
                raise wrong_type("limits", limits, "an eplb_rs.TransferLimits")
        priced = core.policy == "balanced" and core.group_rule == "priced"
        return self._made(placement, array, layer_ids, "priced" if priced else None)

    def _made(
        self,
        placement: _core.Placement,
        load: Load,
        layer_ids: Sequence[int] | None,
        rule: str | None = None,
    ) -> Plan:
        """A plan of this planner; where no rule is named, groups stay on a node or are ignored."""
        if rule is None:
            rule = "strict" if self._core.keeps_groups else "free"
        return Plan._made(placement, load, self.num_groups, self.policy, layer_ids, rule)

    def frontier(self, load: LoadLike, previous: Plan, *, repeats: bool = True) -> list[Milestone]:
        """Balance against moves, from the plan in force.

        Args:
            load: As for :meth:`plan`.
            previous: The plan in force.
            repeats: Whether a slot may hold an expert that its rank holds already, as for
                :meth:`plan`.

        Returns:
            The most balance found for each number of moves, from as few as possible to as many as
            help. :meth:`plan` with ``max_moves`` of one of them leads there or nearby.

        Raises:
            InvalidInputError: As :meth:`plan`.
        """
        frontier = self._core.frontier(as_load(load), self._placement_of(previous), bool(repeats))
        return [Milestone(moves, balance) for moves, balance in frontier]

    def worth_it(
        self,
        load: LoadLike,
        previous: Plan,
        plan: Plan | None = None,
        *,
        horizon: float,
        us_per_token: float,
        expert_bytes: npt.ArrayLike,
        intra_node_gb_s: float,
        inter_node_gb_s: float,
        latency_us: float = 0.0,
        hidden: float = 0.0,
    ) -> Worth:
        """Whether a new plan gains more than its moves cost.

        It gains what the heaviest ranks of all layers have to do less, whenever the load comes; it
        costs what the transfers take. Neither is measured: say what a token takes, and how fast the
        links are.

        Args:
            load: As for :meth:`plan`: what is expected to come.
            previous: The plan in force.
            plan: The plan that might take its place; by default, of five plans along the frontier,
                the one that gains most after its cost.
            horizon: How many times the load is expected to come before the next plan.
            us_per_token: What a rank of mean speed takes for a token of an expert, in microseconds.
            expert_bytes: The bytes of an expert of one layer: a number, or one for each layer.
            intra_node_gb_s: What a rank sends to another of its node, in 1e9 bytes a second.
            inter_node_gb_s: What it sends to one of another node.
            latency_us: What each round of transfers takes besides, in microseconds.
            hidden: Which part of the time of the transfers hides behind computation, 0 to 1.

        Returns:
            The plan with its gain and cost; true where the gain is larger.

        Raises:
            InvalidInputError: As :meth:`plan` and :meth:`eplb_rs.Transfers.predicted_s`;
                ``out_of_range`` for a number.

        Example:
            >>> import eplb_rs
            >>> planner = eplb_rs.Planner(eplb_rs.Topology(1, 4, 3), policy="balanced")
            >>> before = planner.plan([[8, 8, 1, 1, 1, 1, 1, 1, 1, 1]])
            >>> worth = planner.worth_it(
            ...     [[1, 1, 1, 1, 1, 1, 1, 1, 8, 8]], before, horizon=1000, us_per_token=2,
            ...     expert_bytes=44e6, intra_node_gb_s=200, inter_node_gb_s=50,
            ... )
            >>> bool(worth), worth.gain_s > worth.cost_s
            (True, True)
        """
        from eplb_rs.worth import worth_of

        array = as_load(load)
        held = self._placement_of(previous)
        before = Plan._made(held, array, self.num_groups, previous.policy, previous.layer_ids)
        plans = [plan]
        if plan is None:
            most = self.frontier(array, previous)[-1].moves
            plans = [
                self.plan(array, previous=previous, max_moves=most >> halvings)
                for halvings in range(5)
            ]
        worths = [
            worth_of(
                as_plan(candidate).with_load(array),
                before,
                horizon=horizon,
                us_per_token=us_per_token,
                expert_bytes=expert_bytes,
                intra_node_gb_s=intra_node_gb_s,
                inter_node_gb_s=inter_node_gb_s,
                latency_us=latency_us,
                hidden=hidden,
            )
            for candidate in plans
        ]
        return max(worths, key=lambda worth: worth.net_s)

    def _placement_of(self, previous: Plan) -> _core.Placement:
        before = as_plan(previous, "previous")
        if self.policy != "balanced":
            raise InvalidInputError(
                code="inconsistent",
                argument="previous",
                got=f'a plan, for policy "{self.policy}"',
                expected="None, since this policy does not look at it",
                hint='policy="balanced" does',
            )
        return before._placement

    def plan_windows(
        self,
        windows: LoadLike,
        *,
        previous: Plan | None = None,
        max_moves: int | None = None,
        max_moves_per_layer: int | None = None,
        split: Split = "uniform",
        outlook: Outlook | None = None,
        layer_ids: Sequence[int] | None = None,
    ) -> Plan:
        """Plans a placement for the window to come, from those that have been.

        The windows since the load last shifted, and copies that scatter as a window to come may,
        are the scenarios of :meth:`plan_scenarios`.

        Args:
            windows: `[T, L, E]`, tokens per expert and layer in each window, the last one last.
            previous: As for :meth:`plan_scenarios`.
            max_moves: As for :meth:`plan_scenarios`.
            max_moves_per_layer: As for :meth:`plan_scenarios`.
            split: As for :meth:`plan_scenarios`.
            outlook: How scenarios are made of windows; by default as suits the split
                (:meth:`Outlook.for_split <eplb_rs.scenarios.Outlook.for_split>`).
            layer_ids: As for :meth:`plan`.

        Returns:
            The plan, with the mean load of the scenarios.

        Raises:
            InvalidInputError: As :meth:`plan_scenarios`, for ``windows``; as
                :meth:`Outlook.scenarios <eplb_rs.scenarios.Outlook.scenarios>`.
        """
        made = Outlook.for_split(split) if outlook is None else outlook
        if not isinstance(made, Outlook):
            raise wrong_type("outlook", outlook, "an eplb_rs.scenarios.Outlook or None")
        return self.plan_scenarios(
            made.scenarios(windows),
            previous=previous,
            max_moves=max_moves,
            max_moves_per_layer=max_moves_per_layer,
            split=split,
            layer_ids=layer_ids,
        )

    def plan_scenarios(
        self,
        scenarios: LoadLike,
        *,
        weights: Sequence[float] | npt.NDArray[Any] | None = None,
        previous: Plan | None = None,
        max_moves: int | None = None,
        max_moves_per_layer: int | None = None,
        split: Split = "uniform",
        layer_ids: Sequence[int] | None = None,
    ) -> Plan:
        """Plans a placement that is good in several scenarios at once.

        In the weighted mean over the scenarios, the largest rank load is as small as exchanges
        make it. They start from the placement in force, so few experts move; without one, from
        what this planner plans for the mean load. Of the settings, ``iterations`` limits how many
        exchanges are tried for each layer, and ``time_limit_us`` how long they are. Exchanges keep
        groups on their nodes under ``group_rule="strict"``, and ignore them otherwise.

        With shares and ``max_moves`` each move is the one that relieves a layer most: of all slots
        that could be given to another expert, found exactly.

        Args:
            scenarios: `[K, L, E]`, what the load may be; each in any unit.
            weights: `[K]`, how much each counts; all alike if left out.
            previous: The plan in force.
            max_moves: With ``previous``, how many experts may arrive on a rank that did not hold
                them, over all layers: they move where that gains most.
            max_moves_per_layer: With ``previous``, how many experts of each layer may arrive on a
                rank that did not hold them; by default as many as help.
            split: How tokens will be split over replicas when the load has come: ``"uniform"``,
                evenly, or ``"shares"``, anew for that load; see :meth:`Plan.with_shares`.
            layer_ids: As for :meth:`plan`.

        Returns:
            The plan, with the weighted mean of the scenarios as its load.

        Raises:
            InvalidInputError: For the scenarios, as for a load of :meth:`plan`; ``too_large`` for
                more than 256 of them; ``wrong_shape``, ``out_of_range`` or ``wrong_type`` for the
                weights; ``unknown`` for the split; ``wrong_type``, ``wrong_shape`` or
                ``inconsistent`` for the previous plan; ``not_integer`` or ``negative`` for the
                moves; ``inconsistent`` for a topology whose GPUs are not all alike.

        Cost: see ``benches/results/next_window.json``; with shares and ``max_moves``, for one load
        of 58 layers on 288 slots, 3 to 13 ms: see ``benches/results/few_moves.json``.
        """
        array = as_scenarios(scenarios, "scenarios")
        counts = as_weights(weights, len(array))
        before = None if previous is None else as_plan(previous, "previous")
        limits = {"max_moves": max_moves, "max_moves_per_layer": max_moves_per_layer}
        for argument, moves in limits.items():
            if previous is None and moves is not None:
                raise InvalidInputError(
                    code="inconsistent",
                    argument=argument,
                    got=repr(moves),
                    expected="None where there is no previous plan",
                    hint="previous=plan says what the moves start from",
                )
        if not isinstance(split, str):
            raise wrong_type("split", split, "a string")
        placement = _core.plan_scenarios(
            self._core,
            array,
            None if counts is None else counts.tolist(),
            split.encode(errors="replace").decode(),
            None if before is None else before._placement,
            *(None if n is None else as_count(n, name, least=0) for name, n in limits.items()),
        )
        mean = np.average(array, axis=0, weights=counts).astype(np.float32)
        return self._made(placement, mean, layer_ids)

    def plan_linked(
        self,
        load: LoadLike,
        *,
        slack: float = 0.0008,
        spread: float = 0.1,
        layer_ids: Sequence[int] | None = None,
    ) -> Plan:
        """Plans a placement for one load with shares in mind: its replicas link ranks, so that
        tokens have ways to flow when another load comes.

        Ranks that no shared expert links cannot help each other, and a link helps no further than
        its expert's tokens go. Slots of nearly the same load are swapped until shares even out
        copies of the load that scatter about it, drawn with fixed seeds, or ``iterations`` swaps
        were tried in each layer.

        Args:
            load: As for :meth:`plan`.
            slack: How much more than the mean a rank may carry for it, as a part of that, when
                replicas share evenly; from 0 to 1.
            spread: How far the loads of experts are expected to come to differ: the standard
                deviation, as a part of each; from 0 to 1.
            layer_ids: As for :meth:`plan`.

        Raises:
            InvalidInputError: As :meth:`plan`; ``wrong_type`` or ``out_of_range`` for the slack or
                the spread; ``inconsistent`` for a topology whose GPUs are not all alike.

        Cost: 58 layers of 256 experts on 288 slots of 32 ranks take about 0.1 s: see
        ``benches/results/few_moves.json``.
        """
        array = as_load(load)
        settings = (as_number(slack, "slack"), as_number(spread, "spread"))
        placement = _core.plan_linked(self._core, array, *settings)
        return self._made(placement, array, layer_ids)

    def plan_into(self, load: LoadLike, out: PlanBuffers) -> None:
        """Plans a placement into buffers, and allocates nothing once warm.

        Warm means: given a C-contiguous float32 array of a shape planned before. Other loads are
        converted first.

        Args:
            load: As for :meth:`plan`.
            out: Arrays of its shapes, from :meth:`allocate` or elsewhere (an engine's pinned
                memory, say).

        Raises:
            InvalidInputError: As :meth:`plan`; ``wrong_type``, ``wrong_dtype``, ``wrong_shape``,
                ``too_small``, ``read_only``, ``not_contiguous`` or ``in_use`` for a buffer. The
                buffers are then as they were.
        """
        if not isinstance(out, PlanBuffers):
            raise wrong_type("out", out, "an eplb_rs.PlanBuffers", "Planner.allocate makes them")
        self._core.plan_into(as_load(load), out.phy2log, out.log2phy, out.logcnt)

    def split_step(
        self,
        load: LoadLike,
        plan: Plan,
        *,
        layer: int = 0,
        out: npt.NDArray[np.float64] | None = None,
    ) -> tuple[npt.NDArray[np.float64], float]:
        """The best split of one layer's load over the replicas of a plan in force.

        See :meth:`eplb_rs.shares.Splitter.split_step`, which this calls; the first call for a plan
        prepares it.

        Args:
            load: `[E]`, tokens of each expert.
            plan: The plan in force.
            layer: Which of its layers.
            out: `[R]` float64: gets the shares; a new array if left out.

        Returns:
            The share of each slot, `[R]`, and the largest rank load.

        Raises:
            InvalidInputError: As there; ``wrong_type`` for the plan.
        """
        return as_plan(plan)._splitter.split_step(load, layer=layer, out=out)

    def plan_step(self, load: LoadLike, *, limits: StepLimits | None = None) -> Step:
        """Plans one layer from the load of this micro-batch, experts keeping their home slots.

        Of each rank's slots the first `E/D` are home to its experts, `e // (E/D)` being the rank of
        expert `e`; the others are spare. For a loop without allocation, see
        :class:`eplb_rs.realtime.StepPlanner`, which this calls.

        Args:
            load: Tokens by expert, `[E]`, or by source rank and expert, `[D, E]`; integers.
            limits: What the plan may use; by default all there is.

        Raises:
            InvalidInputError: As there; ``not_multiple`` if experts do not divide over the ranks,
                ``too_small`` if no slot is spare, ``inconsistent`` for a topology whose GPUs are
                not all alike.
        """
        from eplb_rs.realtime import step_planner

        return step_planner(self.topology, load, limits).plan(load)

    def allocate(
        self, num_layers: int, num_experts: int, max_replicas: int | None = None
    ) -> PlanBuffers:
        """Buffers for :meth:`plan_into`.

        Args:
            num_layers: L.
            num_experts: E.
            max_replicas: How wide ``log2phy`` is. By default as wide as it can ever need to be,
                `R - E + 1`; narrower is faster to fill, and a plan that does not fit is refused.
                0 leaves ``log2phy`` out.

        Raises:
            InvalidInputError: ``not_integer``, ``not_positive``, ``negative`` or ``too_large`` for a
                size.
        """
        return PlanBuffers._made(
            self._core.topology.num_slots, num_layers, num_experts, max_replicas
        )

    def __repr__(self) -> str:
        return (
            f"Planner({self.topology!r}, num_groups={self.num_groups}, "
            f"policy={self.policy!r}, threads={self.threads})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.topology, self.num_groups, self.policy, self.threads)
        settings = {
            "release_gil": self.release_gil,
            "group_rule": self.group_rule,
            "crossing_cost": self.crossing_cost,
            "iterations": self.iterations,
            "time_limit_us": self.time_limit_us,
        }
        return _rebuild, (arguments, settings)


def _rebuild(arguments: tuple[Any, ...], settings: dict[str, Any]) -> Planner:
    return Planner(*arguments, **settings)
