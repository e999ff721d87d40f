"""A plan: which expert each slot holds, and how good that is for the load it was made for.

Letters: L layers, E logical experts, R slots, D ranks (GPUs), X the most replicas of an expert.
"""

from __future__ import annotations

from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from eplb_rs import _core, _plan_json
from eplb_rs._files import write_whole
from eplb_rs._inputs import as_count, as_load, as_slots, as_topology, wrong_type
from eplb_rs.errors import InvalidInputError
from eplb_rs.transfers import Transfers

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from eplb_rs._inputs import Load, LoadLike
    from eplb_rs.shares import Shares, Splitter

__all__ = ["GroupCost", "Plan"]


class GroupCost(NamedTuple):
    """What a rule for groups costs, and what it saves."""

    balance: float
    """Of the plan under the rule; see :class:`Plan`."""
    balance_without: float
    """Of a plan that ignores groups."""
    crossing_share: float
    """Which part of all tokens is expected to cross to another node, under the rule; see
    :attr:`Plan.crossing_tokens`."""
    crossing_share_without: float
    """The same for the plan that ignores groups."""


class Plan:
    """A placement of experts in slots, and the load it was made for.

    Plans come from :meth:`Planner.plan`, :meth:`from_phy2log` and :meth:`load`. They are checked
    when they are made and cannot be changed; their arrays are read-only. Two plans are equal if
    they place the same experts in the same slots of the same machines, for the same load.

    The *balance* of ranks is the field's: the sum over layers of the mean rank load, divided by
    the sum over layers of the largest. 1 is perfect. The *imbalance* is its inverse.
    """

    _placement: _core.Placement
    _expert_load: Load
    _num_groups: int
    _policy: str
    _group_rule: str
    _layer_ids: tuple[int, ...]

    def __init__(self) -> None:
        raise TypeError("plans come from Planner.plan, Plan.from_phy2log and Plan.load")

    @classmethod
    def _made(
        cls,
        placement: _core.Placement,
        expert_load: Load,
        num_groups: int,
        policy: str,
        layer_ids: Sequence[int] | None,
        group_rule: str = "free",
    ) -> Self:
        """A plan of parts that fit; the load is copied, since its owner may change it."""
        if not isinstance(policy, str):
            raise wrong_type("policy", policy, "a name")
        plan = object.__new__(cls)
        plan._placement = placement
        plan._expert_load = expert_load + np.float32(0)  # a copy in which -0.0, too, is 0.0
        plan._expert_load.flags.writeable = False
        plan._num_groups = num_groups
        plan._policy = policy
        plan._group_rule = group_rule
        plan._layer_ids = _checked_layer_ids(layer_ids, placement.num_layers)
        return plan

    @classmethod
    def from_phy2log(
        cls,
        topology: _core.Topology,
        phy2log: npt.ArrayLike,
        load: LoadLike,
        *,
        num_groups: int = 1,
        policy: str = "given",
        layer_ids: Sequence[int] | None = None,
    ) -> Self:
        """A plan of a placement that came from elsewhere: an engine's map, another planner.

        Args:
            topology: The machines.
            phy2log: `[L, R]`, integers: the expert in each slot. Replicas are numbered by slot.
            load: `[L, E]`, the load to judge it by.
            num_groups: In how many groups the experts are.
            policy: A name for where it came from.
            layer_ids: The number of each layer in the model, `[L]`; by default from 0.

        Raises:
            InvalidInputError: ``wrong_type``, ``ragged``, ``masked``, ``wrong_dtype`` or
                ``wrong_shape`` for ``phy2log``, ``out_of_range`` for an expert that does not
                exist, ``too_small`` for one without a slot; ``wrong_type`` for the topology;
                ``not_divisor`` if experts do not divide into groups; for the load and the
                layers as :meth:`Planner.plan`.
        """
        expert_load = as_load(load)
        num_layers, num_experts = expert_load.shape
        slots = as_slots(phy2log, (num_layers, as_topology(topology).num_slots))
        num_groups = _plan_json.checked_groups(num_groups, num_experts)
        placement = _core.Placement(topology, num_experts, slots.ravel())
        placement.rank_load(expert_load)  # refuses what is no load
        return cls._made(placement, expert_load, num_groups, policy, layer_ids)

    # What it is

    @property
    def topology(self) -> _core.Topology:
        """The machines."""
        return self._placement.topology

    @property
    def num_layers(self) -> int:
        """L."""
        return self._placement.num_layers

    @property
    def num_experts(self) -> int:
        """E, the logical experts of each layer."""
        return self._placement.num_experts

    @property
    def num_groups(self) -> int:
        """In how many groups the experts are."""
        return self._num_groups

    @property
    def policy(self) -> str:
        """The name of the policy that made it."""
        return self._policy

    @property
    def group_rule(self) -> str:
        """The rule for groups it was made under: ``"strict"``, ``"priced"`` or ``"free"``."""
        return self._group_rule

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The number of each layer in the model, `[L]`."""
        return self._layer_ids

    @property
    def expert_load(self) -> Load:
        """`[L, E]` float32, the load it was made for."""
        return self._expert_load

    @cached_property
    def phy2log(self) -> npt.NDArray[np.int64]:
        """`[L, R]` int64, the expert in each slot. Rank `d` holds slots `d R/D` onwards."""
        return self._placement.phy2log

    @cached_property
    def log2phy(self) -> npt.NDArray[np.int64]:
        """`[L, E, X]` int64, the slots of each expert's replicas; -1 pads."""
        return self._placement.log2phy

    @cached_property
    def logcnt(self) -> npt.NDArray[np.int64]:
        """`[L, E]` int64, how many replicas each expert has."""
        return self._placement.logcnt

    # How good it is

    @cached_property
    def rank_load(self) -> npt.NDArray[np.float64]:
        """`[L, D]` float64, what each rank carries if an expert's replicas share its tokens
        evenly; in the unit of the load."""
        return _read_only(self._placement.rank_load(self._expert_load))

    @cached_property
    def rank_time(self) -> npt.NDArray[np.float64]:
        """`[L, D]` float64, how long each rank takes: its load over its speed, where the mean speed
        of the ranks that are not dead counts as 1. The rank load, if all are equally fast."""
        return _read_only(rank_times(self.topology, self.rank_load))

    @property
    def balance(self) -> float:
        """Sum over layers of the mean rank load / sum over layers of the largest; 1 is perfect,
        and what an all-zero load has. Where ranks differ in speed, their times count for their
        loads; dead ranks count for nothing."""
        mean, largest = self._mean_and_largest
        total = float(largest.sum())
        return float(mean.sum()) / total if total > 0 else 1.0

    @property
    def imbalance(self) -> float:
        """Largest over mean rank load, both summed over layers: the inverse of the balance."""
        return 1.0 / self.balance

    @cached_property
    def layer_imbalance(self) -> npt.NDArray[np.float64]:
        """`[L]` float64, largest over mean rank load of each layer; 1 for a layer without load."""
        mean, largest = self._mean_and_largest
        ones = np.ones(self.num_layers)
        return _read_only(np.divide(largest, mean, out=ones, where=mean > 0))

    @cached_property
    def _mean_and_largest(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """`[L]` each, of the rank times; rounding does not put a mean above its largest."""
        largest = self.rank_time.max(axis=1)
        num_live = self.topology.num_gpus - len(self.topology.dead)
        mean = self.rank_load.sum(axis=1) / num_live
        return np.minimum(mean, largest), largest

    @cached_property
    def lower_bound(self) -> npt.NDArray[np.float64]:
        """`[L]` float64, a load that some rank carries at least, whatever the placement.

        The largest of the mean rank load; the least largest share of an expert that any number of
        replicas could give; what ranks that are slow, or have few slots, can carry; and, under
        ``group_rule="strict"``, the best assignment of groups to nodes. Where ranks have two
        slots, :meth:`tight_lower_bound` is higher.
        """
        return _read_only(self._bounds.max(axis=1))

    @cached_property
    def _bounds(self) -> npt.NDArray[np.float64]:
        """`[L, 4]` float64, what :attr:`lower_bound` is the largest of, in that order."""
        return _core.bounds(self._expert_load, self.topology, self._groups_that_stay)

    @property
    def _groups_that_stay(self) -> int:
        """How many groups are each on one node by rule; 1 where there is no such rule, or where
        the loss of a node has left no way to keep it."""
        keeps = self._group_rule == "strict" and not self.crossing_tokens.any()
        return self._num_groups if keeps else 1

    # What groups have to do with it

    @cached_property
    def crossing_tokens(self) -> npt.NDArray[np.float64]:
        """`[L]` float64, how many tokens are expected to cross to another node: those of experts
        that are served off the home of their group, the node that serves most of its tokens (ties
        to the lowest node). In the unit of the load; each expert's tokens are shared evenly by its
        replicas.

        With group-limited routing, as in DeepSeek-V3 and R1, a token goes to few groups, and is
        sent once to each node where it has any. So tokens served at the home of their group cost
        no further transfer between nodes, and the others one each.
        """
        topology = self.topology
        num_nodes, size = topology.num_nodes, self.num_experts // self._num_groups
        slots = self.phy2log
        gpu_of = np.repeat(np.arange(topology.num_gpus), topology.slots)
        node_of = np.broadcast_to(gpu_of // topology.gpus_per_node, slots.shape)
        layer, slot = np.nonzero(slots >= 0)
        expert = slots[layer, slot]
        share = self._expert_load.astype(np.float64) / self.logcnt
        served = np.zeros((self.num_layers, self._num_groups, num_nodes))
        np.add.at(served, (layer, expert // size, node_of[layer, slot]), share[layer, expert])
        home = served.argmax(axis=2)[..., None]
        np.put_along_axis(served, home, 0.0, axis=2)
        return _read_only(served.sum(axis=(1, 2)))

    @property
    def crossing_share(self) -> float:
        """:attr:`crossing_tokens` of all layers, as a part of all tokens: 0 where groups stay."""
        total = float(self._expert_load.sum(dtype=np.float64))
        return float(self.crossing_tokens.sum()) / total if total > 0 else 0.0

    @cached_property
    def group_cost(self) -> GroupCost:
        """What the rule for groups costs: this plan beside one of the balanced policy, with its
        default budget, that ignores groups.

        Cost: that plan, once; see :class:`Planner`.
        """
        from eplb_rs.planner import Planner

        planner = Planner(self.topology, self._num_groups, "balanced", group_rule="free")
        free = planner.plan(self._expert_load)
        return GroupCost(
            balance=self.balance,
            balance_without=free.balance,
            crossing_share=self.crossing_share,
            crossing_share_without=free.crossing_share,
        )

    def tight_lower_bound(self) -> npt.NDArray[np.float64]:
        """`[L]` float64, a bound at least as high as :attr:`lower_bound`, which takes longer.

        It is higher where live ranks are equally fast and have two slots, or some of them one:
        there it proves, with prices on the sizes of replicas, that no choice of counts does better.

        Cost: 0.2 to 3 ms a layer of 256 experts on 288 slots of 144 GPUs, by the load.
        """
        upper = self.rank_time.max(axis=1).tolist()
        groups = self._groups_that_stay
        return _read_only(_core.tight_lower_bound(self._expert_load, self.topology, groups, upper))

    @property
    def gap(self) -> float:
        """Mean over layers of how far the largest rank load is above :attr:`lower_bound`: at most
        so much better can any plan be. 0 for a plan that is proved best."""
        largest = self.rank_time.max(axis=1)
        bound = self.lower_bound
        over = np.divide(largest, bound, out=np.ones_like(bound), where=bound > 0)
        return float(np.maximum(over - 1.0, 0.0).mean())

    # How to get there

    def transfers(self, previous: Plan, *, by_layer: bool = True) -> Transfers:
        """Who sends which expert to whom, in which round, for this plan to take the place of
        another.

        Sources are chosen from the same rank, then the same node, then anywhere, always the one
        with least to send so far. In a round each rank sends at most one expert and receives at
        most one; there are as few rounds as the busiest rank allows.

        Args:
            previous: The plan in force, of as many layers, experts and slots.
            by_layer: Whether each layer has rounds of its own, for engines that move a layer at a
                time; otherwise all layers share them.

        Raises:
            InvalidInputError: ``wrong_type``, or ``inconsistent`` for a plan of other sizes.
        """
        before = as_plan(previous, "previous")
        table = _core.transfers(before._placement, self._placement, by_layer)
        return Transfers(_read_only(table), self.topology, self.num_layers, by_layer)

    @property
    def duplicates(self) -> int:
        """How many slots, over all layers, repeat an expert that an earlier slot of their rank
        holds. They serve no balance."""
        return int(self.layer_duplicates.sum())

    @cached_property
    def layer_duplicates(self) -> npt.NDArray[np.int64]:
        """`[L]` int64, :attr:`duplicates` of each layer."""
        return _read_only(self._placement.duplicates())

    def with_load(self, load: LoadLike) -> Self:
        """The same placement judged by another load `[L, E]`, that of the next window, say.

        Raises:
            InvalidInputError: As :meth:`Planner.plan`; ``wrong_shape`` for other layers or
                experts.
        """
        expert_load = as_load(load)
        self._placement.rank_load(expert_load)  # refuses what is no load, or does not fit
        ids = self._layer_ids
        groups, rule = self._num_groups, self._group_rule
        return self._made(self._placement, expert_load, groups, self._policy, ids, rule)

    def with_shares(self, load: LoadLike | None = None) -> Shares:
        """The best split of a load over the replicas there are, without moving a weight.

        Args:
            load: `[L, E]`, the load that has come; by default the one the plan was made for.

        Raises:
            InvalidInputError: As :meth:`with_load`.

        Cost: the first call prepares the placement; see :class:`eplb_rs.shares.Splitter`.
        """
        return self._splitter.split(self._expert_load if load is None else load)

    @cached_property
    def _splitter(self) -> Splitter:
        from eplb_rs.shares import Splitter

        return Splitter(self)

    # How it is kept

    def to_json(self) -> str:
        """The plan as JSON, one line per layer and array."""
        return _plan_json.text_of(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan in a text that :meth:`to_json` wrote.

        Raises:
            InvalidInputError: ``wrong_type``, ``not_json``, ``wrong_format`` for JSON that is no
                plan, or what :meth:`from_phy2log` says of its content; ``inconsistent`` if its
                maps disagree.
        """
        return cls._made(*_plan_json.parsed(text))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`to_json` to a file, wholly or not at all.

        Raises:
            InvalidInputError: ``wrong_type`` or ``unwritable_file``.
        """
        write_whole(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The plan in a file that :meth:`save` wrote.

        Raises:
            InvalidInputError: ``wrong_type``, ``missing_file`` or ``unreadable_file``, else as
                :meth:`from_json`.
        """
        return cls.from_json(_plan_json.read(path))

    def __reduce__(self) -> tuple[Any, ...]:
        parts = (
            self.topology,
            self.num_experts,
            np.array(self.phy2log),
            np.array(self.log2phy),
            np.array(self.logcnt),
            np.array(self._expert_load),
            self._num_groups,
            self._policy,
            self._layer_ids,
            self._group_rule,
        )
        return _rebuild, (type(self), *parts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return (
            self._placement == other._placement
            and self._layer_ids == other._layer_ids
            and bool(np.array_equal(self._expert_load, other._expert_load))
        )

    def __hash__(self) -> int:
        return hash((self.topology, self.phy2log.tobytes(), self._expert_load.tobytes()))

    def __repr__(self) -> str:
        return (
            f"<Plan of {self.num_layers} layers x {self.num_experts} experts on "
            f"{self.topology.num_slots} slots of {self.topology.num_gpus} GPUs: "
            f"balance {self.balance:.4f}>"
        )


def _rebuild(
    cls: type[Plan],
    topology: _core.Topology,
    num_experts: int,
    phy2log: npt.NDArray[np.int64],
    log2phy: npt.NDArray[np.int64],
    logcnt: npt.NDArray[np.int64],
    expert_load: Load,
    num_groups: int,
    policy: str,
    layer_ids: tuple[int, ...],
    group_rule: str = "free",
) -> Plan:
    placement = _core.Placement(
        topology, num_experts, phy2log.ravel(), log2phy.ravel(), logcnt.ravel()
    )
    return cls._made(placement, expert_load, num_groups, policy, layer_ids, group_rule)


def as_plan(plan: object, argument: str = "plan") -> Plan:
    """A plan.

    Raises:
        InvalidInputError: ``wrong_type``.
    """
    if not isinstance(plan, Plan):
        hint = "Plan.from_phy2log makes one of an engine's map"
        raise wrong_type(argument, plan, "an eplb_rs.Plan", hint)
    return plan


def rank_times(
    topology: _core.Topology, rank_load: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """How long ranks take for loads `[L, D]`: see :attr:`Plan.rank_time`."""
    if topology.is_even:
        return rank_load
    speeds = np.array(topology.speeds)
    live = np.ones(len(speeds), dtype=bool)
    live[topology.dead] = False
    times: npt.NDArray[np.float64] = rank_load * (speeds[live].mean() / speeds)
    return times


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.flags.writeable = False
    return array


def _checked_layer_ids(layer_ids: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    if layer_ids is None:
        return tuple(range(num_layers))
    try:
        ids = list(islice(layer_ids, num_layers + 1))
    except TypeError:
        got, code = type(layer_ids).__name__, "wrong_type"
    else:
        if len(ids) == num_layers:
            numbers = tuple(as_count(layer, "layer_ids", least=0) for layer in ids)
            if len(set(numbers)) == num_layers:
                return numbers
            twice = next(layer for layer in numbers if numbers.count(layer) > 1)
            got, code = f"{twice} twice", "repeated"
        else:
            got = f"{len(ids)} numbers" if len(ids) <= num_layers else "more numbers"
            code = "wrong_shape"
    expected = f"{num_layers} different whole numbers, one per layer"
    raise InvalidInputError(code=code, argument="layer_ids", got=got, expected=expected)
