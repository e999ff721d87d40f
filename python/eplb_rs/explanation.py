"""Why a plan is no better: which constraint binds in which layer, and what would mend it.

>>> import eplb_rs
>>> topology = eplb_rs.Topology(num_nodes=1, gpus_per_node=4, slots_per_gpu=2)
>>> plan = eplb_rs.Planner(topology, policy="balanced").plan([[90, 1, 1, 1, 1, 1]])
>>> layer = eplb_rs.explain(plan).layers[0]
>>> layer.binding, layer.expert, layer.slots_missing
('hot_expert', 0, 1)

Letters: L layers, E logical experts, D ranks (GPUs).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from eplb_rs import _core
from eplb_rs.errors import InvalidInputError
from eplb_rs.plan import Plan, as_plan
from eplb_rs.planner import Planner

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["BINDINGS", "Binding", "Explanation", "LayerExplanation", "Mend", "explain"]

_FORMAT = "eplb-rs explanation"
_FORMAT_VERSION = 1

Binding: TypeAlias = Literal["nothing", "hot_expert", "few_slots", "groups", "slow_rank", "search"]

BINDINGS: dict[Binding, str] = {
    "nothing": "even: no plan does better by more than the tolerance",
    "hot_expert": "one expert is too hot for the copies there are slots for",
    "few_slots": "too few slots on a rank: large replicas lack small ones to go with",
    "groups": "groups of experts have to stay on one node",
    "slow_rank": "a rank is too slow, or has too few slots, for its part",
    "search": "nothing that is known: there may be a better plan",
}
"""What each binding means, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerExplanation:
    """One layer. Loads are in the unit of the plan's load; where ranks differ in speed, they are
    times, and the mean speed counts as 1.

    Attributes:
        layer: Its number in the model.
        binding: What keeps its heaviest rank from the mean; see :data:`BINDINGS`.
        mean: The mean rank load.
        largest: The largest rank load.
        bound: What some rank carries at least, whatever the plan.
        gap: `largest / bound - 1`: at most so much better can any plan be.
        above_mean: `largest / mean - 1`.
        expert: The expert whose share is the largest, where that binds.
        copies: How many replicas it has in the plan.
        slots_missing: How many more slots, on all ranks, would bring the least largest share down
            to the mean.
    """

    layer: int
    binding: Binding
    mean: float
    largest: float
    bound: float
    gap: float
    above_mean: float
    expert: int | None = None
    copies: int | None = None
    slots_missing: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mend:
    """A change, and the balance that a plan then reaches.

    Attributes:
        change: What to change.
        balance: The balance of a plan of the balanced policy, made for the same load.
    """

    change: str
    balance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a plan is no better.

    Attributes:
        layers: What binds in each layer.
        balance: The balance of the plan.
        best_balance: What the balance of any plan is at most.
        gap: Mean over layers of :attr:`LayerExplanation.gap`.
        mends: What would help, most helpful first; planned, not guessed.
    """

    layers: Sequence[LayerExplanation]
    balance: float
    best_balance: float
    gap: float
    mends: Sequence[Mend]

    def figures(self) -> dict[str, Any]:
        """The explanation as what ``json.dumps`` takes: ``format`` and ``version``
        (``"eplb-rs explanation"``, 1), and the attributes under their names."""
        return {"format": _FORMAT, "version": _FORMAT_VERSION, **asdict(self)}

    def text(self, *, top: int = 5) -> str:
        """The explanation as a table.

        Args:
            top: How many of the layers that lose most.
        """
        lines = [
            f"balance {self.balance:.4f}; no plan reaches more than {self.best_balance:.4f} "
            f"(mean gap {100 * self.gap:.3g} %)",
            "",
            "layers  what binds",
        ]
        counted = Counter(layer.binding for layer in self.layers)
        lines += [f"{number:6}  {BINDINGS[binding]}" for binding, number in counted.most_common()]
        lines += ["", "layers that lose most"]
        lines.append(f"{'layer':>5}  {'above mean':>10}  {'bound':>8}  {'gap':>8}  what binds")
        order = sorted(self.layers, key=lambda layer: -layer.above_mean * layer.mean)
        for layer in order[:top]:
            bound = layer.bound / layer.mean - 1 if layer.mean > 0 else 0.0
            lines.append(
                f"{layer.layer:5}  {_percent(layer.above_mean)}  {_percent(bound, 8)}  "
                f"{_percent(layer.gap, 8)}  {_cause(layer)}"
            )
        if self.mends:
            lines += ["", "what would help"]
            lines += [f"  {mend.balance:.4f}  {mend.change}" for mend in self.mends]
        return "\n".join(lines) + "\n"


def explain(plan: Plan, *, tolerance: float = 1e-3, mend: bool = True) -> Explanation:
    """Says which constraint binds in which layer of a plan, and what would help.

    A layer within the tolerance of its mean is even: nothing binds. Otherwise the constraint named
    is the one whose lower bound is the highest, where it explains at least half of what the best
    bound is above the mean; or, if even that bound is further below the plan than it is above the
    mean, the search itself.

    Args:
        plan: The plan.
        tolerance: How far above its mean, in parts of it, the heaviest rank of an even layer is.
        mend: Whether to plan what would help: one slot more on each rank, no rule for groups, and
            ranks of equal speed, each where it binds.

    Raises:
        InvalidInputError: ``wrong_type`` for the plan, ``out_of_range`` for the tolerance.

    Cost: :meth:`Plan.tight_lower_bound`, and a plan of the balanced policy for each mend.
    """
    plan = as_plan(plan)
    tolerance = _checked_tolerance(tolerance)
    mean, largest = plan._mean_and_largest
    bound = np.minimum(plan.tight_lower_bound(), largest)
    layers = [_layer(plan, row, float(bound[row]), tolerance) for row in range(plan.num_layers)]
    total = float(bound.sum())
    bindings = {layer.binding for layer in layers}
    return Explanation(
        layers=tuple(layers),
        balance=plan.balance,
        best_balance=float(mean.sum()) / total if total > 0 else 1.0,
        gap=float(np.mean([layer.gap for layer in layers])),
        mends=tuple(_mends(plan, bindings)) if mend else (),
    )


def _checked_tolerance(tolerance: object) -> float:
    if isinstance(tolerance, int | float) and 0 <= tolerance < 1:
        return float(tolerance)
    raise InvalidInputError(
        code="out_of_range",
        argument="tolerance",
        got=repr(tolerance),
        expected="a number of at least 0, below 1",
    )


def _layer(plan: Plan, row: int, bound: float, tolerance: float) -> LayerExplanation:
    mean, largest = (float(values[row]) for values in plan._mean_and_largest)
    above = largest / mean - 1 if mean > 0 else 0.0
    gap = largest / bound - 1 if bound > 0 else 0.0
    of_mean, of_share, of_ranks, of_groups = (float(value) for value in plan._bounds[row])
    expert = copies = None
    missing = 0
    binding: Binding
    if above <= tolerance:
        binding = "nothing"
    elif bound - of_mean < largest - bound:
        binding = "search"
    elif max(of_share, of_ranks, of_groups) - of_mean < 0.5 * (bound - of_mean):
        binding = "few_slots"
    elif of_groups > max(of_share, of_ranks):
        binding = "groups"
    elif of_ranks > of_share:
        binding = "slow_rank"
    else:
        binding = "hot_expert"
        load = plan.expert_load[row].astype(np.float64)
        expert = int(np.argmax(load / plan.logcnt[row]))
        copies = int(plan.logcnt[row, expert])
        needed = np.ceil(load / mean).clip(1).sum()
        live = plan.phy2log[row] >= 0
        missing = max(0, int(needed) - int(live.sum()))
    return LayerExplanation(
        layer=plan.layer_ids[row],
        binding=binding,
        mean=mean,
        largest=largest,
        bound=bound,
        gap=gap,
        above_mean=above,
        expert=expert,
        copies=copies,
        slots_missing=missing,
    )


def _mends(plan: Plan, bindings: set[Binding]) -> list[Mend]:
    """What would help where something binds, planned with the balanced policy."""
    topology = plan.topology
    rule = "strict" if plan._groups_that_stay > 1 else "free"
    slots, dead = topology.slots, topology.dead
    trials: list[tuple[str, _core.Topology, str]] = []
    if bindings & {"search", "groups", "few_slots", "hot_expert", "slow_rank"}:
        trials.append(("the balanced policy, nothing else changed", topology, rule))
    if bindings & {"hot_expert", "few_slots", "groups"}:
        more = topology.with_slots([number + 1 for number in slots])
        change = f"one more slot a GPU ({sum(slots)} to {sum(slots) + len(slots)} slots)"
        trials.append((change, more, rule))
    if rule == "strict":
        trials.append(('group_rule="free": groups may leave their node', topology, "free"))
    if "slow_rank" in bindings:
        equal = _core.Topology(topology.num_nodes, topology.gpus_per_node, max(slots), dead=dead)
        trials.append(("GPUs of equal speed, each with the most slots of any", equal, rule))
    mends = []
    for change, machines, groups in trials:
        planner = Planner(machines, plan.num_groups, "balanced", group_rule=groups)  # type: ignore[arg-type]
        mends.append(Mend(change=change, balance=planner.plan(plan.expert_load).balance))
    better = [mend for mend in mends if mend.balance > plan.balance + 1e-4]
    return sorted(better, key=lambda mend: -mend.balance)


def _percent(value: float, width: int = 10) -> str:
    return f"{100 * value:{width - 2}.3f} %"


def _cause(layer: LayerExplanation) -> str:
    if layer.binding != "hot_expert":
        return layer.binding
    cause = f"hot_expert: expert {layer.expert}, {layer.copies} copies"
    if layer.slots_missing:
        are = "slot is" if layer.slots_missing == 1 else "slots are"
        cause += f"; {layer.slots_missing} {are} missing"
    return cause
