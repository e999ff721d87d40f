"""Pictures of a plan: how much each rank carries in each layer, before and after.

Drawn with Matplotlib (``pip install 'eplb-rs[plot]'``), on figures of its own: no display is
needed, and none of Matplotlib's global state is read or changed.

Letters: L layers, D ranks (GPUs).
"""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eplb_rs._files import write_whole
from eplb_rs.errors import InvalidInputError
from eplb_rs.report import Report, quantity

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DARK",
    "LIGHT",
    "Palette",
    "calm",
    "check_matplotlib",
    "check_path",
    "figure",
    "heat_map",
    "page",
    "save",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Palette:
    """The colours of a picture, as CSS has them."""

    background: str
    text: str
    quiet: str
    grid: str
    before: str
    after: str
    idle: str
    mean: str
    busy: str
    overloaded: str


LIGHT = Palette(
    background="#ffffff",
    text="#1c2330",
    quiet="#5d6675",
    grid="#d9dee6",
    before="#c2571a",
    after="#1f6fb2",
    idle="#2f6fa8",
    mean="#f6f4ef",
    busy="#e08a3c",
    overloaded="#7c1d12",
)
"""For paper and light pages."""

DARK = Palette(
    background="#14181f",
    text="#e6e9ee",
    quiet="#98a2b3",
    grid="#333b48",
    before="#f0995a",
    after="#6db3f2",
    idle="#4d9be0",
    mean="#1d232c",
    busy="#e58a3a",
    overloaded="#ffe3b8",
)
"""For dark pages."""


def check_path(path: str | os.PathLike[str]) -> None:
    """Refuses what :func:`save` could not draw.

    Raises:
        InvalidInputError: ``unknown_format`` for a name without a known extension,
            ``missing_dependency`` where Matplotlib is not installed.
    """
    suffix = PurePath(path).suffix.lower()
    if suffix not in (".png", ".svg", ".html"):
        raise InvalidInputError(
            code="unknown_format",
            argument="plot",
            got=str(path),
            expected="a file named .png, .svg or .html",
        )
    check_matplotlib("plot", str(path))


def check_matplotlib(argument: str, name: str) -> None:
    """Refuses to draw where nothing is there to draw with.

    Args:
        argument: What asks for a picture.
        name: The file it is for.

    Raises:
        InvalidInputError: ``missing_dependency``.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InvalidInputError(
            code="missing_dependency",
            argument=argument,
            got=name,
            expected="drawn by Matplotlib, which is not installed",
            hint="pip install 'eplb-rs[plot]'",
        ) from None


def save(report: Report, path: str | os.PathLike[str]) -> None:
    """Draws a plan into a file.

    Args:
        report: The plan, and what it is compared with.
        path: A ``.png`` or ``.svg`` file: the picture; or an ``.html`` file: a page of its own
            with the picture and the report's tables, light or dark as the reader prefers.

    Raises:
        InvalidInputError: As :func:`check_path`; ``unwritable_file``.

    Cost: about half a second for 58 layers on 32 ranks, nearly all of it Matplotlib's.
    """
    check_path(path)
    kind = PurePath(path).suffix.lower()[1:]
    picture = page(report).encode() if kind == "html" else rendered(figure(report), kind)
    write_whole(path, picture, "plot")


def figure(report: Report, palette: Palette = LIGHT) -> Figure:
    """The picture as a Matplotlib figure, to be changed or placed elsewhere.

    Two heat maps of rank load over the layer's mean, `[L, D]`, on one scale of colours; beside
    them the imbalance of each layer.

    Raises:
        InvalidInputError: ``missing_dependency`` where Matplotlib is not installed.
    """
    check_path("figure.png")
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec

    plan, before = report.plan, report.before
    loads = [_over_mean(before.rank_load), _over_mean(plan.rank_load)]
    fig = Figure(figsize=(12, _height(plan.num_layers)), facecolor=palette.background)
    grid = GridSpec(
        2,
        3,
        figure=fig,
        width_ratios=(1, 1, 0.52),
        height_ratios=(1, 0.16 / fig.get_figheight()),
        left=0.06,
        right=0.975,
        top=1 - 1.05 / fig.get_figheight(),
        bottom=0.55 / fig.get_figheight(),
        wspace=0.06,
        hspace=0.75 / fig.get_figheight() * 2,
    )
    axes = [fig.add_subplot(grid[0, column]) for column in range(3)]
    titles = [
        f"Before: balance {before.balance:.4f}, worst layer {before.layer_imbalance.max():.2f}",
        f"After: balance {plan.balance:.4f}, worst layer {plan.layer_imbalance.max():.2f}",
    ]
    largest = max(float(load.max()) for load in loads)
    shades = float(np.clip(largest, 1.2, _MOST_SHADED))
    image: Any = None
    for axis, load, title in zip(axes, loads, titles, strict=False):
        image = heat_map(
            axis,
            load,
            palette,
            largest=shades,
            layer_ids=plan.layer_ids,
            gpus_per_node=plan.topology.gpus_per_node,
        )
        axis.set_title(title, color=palette.text, fontsize=11, loc="left", pad=8)
    axes[0].set_ylabel("layer", color=palette.quiet, fontsize=9)
    for axis in axes[1:]:
        axis.tick_params(labelleft=False)
    _imbalance(axes[2], report, palette)

    scale = fig.add_subplot(grid[1, :2])
    beyond = "max" if largest > shades else "neither"
    bar = fig.colorbar(image, cax=scale, orientation="horizontal", extend=beyond)
    bar.outline.set_visible(False)
    scale.tick_params(colors=palette.quiet, labelsize=8, length=3)
    scale.set_xlabel("rank load / mean of its layer", color=palette.quiet, fontsize=9)
    fig.text(
        0.06,
        1 - 0.42 / fig.get_figheight(),
        "Rank loads by layer",
        color=palette.text,
        fontsize=15,
        weight="bold",
    )
    fig.text(
        0.975,
        1 - 0.42 / fig.get_figheight(),
        _subtitle(report),
        color=palette.quiet,
        fontsize=9,
        ha="right",
        parse_math=False,
    )
    return fig


def page(report: Report) -> str:
    """The picture and the report's tables as a page of HTML that needs nothing else.

    Raises:
        InvalidInputError: ``missing_dependency`` where Matplotlib is not installed.
    """
    light, dark = (
        base64.b64encode(rendered(figure(report, palette), "svg")).decode()
        for palette in (LIGHT, DARK)
    )
    facts = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in report.facts()
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
    return _PAGE.format(
        light=light,
        dark=dark,
        facts=facts,
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


# Parts of the picture

_MOST_SHADED = 3.0
"""Where the scale of colours ends, in means: beyond it, all is equally bad."""


def heat_map(
    axis: Axes,
    load: npt.NDArray[np.float64],
    palette: Palette = LIGHT,
    *,
    largest: float,
    layer_ids: Sequence[int],
    gpus_per_node: int,
) -> Any:
    """Draws the loads of ranks as colours, with a line between nodes.

    Args:
        axis: Where to.
        load: `[L, D]`, over the mean of their layer.
        palette: The colours.
        largest: Where the scale of colours ends; above 1.
        layer_ids: The number of each layer, `[L]`.
        gpus_per_node: How many ranks a node has.

    Returns:
        Matplotlib's image, for a scale of colours.
    """
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    colours = LinearSegmentedColormap.from_list(
        "load",
        [
            (0.0, palette.idle),
            (0.5, palette.mean),
            (0.75, palette.busy),
            (1.0, palette.overloaded),
        ],
    )
    num_layers, num_ranks = load.shape
    image = axis.imshow(
        load,
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        norm=TwoSlopeNorm(1.0, 0.0, largest),
    )
    num_nodes = num_ranks // gpus_per_node
    if 1 < num_nodes <= num_ranks // 2 and num_nodes <= 40:
        for node in range(1, num_nodes):
            edge = node * gpus_per_node - 0.5
            axis.axvline(edge, color=palette.background, linewidth=min(1.2, 40 / num_ranks))
    axis.set_xticks(_spread(num_ranks, 12, gpus_per_node))
    rows = _spread(num_layers, 24)
    axis.set_yticks(rows, [str(layer_ids[row]) for row in rows])
    axis.set_xlabel("rank", color=palette.quiet, fontsize=9)
    calm(axis, palette)
    return image


def _imbalance(axis: Axes, report: Report, palette: Palette) -> None:
    """Largest over mean load of each layer: from before to after."""
    plan, before = report.plan, report.before
    rows = np.arange(plan.num_layers)
    axis.hlines(
        rows,
        plan.layer_imbalance,
        before.layer_imbalance,
        color=palette.grid,
        linewidth=1.2,
        zorder=1,
    )
    size = float(np.clip(1000 / plan.num_layers, 4, 24))
    axis.axvline(1.0, color=palette.quiet, linewidth=0.8, zorder=2)
    axis.scatter(before.layer_imbalance, rows, size, palette.before, label="before", zorder=3)
    axis.scatter(plan.layer_imbalance, rows, size, palette.after, label="after", zorder=4)
    axis.set_ylim(plan.num_layers - 0.5, -0.5)
    axis.set_yticks(_spread(plan.num_layers, 24))
    largest = max(before.layer_imbalance.max(), plan.layer_imbalance.max(), 1.1)
    axis.set_xlim(1 - 0.04 * (largest - 1), largest + 0.04 * (largest - 1))
    axis.set_facecolor(palette.background)
    axis.set_xlabel("largest / mean", color=palette.quiet, fontsize=9)
    axis.set_title("Imbalance", color=palette.text, fontsize=11, loc="left", pad=8)
    legend = axis.legend(
        loc="lower right",
        bbox_to_anchor=(1.02, 0.995),
        ncols=2,
        frameon=False,
        fontsize=9,
        handletextpad=0.1,
        columnspacing=0.8,
        borderpad=0.2,
    )
    for text in legend.get_texts():
        text.set_color(palette.quiet)
    calm(axis, palette)


def calm(axis: Axes, palette: Palette) -> None:
    """Takes the frame and the ticks off."""
    axis.tick_params(colors=palette.quiet, labelsize=8, length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _subtitle(report: Report) -> str:
    plan, topology = report.plan, report.plan.topology
    source = f"{report.trace.path.name}: " if report.trace is not None else ""
    text = (
        f"{source}{plan.num_layers} layers x {plan.num_experts} experts on {topology.num_slots} "
        f"slots of {topology.num_gpus} GPUs, policy {plan.policy}"
    )
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= 120 else "..." + text[-117:]


def _over_mean(rank_load: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rank loads over the mean of their layer; 1 for a layer without load."""
    mean = rank_load.mean(axis=1, keepdims=True)
    ones = np.ones_like(rank_load)
    over: npt.NDArray[np.float64] = np.divide(rank_load, mean, out=ones, where=mean > 0)
    return over


def _height(num_layers: int) -> float:
    """Inches: tall enough that each layer can be seen, short enough for a screen."""
    return float(np.clip(2.2 + 0.105 * num_layers, 4.2, 14.0))


def _spread(num: int, most: int, step: int = 1) -> list[int]:
    """At most `most` evenly spread positions of `num`, multiples of `step` where that fits."""
    while -(-num // step) > most:
        step *= 2
    if step > 1 and -(-num // step) < 3:
        step = max(num // most, 1)
    return list(range(0, num, step))


def rendered(fig: Figure, kind: str) -> bytes:
    stream = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    fig.savefig(stream, format=kind, dpi=160, facecolor=fig.get_facecolor(), metadata=metadata)
    return stream.getvalue()


# Parts of the page


def table(names: tuple[str, ...], rows: list[Any]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Expert placement</title>
<style>
:root {{ --back: #ffffff; --text: #1c2330; --quiet: #5d6675; --line: #d9dee6;
  --before: #c2571a; --after: #1f6fb2; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --back: #14181f; --text: #e6e9ee; --quiet: #98a2b3; --line: #333b48;
    --before: #f0995a; --after: #6db3f2; }} }}
body {{ margin: 0 auto; padding: 2rem 1.5rem 3rem; max-width: 76rem; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; margin: 0 0 1rem; }}
h2 {{ font-size: 1rem; margin: 0 0 .5rem; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; margin: 0; }}
dt {{ color: var(--quiet); }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
img {{ display: block; width: 100%; height: auto; margin: 1.5rem 0; }}
section {{ overflow-x: auto; }}
.side {{ display: flex; flex-wrap: wrap; gap: 2rem 4rem; align-items: flex-start; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .9rem .25rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }}
th {{ color: var(--quiet); font-weight: 500; }}
th:first-child, td:first-child {{ text-align: left; }}
details {{ margin-top: 2rem; }}
summary {{ cursor: pointer; font-weight: 600; margin-bottom: .5rem; }}
</style>
</head>
<body>
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
</body>
</html>
"""
