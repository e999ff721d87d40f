"""What a plan achieves, for people (text) and for programs (figures).

A plan is shown beside the placement that engines start with ("before"): slot `i` holds expert
`i mod E`, whatever the load.

Letters: L layers, E logical experts, D ranks (GPUs).
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_rs.errors import InvalidInputError
from eplb_rs.planner import Planner

if TYPE_CHECKING:
    from collections.abc import Iterable

    from eplb_rs.loads import LoadTrace
    from eplb_rs.plan import Plan

__all__ = ["HotExpert", "PlanningTime", "Report", "Style", "placement_before"]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """What the terminal can show.

    Attributes:
        width: In columns.
        colour: Whether it takes ANSI colours.
        blocks: Whether its encoding has block characters; ASCII is used otherwise.
    """

    width: int = 80
    colour: bool = False
    blocks: bool = True

    def bold(self, text: str) -> str:
        """Text that stands out."""
        return self._painted(text, "1")

    def dim(self, text: str) -> str:
        """Text that stands back."""
        return self._painted(text, "2")

    def before(self, text: str) -> str:
        """Text about the placement that engines start with."""
        return self._painted(text, "33")

    def after(self, text: str) -> str:
        """Text about the plan."""
        return self._painted(text, "32")

    def _painted(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and text.strip() else text


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
            "topology": {
                "num_nodes": topology.num_nodes,
                "gpus_per_node": topology.gpus_per_node,
                "slots_per_gpu": topology.slots_per_gpu,
            },
            "num_layers": plan.num_layers,
            "num_experts": plan.num_experts,
            "num_groups": plan.num_groups,
            "num_replicas": topology.num_slots,
            "policy": plan.policy,
            "groups_stay": _groups_stay(plan),
            "assumed": self.assumed or {},
            "planning": self.time and self.time._asdict(),
            "before": _totals(self.before),
            "after": _totals(plan),
            "lower_bound": float(plan.lower_bound.sum()),
            "above_bound": _above_bound(plan),
            "layers": [self._layer_figures(row, with_ranks=layer is not None) for row in rows],
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

    def _layer_figures(self, row: int, *, with_ranks: bool) -> dict[str, Any]:
        plan, before = self.plan, self.before
        figures = {
            "layer": plan.layer_ids[row],
            "imbalance_before": float(before.layer_imbalance[row]),
            "imbalance_after": float(plan.layer_imbalance[row]),
            "mean_rank_load": float(plan.rank_load[row].mean()),
            "largest_rank_load_before": float(before.rank_load[row].max()),
            "largest_rank_load_after": float(plan.rank_load[row].max()),
            "lower_bound": float(plan.lower_bound[row]),
            "duplicates": int(plan.layer_duplicates[row]),
        }
        if with_ranks:
            figures["rank_load_before"] = before.rank_load[row].tolist()
            figures["rank_load_after"] = plan.rank_load[row].tolist()
        return figures

    # For people

    def text(self, style: Style | None = None, *, top: int = 5) -> str:
        """The report as text that fits a screen.

        Args:
            style: What the terminal can show; by default 80 columns without colours.
            top: How many of the worst layers and of the hottest experts.
        """
        style = style or Style()
        parts = [self._heading(style), self.summary_table(style), self._worst(style, top)]
        row = int(np.argmax(self.before.layer_imbalance))
        if self.plan.topology.num_gpus > 1:
            parts.append(self._rank_bars(row, style, " (the worst before)"))
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
            f"{_bound_imbalance(plan)[row]:.3f} at best; "
            f"{_counted(int(plan.layer_duplicates[row]), 'duplicate')}"
        )
        parts = [heading, self._rank_table(row, style), self._replicated(row, style, top)]
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
        model = f"{_counted(plan.num_layers, 'layer')} x {_counted(plan.num_experts, 'expert')}"
        groups = f" in {plan.num_groups} groups" if plan.num_groups > 1 else ""
        facts.append(("model", model + groups))
        if trace is not None and trace.empty_layers:
            ids = id_ranges(trace.empty_layers)
            one = len(trace.empty_layers) == 1
            text = "layer {} carries no load and is" if one else "layers {} carry no load and are"
            facts.append(("", f"{text.format(ids)} left out"))
        machines = (
            f"{_counted(topology.num_nodes, 'node')} x "
            f"{_counted(topology.gpus_per_node, 'GPU')} x "
            f"{_counted(topology.slots_per_gpu, 'slot')} = "
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
                f"{_bound_imbalance(plan).max():.3f}",
            ),
            (
                "largest rank load, sum of layers",
                quantity(float(before.rank_load.max(axis=1).sum())),
                quantity(float(plan.rank_load.max(axis=1).sum())),
                quantity(bound),
            ),
            (
                "largest rank load, above the bound",
                f"{100 * _above_bound(before):.1f} %",
                f"{100 * _above_bound(plan):.1f} %",
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

    def _heading(self, style: Style) -> str:
        lines = []
        for name, value in self.facts():
            wrapped = textwrap.wrap(value, max(style.width - 12, 20)) or [""]
            lines.append(style.dim(f"{name:<12}") + wrapped[0])
            lines += [" " * 12 + line for line in wrapped[1:]]
        return "\n".join(lines)

    def _worst(self, style: Style, top: int) -> str:
        """The worst layers, and beside them the hottest experts."""
        layers = [f"{'worst layers':<12}{'before':>8}{'after':>8}"]
        layers += [
            f"{self.plan.layer_ids[row]:>12}"
            + style.before(f"{self.before.layer_imbalance[row]:8.3f}")
            + style.after(f"{self.plan.layer_imbalance[row]:8.3f}")
            for row in self.worst_layers(top)
        ]
        experts = ["hottest experts   of layer  replicas  each*"]
        experts += [
            f"{f'layer {hot.layer_id}':<9}{hot.expert:>6}{100 * hot.share:>10.1f} %"
            f"{hot.num_replicas:>10}{hot.per_replica:>7.2f}"
            for hot in self.hottest_experts(top)
        ]
        layers[0], experts[0] = style.dim(layers[0]), style.dim(experts[0])
        note = style.dim(f"{'* load of a replica; 1 = mean rank load':>{min(style.width, 79)}}")
        if style.width < 80:
            return "\n".join([*layers, "", *experts, note])
        blank = " " * 28
        lines = [
            f"{left}        {right}"
            for left, right in zip_longest(layers, experts, fillvalue=blank)
        ]
        return "\n".join(line.rstrip() for line in [*lines, note])

    def _rank_bars(self, row: int, style: Style, why: str) -> str:
        """A bar per rank of one layer, before and after on one scale."""
        plan, before = self.plan, self.before
        mean = float(plan.rank_load[row].mean()) or 1.0
        loads = [before.rank_load[row] / mean, plan.rank_load[row] / mean]
        top = max(float(load.max()) for load in loads) or 1.0
        num_ranks = plan.topology.num_gpus
        room = style.width - 8
        beside = 2 * num_ranks + 3 <= room
        ranks_per_bar = 1 if beside else -(-num_ranks // room)
        height = 6 if beside else 4
        charts = [
            _chart(_grouped(load, ranks_per_bar), top, height, style.blocks) for load in loads
        ]
        ticks = _ticks(plan, ranks_per_bar, len(charts[0][0]))
        titles = [
            f"before, max {loads[0].max():.2f}",
            f"after, max {loads[1].max():.2f}",
        ]
        painted = [
            [style.before(line) for line in charts[0]],
            [style.after(line) for line in charts[1]],
        ]
        scale = [f"{top:5.1f} " if line == 0 else " " * 6 for line in range(height)]
        what = "a bar per rank" if ranks_per_bar == 1 else f"a bar per {ranks_per_bar} ranks"
        title = f"Rank loads of layer {plan.layer_ids[row]}{why}, {what}; 1 = mean"
        lines = [style.dim(line) for line in textwrap.wrap(title, style.width)]
        width = len(charts[0][0])
        if beside:
            lines.append(f"{'':6}{titles[0]:<{width}}   {titles[1]}".rstrip())
            for mark, left, right in zip(scale, *painted, strict=True):
                lines.append(f"{style.dim(mark)}{left}   {right}".rstrip())
            lines.append(style.dim(f"{' rank ':6}{ticks:<{width}}   {ticks}".rstrip()))
            return "\n".join(lines)
        for chart_title, chart in zip(titles, painted, strict=True):
            lines.append(f"{'':6}{chart_title}")
            for mark, line in zip(scale, chart, strict=True):
                lines.append(f"{style.dim(mark)}{line}".rstrip())
        lines.append(style.dim(f"{' rank ':6}{ticks}".rstrip()))
        return "\n".join(lines)

    def _rank_table(self, row: int, style: Style) -> str:
        """What each rank of one layer holds and carries."""
        plan = self.plan
        load = plan.rank_load[row]
        mean = float(load.mean()) or 1.0
        top = float(load.max()) / mean or 1.0
        experts = plan.phy2log[row].reshape(plan.topology.num_gpus, -1)
        lines = [style.dim(f"{'rank':>4}{'load':>9}{'/ mean':>8}  {'':12}experts")]
        for rank, held in enumerate(experts.tolist()):
            if plan.topology.num_nodes > 1 and rank % plan.topology.gpus_per_node == 0:
                lines.append(style.dim(f"node {rank // plan.topology.gpus_per_node}"))
            names = [
                f"{expert}{f'x{held.count(expert)}' if held.count(expert) > 1 else ''}"
                for expert in dict.fromkeys(held)
            ]
            wrapped = textwrap.wrap(" ".join(names), max(style.width - 35, 20))
            bar = _bar(load[rank] / mean / top, 10, style.blocks)
            lines.append(
                f"{rank:>4}{quantity(load[rank]):>9}{load[rank] / mean:>8.3f}  "
                f"{style.after(f'{bar:<10}')}  {wrapped[0]}"
            )
            lines += [" " * 35 + line for line in wrapped[1:]]
        return "\n".join(lines)

    def _replicated(self, row: int, style: Style, top: int) -> str:
        """The hottest experts of one layer and the ranks that hold them."""
        plan = self.plan
        load = plan.expert_load[row]
        total = float(load.sum(dtype=np.float64)) or 1.0
        lines = [style.dim(f"{'expert':>6}{'of layer':>10}{'replicas':>10}  on ranks")]
        for expert in np.argsort(-load, kind="stable")[:top]:
            count = int(plan.logcnt[row, expert])
            ranks = sorted(plan.log2phy[row, expert, :count] // plan.topology.slots_per_gpu)
            names = " ".join(str(rank) for rank in ranks)
            wrapped = textwrap.wrap(names, max(style.width - 28, 20))
            lines.append(
                f"{expert:>6}{100 * load[expert] / total:>8.1f} %{count:>10}  {wrapped[0]}"
            )
            lines += [" " * 28 + line for line in wrapped[1:]]
        return "\n".join(lines) if len(lines) > 1 else ""


# Figures


def _totals(plan: Plan) -> dict[str, Any]:
    worst = int(np.argmax(plan.layer_imbalance))
    return {
        "balance": plan.balance,
        "imbalance": plan.imbalance,
        "worst_layer": plan.layer_ids[worst],
        "worst_layer_imbalance": float(plan.layer_imbalance[worst]),
        "largest_rank_load": float(plan.rank_load.max(axis=1).sum()),
        "duplicates": plan.duplicates,
    }


def _above_bound(plan: Plan) -> float:
    """By how much the largest rank loads exceed their bound; 0.01 is one per cent."""
    bound = float(plan.lower_bound.sum())
    return float(plan.rank_load.max(axis=1).sum()) / bound - 1.0 if bound > 0 else 0.0


def _bound_imbalance(plan: Plan) -> npt.NDArray[np.float64]:
    """`[L]`, the least imbalance of each layer that the bound leaves open."""
    mean = plan.rank_load.mean(axis=1)
    ones = np.ones(plan.num_layers)
    least: npt.NDArray[np.float64] = np.divide(plan.lower_bound, mean, out=ones, where=mean > 0)
    return least


def _groups_stay(plan: Plan) -> bool:
    """Whether all replicas of each group's experts are on one node, in every layer."""
    if plan.num_experts % plan.num_groups:
        return False
    experts_per_group = plan.num_experts // plan.num_groups
    slots_per_node = plan.topology.num_slots // plan.topology.num_nodes
    groups = plan.phy2log // experts_per_group
    nodes = np.arange(plan.topology.num_slots) // slots_per_node
    pairs = np.zeros((plan.num_layers, plan.num_groups, plan.topology.num_nodes), dtype=np.bool_)
    pairs[np.arange(plan.num_layers)[:, None], groups, nodes] = True
    return bool((pairs.sum(axis=2) == 1).all())


def _reach(plan: Plan) -> str:
    if plan.topology.num_nodes == 1:
        return "on one node"
    if plan.num_groups > 1 and _groups_stay(plan):
        return "hierarchical: each group of experts stays on one node"
    return "global: any expert on any node"


# Words and numbers


_UNITS = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))


def quantity(value: float) -> str:
    """A load with four significant digits and an SI prefix."""
    if value < 1000 and float(value).is_integer():
        return f"{value:.0f}"
    rounded = float(f"{value:.3e}")
    size, prefix = next((unit for unit in _UNITS if rounded >= unit[0]), (1.0, ""))
    return f"{rounded / size:.{_decimals(rounded / size, 4)}f}{prefix}"


def duration(time_us: float) -> str:
    """A time in the unit that suits it."""
    for unit_us, unit in ((1e6, "s"), (1e3, "ms")):
        if time_us >= 0.1 * unit_us:
            return f"{time_us / unit_us:.{_decimals(time_us / unit_us, 3)}f} {unit}"
    return f"{time_us:.0f} us"


def _decimals(value: float, digits: int) -> int:
    """Decimals that show so many significant digits of a number of at least 0.1 or so."""
    whole = len(str(int(value))) if value >= 1 else 0
    return max(digits - whole, 0)


def id_ranges(ids: Iterable[int]) -> str:
    """Numbers as ranges: 0-2, 5."""
    ranges: list[list[int]] = []
    for number in sorted(ids):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def printable(text: str) -> str:
    """Text from outside without what could move a terminal's cursor."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _counted(num: int, noun: str) -> str:
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"


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


# Bars

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_THIRDS = " .:#"
_BAR_EIGHTHS = " ▏▎▍▌▋▊▉█"


def _chart(heights: npt.NDArray[np.float64], top: float, height: int, blocks: bool) -> list[str]:
    """Upright bars, one a column, as lines from the top."""
    marks = _EIGHTHS if blocks else _THIRDS
    steps = len(marks) - 1
    filled = np.rint(heights / top * height * steps).astype(int)
    filled[(heights > 0) & (filled == 0)] = 1  # a load is never drawn as none
    lines = []
    for line in reversed(range(height)):
        levels = np.clip(filled - line * steps, 0, steps)
        lines.append("".join(marks[level] for level in levels))
    return lines


def _bar(part: float, width: int, blocks: bool) -> str:
    """A lying bar of at most `width` columns."""
    if not blocks:
        return "#" * round(part * width)
    full, eighths = divmod(round(part * width * 8), 8)
    return "█" * full + _BAR_EIGHTHS[eighths].strip()


def _grouped(loads: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float64]:
    """The largest of each `size` neighbours."""
    return np.maximum.reduceat(loads, np.arange(0, len(loads), size))


def _ticks(plan: Plan, ranks_per_bar: int, width: int) -> str:
    """Rank numbers under bars: at the nodes where they fit, else some 8 columns apart."""
    step = plan.topology.gpus_per_node
    while step < 8 * ranks_per_bar:
        step *= 2
    line = " " * width
    for rank in range(0, plan.topology.num_gpus, step):
        column, name = rank // ranks_per_bar, str(rank)
        if column + len(name) <= width:
            line = line[:column] + name + line[column + len(name) :]
    return line
