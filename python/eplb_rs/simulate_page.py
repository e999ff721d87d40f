"""The page on which a user decides: a replayed trace as one file of HTML that needs nothing else.

Light or dark as the reader prefers; wide pictures on screens, narrow ones on phones. Every number
on it is one of :meth:`eplb_rs.simulate_report.SimulationReport.figures`.
"""

from __future__ import annotations

import base64
import html
from typing import TYPE_CHECKING

from eplb_rs.draw.look import DARK, LIGHT
from eplb_rs.draw.markup import definitions, document, table
from eplb_rs.draw.matplotlib_files import check_matplotlib, rendered
from eplb_rs.draw.replay_pictures import balance_figure, choice_figure, cost_figure
from eplb_rs.simulate_report.words import SHARES_TEXT, outcome_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from eplb_rs.simulate_report import SimulationReport

__all__ = ["page"]

_MOST_ROWS = 2000
"""The most windows that the page lists one by one; all of them are in the figures."""


def page(report: SimulationReport) -> str:
    """The report as a page of HTML.

    Raises:
        InvalidInputError: ``missing_dependency`` where Matplotlib is not installed.

    Cost: about two seconds, nearly all of it Matplotlib's.
    """
    check_matplotlib("html", "a page with charts")
    simulation, verdict = report.simulation, report.verdict
    highlights = "".join(
        f"<div><dt>{html.escape(what)}</dt><dd>{html.escape(number)}</dd></div>"
        for number, what in report.highlights()
    )
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in verdict.reasons)
    names, rows = report.table()
    pictures = {
        "choice": _picture(report, choice_figure, _choice_text(report)),
        "balance": _picture(report, balance_figure, _balance_text(report)),
        "cost": "",
    }
    if any(len(one.steps) for one in simulation.outcomes):
        alt = "The slots that each plan changed, and how long planning it took, plan by plan"
        picture = _picture(report, cost_figure, alt)
        pictures["cost"] = f"<h2>What each plan cost</h2>{picture}"
    body = _BODY.format(
        headline=html.escape(verdict.headline),
        highlights=highlights,
        reasons=reasons,
        facts=definitions(report.facts()),
        baseline=outcome_name(verdict.baseline),
        table=_marked(table(names, rows), simulation.outcomes.index(verdict.outcome)),
        shares="; ".join(
            f"<b>{name}</b>: {html.escape(SHARES_TEXT[name])}"
            for name in dict.fromkeys(one.shares for one in simulation.outcomes)
        ),
        windows=_windows_table(report),
        layers=_layers_table(report),
        **pictures,
    )
    return document("What if: expert placement over a recorded trace", _STYLE, body)


def _picture(report: SimulationReport, draw: Callable[..., Figure], description: str) -> str:
    """A figure for light and dark, wide and narrow, the reader's browser choosing."""
    sources = []
    for palette, dark in ((DARK, True), (LIGHT, False)):
        for narrow in (True, False):
            picture = base64.b64encode(rendered(draw(report, palette, narrow=narrow), "svg"))
            uri = f"data:image/svg+xml;base64,{picture.decode()}"
            wanted = ["(prefers-color-scheme: dark)"] * dark + ["(max-width: 40rem)"] * narrow
            if wanted:
                sources.append(f'<source media="{" and ".join(wanted)}" srcset="{uri}">')
            else:
                sources.append(f'<img alt="{html.escape(description)}" src="{uri}">')
    return f"<picture>{''.join(sources)}</picture>"


def _choice_text(report: SimulationReport) -> str:
    points = (
        f"{one.policy} {one.shares}: {one.mean_balance:.4f} for "
        f"{100 * one.steps.moves_per_step / report.num_slots:.1f} %"
        for one in report.simulation.outcomes
    )
    return f"Mean balance against the slots that a plan changes. {'; '.join(points)}"


def _balance_text(report: SimulationReport) -> str:
    ranges = (
        f"{one.policy} {one.shares}: {one.balance.min():.4f} to {one.balance.max():.4f}"
        for one in report.simulation.outcomes
    )
    return f"Balance of each outcome, window by window. {'; '.join(ranges)}"


def _windows_table(report: SimulationReport) -> str:
    """The balance of every outcome in every window."""
    simulation = report.simulation
    labelled = simulation.labels is not None
    names = ["window", *["label"] * labelled, "distance", "shift"]
    names += [outcome_name(one) for one in simulation.outcomes]
    rows = []
    for number in range(min(len(simulation.distance), _MOST_ROWS)):
        label = [simulation.labels[number]] if simulation.labels is not None else []
        rows.append(
            (
                number + 1,
                *label,
                f"{simulation.distance[number]:.3f}",
                "shift" if simulation.shifted[number] else "",
                *(f"{one.balance[number]:.4f}" for one in simulation.outcomes),
            )
        )
    return table(tuple(names), rows)


def _layers_table(report: SimulationReport) -> str:
    """The balance of every outcome in every layer."""
    outcomes = report.simulation.outcomes
    ids = report.trace.layer_ids if report.trace else range(report.simulation.num_layers)
    names = ("layer", *(outcome_name(one) for one in outcomes))
    rows = [
        (layer, *(f"{one.layer_balance[row]:.4f}" for one in outcomes))
        for row, layer in enumerate(ids)
    ]
    return table(names, rows)


def _marked(text: str, row: int) -> str:
    """A table with the recommended row marked."""
    head, *rows = text.split("<tr>")
    rows[row + 1] = rows[row + 1].replace("</td>", ' <span class="pick">recommended</span></td>', 1)
    parts = [f"<tr>{part}" for part in rows]
    parts[row + 1] = parts[row + 1].replace("<tr>", '<tr class="chosen">', 1)
    return head + "".join(parts)


_STYLE = """\
:root { --tint: #eef5fb; }
@media (prefers-color-scheme: dark) { :root { --tint: #1a2634; } }
* { box-sizing: border-box; }
body { padding: 1.5rem 1.25rem 3rem; max-width: 72rem; }
header { background: var(--tint); border-left: .3rem solid var(--after); border-radius: .3rem;
  padding: 1rem 1.25rem; }
header p { margin: 0 0 .25rem; color: var(--quiet); font-size: .85rem; }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .5rem; }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.key { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; margin: .75rem 0 1rem; }
.key div { display: flex; flex-direction: column-reverse; }
.key dd { font-size: 1.6rem; font-weight: 600; line-height: 1.2; color: var(--after); }
.key dt { font-size: .85rem; }
header ul { margin: 0; padding-left: 1.1rem; }
.scroll { overflow-x: auto; }
.tall { max-height: 30rem; overflow: auto; }
th, td { padding: .3rem .45rem; }
th:first-child, td:first-child { padding-left: 0; }
.outcomes td:nth-child(2), .outcomes th:nth-child(2) { text-align: left; }
.chosen td { background: var(--tint); font-weight: 600; }
.pick { color: var(--after); font-size: .75rem; font-weight: 500; }
.note { color: var(--quiet); font-size: .85rem; margin: .5rem 0 0; }
details { margin-top: 1rem; border-top: 1px solid var(--grid); padding-top: .75rem; }
@media (max-width: 40rem) {
  body { padding: 1rem .9rem 2rem; }
  .key { display: grid; grid-template-columns: 1fr 1fr; }
  .pick { display: block; }
  th:first-child, td:first-child { position: sticky; left: 0; background: var(--background); }
  .chosen td:first-child { background: var(--tint); } }
"""

_BODY = """\
<header>
<p>Each window of a recorded trace, met by a plan made before it came</p>
<h1>{headline}</h1>
<dl class="key">{highlights}</dl>
<ul>{reasons}</ul>
</header>
<main>
<h2>The choices</h2>
<div class="scroll outcomes" role="region" aria-label="The choices" tabindex="0">{table}</div>
<p class="note">Balance: mean over largest rank load, each summed over layers; 1 is perfect. Worst: of
one window. After shift: in windows of a new domain, before the next plan. Time: of the expert layers,
if {baseline} takes 100 %. Moves: experts that arrive on a rank which did not hold them, in a plan after
the first. How tokens are split over an expert's replicas: {shares}.</p>
<h2>What balance costs</h2>
{choice}
<h2>Over time</h2>
{balance}
{cost}
<h2>What was replayed</h2>
<dl>{facts}</dl>
<details><summary>Every window</summary>
<div class="tall" role="region" aria-label="Every window" tabindex="0">{windows}</div></details>
<details><summary>Every layer</summary>
<div class="tall" role="region" aria-label="Every layer" tabindex="0">{layers}</div></details>
</main>
"""
