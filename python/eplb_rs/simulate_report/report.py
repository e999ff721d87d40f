"""What a replayed trace says: its verdict, its figures, its text.

Letters: W windows scored, S plans made, L layers.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from eplb_rs._words import duration, id_ranges, printable
from eplb_rs.errors import InvalidInputError
from eplb_rs.report.figures import topology_figures
from eplb_rs.report.style import Style, facts_text
from eplb_rs.simulate_report.text import curves_text, table_text
from eplb_rs.simulate_report.verdict import Verdict, mean_after_first, verdict_on, window_seconds
from eplb_rs.simulate_report.words import balance_text, bytes_text, every

if TYPE_CHECKING:
    import numpy.typing as npt

    from eplb_rs.loads import LoadTrace
    from eplb_rs.simulate import Outcome, Simulation

__all__ = ["SimulationReport"]

_FORMAT = "eplb-rs simulation"
_FORMAT_VERSION = 1


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
        return verdict_on(self.simulation, self.window_s)

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
        simulation, trace = self.simulation, self.trace
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
            "topology": topology_figures(simulation.topology),
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
            "window_s": window_seconds(simulation, self.window_s, outcome, self.verdict.baseline),
            "num_plans": len(steps),
            "moves": int(steps.moves.sum()),
            "moves_per_plan": steps.moves_per_step,
            "moves_share": steps.moves_per_step / self.num_slots,
            "bytes_per_plan": links and links.expert_bytes * steps.moves_per_step,
            "transfer_s_per_plan": mean_after_first(steps.transfer_s),
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
                f"{every(simulation.interval)}, for an estimate by {simulation.estimator}{budget}",
            )
        )
        if simulation.links is not None:
            links = simulation.links
            text = f"{bytes_text(links.expert_bytes)} an expert"
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
                balance_text(row["mean_balance"]),
                balance_text(row["worst_balance"]),
                "-" if after is None else balance_text(after),
                f"{100 * row['relative_time']:.0f} %",
                *_if(planned, f"{row['moves_per_plan']:.0f}", f"{100 * row['moves_share']:.1f} %"),
            ]
            if links is not None:
                cells += _if(planned, bytes_text(row["bytes_per_plan"]))
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
        pairs = [(balance_text(figures["mean_balance"]), f"balance; {balance_text(baseline)} now")]
        if verdict.outcome is not verdict.baseline:
            pairs.append((f"{100 * figures['relative_time']:.0f} %", "of the expert layers' time"))
        if figures["plan_us"] is not None:
            pairs.append((f"{100 * figures['moves_share']:.1f} %", "of slots moved in a plan"))
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
            table_text(self, style),
            curves_text(self.simulation, style),
            "\n".join(decision),
        ]
        return "\n\n".join(parts) + "\n"


def _if(known: object, *cells: str) -> list[str]:
    """Cells of a policy that plans; dashes for one that does not."""
    return list(cells) if known else ["-"] * len(cells)


def _spread(times_us: npt.NDArray[np.float64]) -> dict[str, float] | None:
    if not len(times_us):
        return None
    return {"median": float(np.median(times_us)), "max": float(times_us.max())}
