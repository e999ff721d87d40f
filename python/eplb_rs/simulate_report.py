"""What a replayed trace says, for people (text) and for programs (figures).

Letters: W windows scored, S plans made, L layers.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eplb_rs._words import duration, id_ranges, printable, quantity
from eplb_rs.errors import InvalidInputError
from eplb_rs.report.style import Style, facts_text

if TYPE_CHECKING:
    import numpy.typing as npt

    from eplb_rs.loads import LoadTrace
    from eplb_rs.simulate import Outcome, Simulation

__all__ = ["SimulationReport", "Verdict"]

_FORMAT = "eplb-rs simulation"
_FORMAT_VERSION = 1

_AS_GOOD = 0.005
"""Balances that are no farther apart count as equal: then the one with fewer moves is better."""

_SIMPLER = ("uniform", "past", "arriving")

SHARES_TEXT = {
    "uniform": "tokens split evenly",
    "past": "tokens split as suits the past",
    "arriving": "tokens split as they arrive",
}
"""The ways of splitting, in words."""


class Verdict(NamedTuple):
    """Which of the outcomes to choose, and why."""

    outcome: Outcome
    """The one that is recommended."""
    baseline: Outcome
    """What it is compared with: the trivial policy, or else the first."""
    headline: str
    """What to do, in a sentence."""
    reasons: tuple[str, ...]
    """Why, in sentences."""


@dataclass(frozen=True, kw_only=True)
class SimulationReport:
    """A simulation, and where its trace came from.

    Attributes:
        simulation: The trace replayed.
        trace: The file it was read from, if it is known.
        assumed: What was not given and so assumed, by name.
        window_s: How long the expert layers take for a window now, in seconds, if it is known: the
            choices are then compared by time, that of their moves included.
    """

    simulation: Simulation
    trace: LoadTrace | None = None
    assumed: dict[str, int] | None = None
    window_s: float | None = None

    def __post_init__(self) -> None:
        """Refuses a time that cannot be.

        Raises:
            InvalidInputError: ``out_of_range``; ``inconsistent`` if it is not known how long moves
                take.
        """
        if self.window_s is None:
            return
        if not 0 < self.window_s < float("inf"):
            raise InvalidInputError(
                code="out_of_range",
                argument="window_s",
                got=repr(self.window_s),
                expected="finite and above 0",
            )
        if self.simulation.links is None or self.simulation.links.inter_node_gb_s is None:
            raise InvalidInputError(
                code="inconsistent",
                argument="window_s",
                got=repr(self.window_s),
                expected="None where it is not known how long moves take",
                hint="links, with the speeds, say so",
            )

    @cached_property
    def verdict(self) -> Verdict:
        """Which outcome to choose.

        Of those whose mean balance is within 0.005 of the best, the one with fewest moves a plan,
        then the simplest way of splitting, then the first. Where it is known how long a window
        takes, the best is the one that takes least time, moves included, and as good are those
        within half a per cent of it. The oracle, which no one can follow, is left out.
        """
        simulation = self.simulation
        able = [one for one in simulation.outcomes if one.policy != "oracle"]
        able = able or list(simulation.outcomes)
        baseline = next((one for one in able if one.policy == "trivial"), able[0])
        if self.window_s is None:
            best = max(one.mean_balance for one in able)
            good = [one for one in able if one.mean_balance >= best - _AS_GOOD]
        else:
            seconds = [self._seconds(one, baseline) or 0.0 for one in able]
            most = min(seconds) * (1 + _AS_GOOD)
            good = [one for one, taken in zip(able, seconds, strict=True) if taken <= most]
        chosen = min(good, key=lambda one: (one.steps.moves_per_step, _SIMPLER.index(one.shares)))
        return Verdict(chosen, baseline, self._headline(chosen), self._reasons(chosen, baseline))

    def _seconds(self, outcome: Outcome, baseline: Outcome) -> float | None:
        """How long a window takes, its part of a plan's moves included."""
        moves_s = _mean_after_first(outcome.steps.transfer_s)
        if self.window_s is None or outcome.policy == "oracle" or moves_s is None:
            return None
        computed = self.window_s * baseline.mean_balance / outcome.mean_balance
        return computed + moves_s / self.simulation.interval

    def _headline(self, chosen: Outcome) -> str:
        split = {
            "uniform": "",
            "past": ", and split tokens over replicas as suits the estimate",
            "arriving": ", and split tokens over replicas as they arrive",
        }[chosen.shares]
        if chosen.policy == "trivial":
            return f"Leave the experts where they are{split}."
        return f"Use {chosen.policy}: plan anew {_every(self.simulation.interval)}{split}."

    def _reasons(self, chosen: Outcome, baseline: Outcome) -> tuple[str, ...]:
        simulation = self.simulation
        reasons = []
        if chosen is not baseline:
            saved = 1.0 - baseline.mean_balance / chosen.mean_balance
            reasons.append(
                f"Balance in the next window: {_balance(chosen.mean_balance)}, against "
                f"{_balance(baseline.mean_balance)} {_of(baseline)}. The expert layers take "
                f"{100 * saved:.0f} % less time."
            )
        else:
            reasons.append(
                f"Balance in the next window: {_balance(chosen.mean_balance)}. Nothing that was "
                + (
                    "tried does better by more than 0.005."
                    if self.window_s is None
                    else "tried takes less time, moves included."
                )
            )
        if chosen.steps.moves_per_step > 0:
            moved = f"Each plan moves {self._moved(chosen)}"
            seconds = _mean_after_first(chosen.steps.transfer_s)
            saved = 1.0 - baseline.mean_balance / chosen.mean_balance
            if seconds is not None and saved > 0:
                pays = seconds / saved / simulation.interval
                moved += (
                    f", which takes {duration(1e6 * seconds)}: worth it where the expert layers "
                    f"now take more than {duration(1e6 * pays)} a window"
                )
            reasons.append(f"{moved}.")
        taken = self._seconds(chosen, baseline)
        if taken is not None and self.window_s is not None and chosen is not baseline:
            reasons.append(
                f"A window takes {duration(1e6 * taken)}, moves included, where it now takes "
                f"{duration(1e6 * self.window_s)}."
            )
        cheaper = self._cheaper(chosen, baseline)
        if cheaper is not None:
            reasons.append(
                f"Cheaper: {_name(cheaper)} reaches {_balance(cheaper.mean_balance)} and changes "
                f"{100 * cheaper.steps.moves_per_step / self.num_slots:.1f} % of all slots."
            )
        plain = self._best_with(chosen.policy, "uniform")
        if chosen.shares != "uniform" and plain is not None:
            reasons.append(
                f"With an engine that can only split evenly: {_balance(plain.mean_balance)}."
            )
        after = chosen.balance_of(simulation.stale)
        if after is not None and len(chosen.steps):
            num = int(simulation.shifted.sum())
            reasons.append(
                f"The domain shifted {num} time{'s' * (num > 1)}; until the next plan the balance "
                f"is then {_balance(after)}."
            )
        oracle = self._best_with("oracle", chosen.shares) or self._best_with("oracle", "uniform")
        if oracle is not None and chosen.policy != "oracle":
            reasons.append(
                f"Had each window been known before it came: {_balance(oracle.mean_balance)}."
            )
        return tuple(reasons)

    def _cheaper(self, chosen: Outcome, baseline: Outcome) -> Outcome | None:
        """The best of those that reach half the gain with at most half the moves, if there are
        moves to save."""
        enough = (chosen.mean_balance + baseline.mean_balance) / 2
        most = chosen.steps.moves_per_step / 2
        found = [
            one
            for one in self.simulation.outcomes
            if one.policy != "oracle"
            and one.steps.moves_per_step <= most
            and enough <= one.mean_balance < chosen.mean_balance
        ]
        return max(found, key=lambda one: one.mean_balance, default=None) if most else None

    def _best_with(self, policy: str, shares: str) -> Outcome | None:
        outcomes = self.simulation.outcomes
        return next((one for one in outcomes if (one.policy, one.shares) == (policy, shares)), None)

    def _moved(self, outcome: Outcome) -> str:
        """What a plan moves, in words."""
        text = f"{quantity(round(outcome.steps.moves_per_step))} experts"
        part = 100 * outcome.steps.moves_per_step / self.num_slots
        text += f" ({part:.1f} % of all slots)"
        links = self.simulation.links
        if links is not None:
            text += f", {_bytes(links.expert_bytes * outcome.steps.moves_per_step)}"
        return text

    @property
    def num_slots(self) -> int:
        """Slots over all ranks and layers."""
        return self.simulation.num_layers * self.simulation.topology.num_slots

    # For programs

    def figures(self) -> dict[str, Any]:
        """The figures as what ``json.dumps`` takes.

        Returns:
            ``format``, ``version``: ``"eplb-rs simulation"``, 1.
            ``loads``: ``path``, ``format``, ``empty_layers``; or null.
            ``topology``: ``num_nodes``, ``gpus_per_node``, ``slots_per_gpu``.
            ``num_layers``, ``num_experts``, ``num_groups``, ``num_windows``, ``merge``,
            ``interval``, ``estimator``, ``max_moves``: the settings. ``links``: ``expert_bytes``,
            ``intra_node_gb_s``, ``inter_node_gb_s``; or null. ``window_s``; or null. ``assumed``:
            what was not given.
            ``verdict``: ``policy``, ``shares``, ``headline``, ``reasons``; ``baseline``, the
            number of an outcome.
            ``windows``: for each scored one ``window``, ``label``, ``distance``, ``shifted``,
            ``stale``.
            ``estimate_us``: ``median``, ``max``; or null where no plan was made.
            ``outcomes``: for each ``policy``, ``shares``, ``mean_balance``, ``total_balance``,
            ``worst_balance``, ``worst_window``, ``balance_after_shifts`` (or null),
            ``relative_time`` (of the expert layers; 1 for the baseline), ``window_s`` (how long a
            window takes, moves included; null where that is not known), ``num_plans``,
            ``moves``, ``moves_per_plan``, ``moves_share`` (of all slots), ``bytes_per_plan``,
            ``transfer_s_per_plan`` (null where the links are not known), ``plan_us`` and
            ``split_us`` (``median``, ``max``; or null), ``balance`` (by window),
            ``layer_balance`` (by layer), ``plans`` (``window``, ``moves``, ``plan_us``,
            ``transfer_s``).
        """
        simulation, topology, trace = self.simulation, self.simulation.topology, self.trace
        verdict = self.verdict
        links = simulation.links
        return {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "loads": trace
            and {
                "path": str(trace.path),
                "format": trace.format,
                "empty_layers": list(trace.empty_layers),
            },
            "topology": {
                "num_nodes": topology.num_nodes,
                "gpus_per_node": topology.gpus_per_node,
                "slots_per_gpu": topology.slots_per_gpu,
            },
            "num_layers": simulation.num_layers,
            "num_experts": simulation.num_experts,
            "num_groups": simulation.num_groups,
            "num_windows": simulation.num_windows,
            "merge": simulation.merge,
            "interval": simulation.interval,
            "estimator": simulation.estimator,
            "max_moves": simulation.max_moves,
            "links": links and links._asdict(),
            "window_s": self.window_s,
            "assumed": self.assumed or {},
            "verdict": {
                "policy": verdict.outcome.policy,
                "shares": verdict.outcome.shares,
                "headline": verdict.headline,
                "reasons": list(verdict.reasons),
                "baseline": simulation.outcomes.index(verdict.baseline),
            },
            "windows": [
                {
                    "window": number + 1,
                    "label": simulation.labels and simulation.labels[number],
                    "distance": float(simulation.distance[number]),
                    "shifted": bool(simulation.shifted[number]),
                    "stale": bool(simulation.stale[number]),
                }
                for number in range(len(simulation.distance))
            ],
            "estimate_us": _spread(simulation.estimate_us),
            "outcomes": [self._outcome_figures(one) for one in simulation.outcomes],
        }

    def _outcome_figures(self, outcome: Outcome) -> dict[str, Any]:
        simulation, steps = self.simulation, outcome.steps
        balance = outcome.balance
        worst = int(np.argmin(balance))
        links = simulation.links
        return {
            "policy": outcome.policy,
            "shares": outcome.shares,
            "mean_balance": outcome.mean_balance,
            "total_balance": outcome.total_balance,
            "worst_balance": float(balance[worst]),
            "worst_window": worst + 1,
            "balance_after_shifts": outcome.balance_of(simulation.stale),
            "relative_time": self.verdict.baseline.mean_balance / outcome.mean_balance,
            "window_s": self._seconds(outcome, self.verdict.baseline),
            "num_plans": len(steps),
            "moves": int(steps.moves.sum()),
            "moves_per_plan": steps.moves_per_step,
            "moves_share": steps.moves_per_step / self.num_slots,
            "bytes_per_plan": links and links.expert_bytes * steps.moves_per_step,
            "transfer_s_per_plan": _mean_after_first(steps.transfer_s),
            "plan_us": _spread(steps.plan_us),
            "split_us": None if outcome.split_us is None else _spread(outcome.split_us),
            "balance": balance.tolist(),
            "layer_balance": outcome.layer_balance.tolist(),
            "plans": {
                "window": steps.windows.tolist(),
                "moves": steps.moves.tolist(),
                "plan_us": steps.plan_us.tolist(),
                "transfer_s": None if steps.transfer_s is None else steps.transfer_s.tolist(),
            },
        }

    # For people

    def facts(self) -> list[tuple[str, str]]:
        """What was replayed and how, as names and values."""
        simulation, topology, trace = self.simulation, self.simulation.topology, self.trace
        facts = []
        if trace is not None:
            facts.append(("trace", f"{printable(trace.path.name)} ({printable(trace.format)})"))
        scored = len(simulation.distance)
        merged = f", {simulation.merge} of the trace in each" if simulation.merge > 1 else ""
        facts.append(
            ("windows", f"{simulation.num_windows}{merged}; {scored} met by a plan and scored")
        )
        shifts = np.flatnonzero(simulation.shifted) + 1
        if len(shifts):
            facts.append(("shifts", f"the domain shifts with window {id_ranges(shifts.tolist())}"))
        groups = f" in {simulation.num_groups} groups" if simulation.num_groups > 1 else ""
        facts.append(
            ("model", f"{simulation.num_layers} layers x {simulation.num_experts} experts{groups}")
        )
        facts.append(
            (
                "machines",
                f"{topology.num_nodes} x {topology.gpus_per_node} GPUs of "
                f"{topology.slots_per_gpu} slots: {topology.num_slots} slots, "
                f"{topology.num_slots - simulation.num_experts} spare",
            )
        )
        limit = simulation.max_moves
        budget = (
            ""
            if limit is None
            else f", a plan moves at most {limit} experts (deepseek: any number)"
        )
        facts.append(
            (
                "plans",
                f"{_every(simulation.interval)}, for an estimate by {simulation.estimator}{budget}",
            )
        )
        if simulation.links is not None:
            links = simulation.links
            text = f"{_bytes(links.expert_bytes)} an expert"
            if links.inter_node_gb_s is not None:
                text += (
                    f"; {links.intra_node_gb_s:g} GB/s in a node, "
                    f"{links.inter_node_gb_s:g} GB/s between nodes"
                )
            facts.append(("moves", text))
        if self.assumed:
            pairs = (f"{name} {value}" for name, value in self.assumed.items())
            facts.append(("assumed", ", ".join(pairs)))
        return facts

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The outcomes as a table: the names of its columns, and its rows as text."""
        figures = [self._outcome_figures(one) for one in self.simulation.outcomes]
        links = self.simulation.links
        sent = links is not None and links.inter_node_gb_s is not None
        names = ["policy", "shares", "balance", "worst", "after shift", "time", "moves", "of slots"]
        if links is not None:
            names.append("bytes")
        if sent:
            names.append("moved in")
        if self.window_s is not None:
            names.append("a window")
        names += ["planned in", "at most"]
        if any(row["split_us"] is not None for row in figures):
            names += ["split in"]
        rows = []
        for row in figures:
            planned, split = row["plan_us"], row["split_us"]
            after = row["balance_after_shifts"]
            cells = [
                row["policy"],
                row["shares"],
                _balance(row["mean_balance"]),
                _balance(row["worst_balance"]),
                "-" if after is None else _balance(after),
                f"{100 * row['relative_time']:.0f} %",
                *_if(planned, f"{row['moves_per_plan']:.0f}", f"{100 * row['moves_share']:.1f} %"),
            ]
            if links is not None:
                cells += _if(planned, _bytes(row["bytes_per_plan"]))
            if sent:
                cells += _if(planned, duration(1e6 * row["transfer_s_per_plan"]))
            if self.window_s is not None:
                taken = row["window_s"]
                cells.append("-" if taken is None else duration(1e6 * taken))
            spread = planned or {"median": 0.0, "max": 0.0}
            cells += _if(planned, duration(spread["median"]), duration(spread["max"]))
            if "split in" in names:
                cells.append("-" if split is None else duration(split["median"]))
            rows.append(tuple(cells))
        return tuple(names), rows

    def highlights(self) -> list[tuple[str, str]]:
        """The few numbers that matter most about the recommended outcome, and what they are."""
        verdict = self.verdict
        figures = self._outcome_figures(verdict.outcome)
        baseline = verdict.baseline.mean_balance
        pairs = [(_balance(figures["mean_balance"]), f"balance; {_balance(baseline)} now")]
        if verdict.outcome is not verdict.baseline:
            pairs.append((f"{100 * figures['relative_time']:.0f} %", "of the expert layers' time"))
        if figures["plan_us"] is not None:
            pairs.append((f"{100 * figures['moves_share']:.1f} %", "of slots change in a plan"))
            pairs.append((duration(figures["plan_us"]["median"]), "to plan all layers"))
        return pairs

    def text(self, style: Style | None = None) -> str:
        """The report as text that fits a screen.

        Args:
            style: What the terminal can show; by default 80 columns without colours.
        """
        style = style or Style()
        verdict = self.verdict
        decision = [style.bold(line) for line in textwrap.wrap(verdict.headline, style.width)]
        for reason in verdict.reasons:
            decision += textwrap.wrap(
                reason, style.width, initial_indent="- ", subsequent_indent="  "
            )
        parts = [
            facts_text(self.facts(), style),
            self._table_text(style),
            self._curves(style),
            "\n".join(decision),
        ]
        return "\n\n".join(parts) + "\n"

    def _table_text(self, style: Style) -> str:
        """The table, in as many parts one below the other as the width asks for."""
        names, rows = self.table()
        columns = list(zip(names, *rows, strict=True))
        widths = [max(len(cell) for cell in column) for column in columns]
        kept = widths[0] + 2 + widths[1]
        parts: list[list[int]] = [[]]
        used = kept
        for number in range(2, len(names)):
            if parts[-1] and used + 2 + widths[number] > style.width:
                parts.append([])
                used = kept
            parts[-1].append(number)
            used += 2 + widths[number]
        chosen = self.simulation.outcomes.index(self.verdict.outcome)
        blocks = []
        for part in parts:
            lines = []
            for index, row in enumerate([names, *rows]):
                line = f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}"
                line += "".join(f"  {row[number]:>{widths[number]}}" for number in part)
                if index == 0:
                    line = style.dim(line)
                elif index == chosen + 1:
                    line = style.after(line)
                lines.append(line.rstrip())
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks)

    def _curves(self, style: Style) -> str:
        """The balance of each outcome, window by window, as a line of blocks."""
        simulation = self.simulation
        names = [_name(one) for one in simulation.outcomes]
        margin = max(map(len, names)) + 2
        room = max(style.width - margin, 8)
        per_mark = -(-len(simulation.distance) // room)
        starts = np.arange(0, len(simulation.distance), per_mark)
        curves = [np.minimum.reduceat(one.balance, starts) for one in simulation.outcomes]
        low = min(float(curve.min()) for curve in curves)
        low = min(np.floor(10 * low) / 10, 0.9)
        marks = "▁▂▃▄▅▆▇█" if style.blocks else "_.-~=+*#"
        what = "window by window" if per_mark == 1 else f"the worst of each {per_mark} windows"
        title = f"Balance, {what}: {marks[0]} {low:.1f} to {marks[-1]} 1.0"
        lines = [style.dim(line) for line in textwrap.wrap(title, style.width)]
        for name, curve in zip(names, curves, strict=True):
            levels = np.clip((curve - low) / (1 - low) * len(marks), 0, len(marks) - 1)
            lines.append(f"{name:<{margin}}" + "".join(marks[int(level)] for level in levels))
        if simulation.shifted.any():
            shifts = np.maximum.reduceat(simulation.shifted, starts)
            pointers = "".join("^" if shift else " " for shift in shifts)
            lines.append(style.dim(f"{'shifts':<{margin}}{pointers}".rstrip()))
        return "\n".join(lines)


def _name(outcome: Outcome) -> str:
    return f"{outcome.policy}, {outcome.shares}"


def _of(baseline: Outcome) -> str:
    if (baseline.policy, baseline.shares) == ("trivial", "uniform"):
        return "for the placement that engines start with"
    return f"for {_name(baseline)}"


def _balance(value: float) -> str:
    return f"{value:.4f}"


def _bytes(num: float) -> str:
    return f"{quantity(num)}B" if num >= 1000 else f"{num:.0f} B"


def _every(interval: int) -> str:
    return "after every window" if interval == 1 else f"after every {interval} windows"


def _if(known: object, *cells: str) -> list[str]:
    """Cells of a policy that plans; dashes for one that does not."""
    return list(cells) if known else ["-"] * len(cells)


def _spread(times_us: npt.NDArray[np.float64]) -> dict[str, float] | None:
    if not len(times_us):
        return None
    return {"median": float(np.median(times_us)), "max": float(times_us.max())}


def _mean_after_first(values: npt.NDArray[np.float64] | None) -> float | None:
    if values is None:
        return None
    return float(values[1:].mean()) if len(values) > 1 else 0.0
