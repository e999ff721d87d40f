"""A plan as a page of HTML."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from eplb_rs._words import quantity
from eplb_rs.draw.look import DARK, LIGHT
from eplb_rs.draw.markup import definitions, document, table
from eplb_rs.draw.matplotlib_files import rendered
from eplb_rs.draw.plan_picture import figure

if TYPE_CHECKING:
    from eplb_rs.report import Report

__all__ = ["page"]


def page(report: Report) -> str:
    """The picture and the report's tables as a page of HTML that needs nothing else.

    Raises:
        InvalidInputError: ``missing_dependency`` where Matplotlib is not installed.
    """
    light, dark = (
        base64.b64encode(rendered(figure(report, palette), "svg")).decode()
        for palette in (LIGHT, DARK)
    )
    plan, before = report.plan, report.before
    worst = [
        (
            plan.layer_ids[row],
            f"{before.layer_imbalance[row]:.3f}",
            f"{plan.layer_imbalance[row]:.3f}",
        )
        for row in report.worst_layers(8)
    ]
    hottest = [
        (
            hot.layer_id,
            hot.expert,
            f"{100 * hot.share:.1f} %",
            hot.num_replicas,
            f"{hot.per_replica:.2f}",
        )
        for hot in report.hottest_experts(8)
    ]
    layers = [
        (
            plan.layer_ids[row],
            f"{before.layer_imbalance[row]:.3f}",
            f"{plan.layer_imbalance[row]:.3f}",
            quantity(float(before.rank_load[row].max())),
            quantity(float(plan.rank_load[row].max())),
            quantity(float(plan.lower_bound[row])),
            int(plan.layer_duplicates[row]),
        )
        for row in range(plan.num_layers)
    ]
    body = _BODY.format(
        light=light,
        dark=dark,
        facts=definitions(report.facts()),
        summary=table(("", "before", "after", "bound"), report.summary_rows()),
        worst=table(("layer", "before", "after"), worst),
        hottest=table(("layer", "expert", "of layer", "replicas", "each / mean rank"), hottest),
        layers=table(
            (
                "layer",
                "imbalance before",
                "after",
                "largest rank load before",
                "after",
                "bound",
                "duplicates",
            ),
            layers,
        ),
    )
    return document("Expert placement", _STYLE, body)


_STYLE = """\
body { padding: 2rem 1.5rem 3rem; max-width: 76rem; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; }
h2 { font-size: 1rem; margin: 0 0 .5rem; }
img { margin: 1.5rem 0; }
section { overflow-x: auto; }
.side { display: flex; flex-wrap: wrap; gap: 2rem 4rem; align-items: flex-start; }
th, td { padding: .25rem .9rem .25rem 0; }
details { margin-top: 2rem; }
summary { margin-bottom: .5rem; }
@media (max-width: 40rem) {
  body { padding: 1rem .9rem 2rem; }
  th, td { padding-right: .6rem; }
  th, td:first-child { white-space: normal; }
  picture { display: block; overflow-x: auto; }
  img { min-width: 44rem; } }
"""

_BODY = """\
<h1>Expert placement</h1>
<div class="side">
<section><dl>{facts}</dl></section>
<section>{summary}</section>
</div>
<picture>
<source media="(prefers-color-scheme: dark)" srcset="data:image/svg+xml;base64,{dark}">
<img alt="Heat maps of rank load by layer, before and after"
 src="data:image/svg+xml;base64,{light}">
</picture>
<div class="side">
<section><h2>Worst layers, largest / mean rank load</h2>{worst}</section>
<section><h2>Hottest experts</h2>{hottest}</section>
</div>
<details><summary>All layers</summary><section>{layers}</section></details>
"""
