"""A plan beside the placement that engines start with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eplb_rs._words import counted, duration, id_ranges, printable, quantity
from eplb_rs.errors import InvalidInputError
from eplb_rs.planner import Planner
from eplb_rs.report.bars import rank_bars
from eplb_rs.report.figures import (
    above_bound,
    bound_imbalance,
    groups_stay,
    layer_figures,
    topology_figures,
    totals,
)
from eplb_rs.report.style import Style, facts_text
from eplb_rs.report.tables import rank_table, replicated, worst

if TYPE_CHECKING:
    from eplb_rs.loads import LoadTrace
    from eplb_rs.plan import Plan

__all__ = ["HotExpert", "PlanningTime", "Report", "placement_before"]

_FORMAT = "eplb-rs report"
_FORMAT_VERSION = 1


class PlanningTime(NamedTuple):
    """How long planning took."""

    median_us: float
    """The median of the calls, in microseconds."""
    num_calls: int
    """How many calls were timed."""


class HotExpert(NamedTuple):
    """An expert that carries much of its layer's load."""

    layer_id: int
    expert: int
    share: float
    """Its part of the layer's load, 0 to 1."""
    num_replicas: int
    per_replica: float
    """What each replica carries, in mean rank loads of the layer."""


def placement_before(plan: Plan) -> Plan:
    """The placement that engines start with, for a plan's machines and load."""
    planner = Planner(plan.topology, plan.num_groups, policy="trivial")
    return planner.plan(plan.expert_load, layer_ids=plan.layer_ids)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A plan beside the placement that engines start with.

    Attributes:
        plan: The plan.
        trace: The recorded loads it was made for, if they are known.
        time: How long planning took, if it was measured.
        assumed: What was not given and so assumed, by name.
    """

    plan: Plan
    trace: LoadTrace | None = None
    time: PlanningTime | None = None
    assumed: dict[str, int] | None = None

    @cached_property
    def before(self) -> Plan:
        """The placement that engines start with."""
        return placement_before(self.plan)

    def worst_layers(self, num: int) -> list[int]:
        """The rows (not ids) of the layers whose ranks are least even under the plan, worst
        first; ties to the lower row."""
        order = np.argsort(-self.plan.layer_imbalance, kind="stable")
        return [int(row) for row in order[:num]]

    def hottest_experts(self, num: int) -> list[HotExpert]:
        """The experts that carry the largest shares of their layers; ties to the lower layer and
        expert."""
        plan = self.plan
        total = plan.expert_load.sum(axis=1, dtype=np.float64, keepdims=True)
        share = plan.expert_load / np.where(total > 0, total, 1.0)
        order = np.argsort(-share, axis=None, kind="stable")[:num]
        found = []
        for row, expert in zip(*np.unravel_index(order, share.shape), strict=True):
            replicas = int(plan.logcnt[row, expert])
            part = float(share[row, expert])
            per_replica = part * plan.topology.num_gpus / replicas
            layer_id = plan.layer_ids[row]
            found.append(HotExpert(layer_id, int(expert), part, replicas, per_replica))
        return found

    def row_of(self, layer_id: int) -> int:
        """The row of a layer.

        Raises:
            InvalidInputError: ``out_of_range`` if the plan does not have it.
        """
        ids = self.plan.layer_ids
        if layer_id not in ids:
            raise InvalidInputError(
                code="out_of_range",
                argument="layer",
                got=str(layer_id),
                expected=f"a layer of the plan: {id_ranges(ids)}",
            )
        return ids.index(layer_id)

    # For programs

    def figures(self, *, top: int = 5, layer: int | None = None) -> dict[str, Any]:
        """The figures as what ``json.dumps`` takes.

        Args:
            top: How many of the hottest experts.
            layer: Only this layer under ``layers``, with the load of each rank.

        Returns:
            ``format``, ``version``: ``"eplb-rs report"``, 1.
            ``loads``: ``path``, ``format``, ``windows`` (their numbers), ``empty_layers``; or
            null where only the plan is known.
            ``topology``: ``num_nodes``, ``gpus_per_node``, ``slots_per_gpu``.
            ``num_layers``, ``num_experts``, ``num_groups``, ``num_replicas``: whole numbers.
            ``policy``: its name. ``groups_stay``: whether each group is on one node.
            ``assumed``: what was not given, by name.
            ``planning``: ``median_us``, ``num_calls``; or null.
            ``before``, ``after``: ``balance``, ``imbalance``, ``worst_layer``,
            ``worst_layer_imbalance``, ``largest_rank_load`` (summed over layers), ``duplicates``.
            ``lower_bound``: of ``largest_rank_load``; ``above_bound``: 0.01 is one per cent.
            ``layers``: for each, ``layer``, ``imbalance_before``, ``imbalance_after``,
            ``mean_rank_load``, ``largest_rank_load_before``, ``largest_rank_load_after``,
            ``lower_bound``, ``duplicates``; with ``layer`` also ``rank_load_before``,
            ``rank_load_after``.
            ``hottest_experts``: for each, ``layer``, ``expert``, ``share`` (of the layer's load),
            ``num_replicas``, ``per_replica`` (in mean rank loads).

        Raises:
            InvalidInputError: ``out_of_range`` for the layer.
        """
        plan, trace = self.plan, self.trace
        topology = plan.topology
        rows = range(plan.num_layers) if layer is None else [self.row_of(layer)]
        return {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "loads": trace
            and {
                "path": str(trace.path),
                "format": trace.format,
                "windows": list(trace.windows),
                "empty_layers": list(trace.empty_layers),
            },
            "topology": topology_figures(topology),
            "num_layers": plan.num_layers,
            "num_experts": plan.num_experts,
            "num_groups": plan.num_groups,
            "num_replicas": topology.num_slots,
            "policy": plan.policy,
            "groups_stay": groups_stay(plan),
            "assumed": self.assumed or {},
            "planning": self.time and self.time._asdict(),
            "before": totals(self.before),
            "after": totals(plan),
            "lower_bound": float(plan.lower_bound.sum()),
            "above_bound": above_bound(plan),
            "layers": [
                layer_figures(plan, self.before, row, with_ranks=layer is not None) for row in rows
            ],
            "hottest_experts": [
                {
                    "layer": hot.layer_id,
                    "expert": hot.expert,
                    "share": hot.share,
                    "num_replicas": hot.num_replicas,
                    "per_replica": hot.per_replica,
                }
                for hot in self.hottest_experts(top)
            ],
        }

    # For people

    def text(self, style: Style | None = None, *, top: int = 5) -> str:
        """The report as text that fits a screen.

        Args:
            style: What the terminal can show; by default 80 columns without colours.
            top: How many of the worst layers and of the hottest experts.
        """
        style = style or Style()
        parts = [
            facts_text(self.facts(), style),
            self.summary_table(style),
            worst(self, style, top),
        ]
        row = int(np.argmax(self.before.layer_imbalance))
        if self.plan.topology.num_gpus > 1:
            parts.append(rank_bars(self, row, style, " (the worst before)"))
        return "\n\n".join(part for part in parts if part) + "\n"

    def layer_text(self, layer: int, style: Style | None = None, *, top: int = 5) -> str:
        """One layer as text: its figures, what each rank holds and carries.

        Raises:
            InvalidInputError: ``out_of_range`` if the plan does not have it.
        """
        style = style or Style()
        row, plan = self.row_of(layer), self.plan
        heading = (
            f"{style.bold(f'Layer {layer}')}: {plan.num_experts} experts in "
            f"{plan.topology.num_slots} slots of {plan.topology.num_gpus} ranks\n"
            f"imbalance {self.before.layer_imbalance[row]:.3f} before, "
            f"{plan.layer_imbalance[row]:.3f} after, "
            f"{bound_imbalance(plan)[row]:.3f} at best; "
            f"{counted(int(plan.layer_duplicates[row]), 'duplicate')}"
        )
        parts = [heading, rank_table(self, row, style), replicated(self, row, style, top)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def facts(self) -> list[tuple[str, str]]:
        """What was planned for what, as names and values."""
        plan, trace = self.plan, self.trace
        topology = plan.topology
        facts = []
        if trace is not None:
            facts.append(("loads", f"{printable(trace.path.name)} ({printable(trace.format)})"))
            if trace.num_windows_in_file > 1:
                facts.append(("", _windows_text(trace)))
        model = f"{counted(plan.num_layers, 'layer')} x {counted(plan.num_experts, 'expert')}"
        groups = f" in {plan.num_groups} groups" if plan.num_groups > 1 else ""
        facts.append(("model", model + groups))
        if trace is not None and trace.empty_layers:
            ids = id_ranges(trace.empty_layers)
            one = len(trace.empty_layers) == 1
            text = "layer {} carries no load and is" if one else "layers {} carry no load and are"
            facts.append(("", f"{text.format(ids)} left out"))
        machines = (
            f"{counted(topology.num_nodes, 'node')} x "
            f"{counted(topology.gpus_per_node, 'GPU')} x "
            f"{counted(topology.slots_per_gpu, 'slot')} = "
            f"{topology.num_slots} slots, {topology.num_slots - plan.num_experts} spare"
        )
        facts.append(("machines", machines))
        facts.append(("policy", f"{printable(plan.policy)}, {_reach(plan)}"))
        if self.assumed:
            pairs = (f"{name} {value}" for name, value in self.assumed.items())
            facts.append(("assumed", ", ".join(pairs)))
        if self.time is not None:
            calls = self.time.num_calls
            how = f"median of {calls} calls" if calls > 1 else "one call"
            facts.append(("planned in", f"{duration(self.time.median_us)} ({how})"))
        return facts

    def summary_rows(self) -> list[tuple[str, str, str, str]]:
        """Name, before, after and the best that any placement could reach."""
        plan, before = self.plan, self.before
        mean = float(plan.rank_load.mean(axis=1).sum())
        bound = float(plan.lower_bound.sum())
        best = bound / mean if mean > 0 else 1.0
        return [
            (
                "balance (mean / max rank load)",
                f"{before.balance:.4f}",
                f"{plan.balance:.4f}",
                f"{1 / best:.4f}",
            ),
            (
                "imbalance (max / mean)",
                f"{before.imbalance:.3f}",
                f"{plan.imbalance:.3f}",
                f"{best:.3f}",
            ),
            (
                "imbalance of the worst layer",
                f"{before.layer_imbalance.max():.3f}",
                f"{plan.layer_imbalance.max():.3f}",
                f"{bound_imbalance(plan).max():.3f}",
            ),
            (
                "largest rank load, sum of layers",
                quantity(float(before.rank_load.max(axis=1).sum())),
                quantity(float(plan.rank_load.max(axis=1).sum())),
                quantity(bound),
            ),
            (
                "largest rank load, above the bound",
                f"{100 * above_bound(before):.1f} %",
                f"{100 * above_bound(plan):.1f} %",
                "0.0 %",
            ),
            (
                "duplicates (expert twice on a rank)",
                f"{before.duplicates}",
                f"{plan.duplicates}",
                "0",
            ),
        ]

    def summary_table(self, style: Style) -> str:
        """The table before and after."""
        rows = self.summary_rows()
        widths = [max(len(row[0]) for row in rows), 10, 10, 10]
        names = zip(("", "before", "after", "bound"), widths, strict=True)
        lines = [style.dim("".join(f"{name:>{width}}" for name, width in names))]
        for name, before, after, bound in rows:
            lines.append(
                f"{name:<{widths[0]}}"
                + style.before(f"{before:>{widths[1]}}")
                + style.after(f"{after:>{widths[2]}}")
                + f"{bound:>{widths[3]}}"
            )
        return "\n".join(lines)


def _reach(plan: Plan) -> str:
    if plan.topology.num_nodes == 1:
        return "on one node"
    if plan.num_groups > 1 and groups_stay(plan):
        return "hierarchical: each group of experts stays on one node"
    return "global: any expert on any node"


def _windows_text(trace: LoadTrace) -> str:
    if len(trace.windows) == trace.num_windows_in_file:
        return f"all {len(trace.windows)} windows, summed"
    one = len(trace.windows) == 1
    text = f"window{'s' * (not one)} {id_ranges(trace.windows)} of {trace.num_windows_in_file}"
    if trace.labels is not None:
        labels = list(dict.fromkeys(trace.labels))
        more = f" and {len(labels) - 4} more" if len(labels) > 4 else ""
        text += f" ({printable(', '.join(labels[:4]))}{more})"
    return text if one else f"{text}, summed"
