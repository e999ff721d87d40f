"""The picture of a plan: how much each rank carries in each layer, before and after.

Letters: L layers, D ranks (GPUs).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eplb_rs.draw.look import LIGHT, Palette, calm
from eplb_rs.draw.matplotlib_files import check_matplotlib

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from eplb_rs.report import Report

__all__ = ["figure", "heat_map"]

_MOST_SHADED = 3.0
"""Where the scale of colours ends, in means: beyond it, all is equally bad."""


def figure(report: Report, palette: Palette = LIGHT) -> Figure:
    """The picture as a Matplotlib figure, to be changed or placed elsewhere.

    Two heat maps of rank load over the layer's mean, `[L, D]`, on one scale of colours; beside
    them the imbalance of each layer.

    Raises:
        InvalidInputError: ``missing_dependency`` where Matplotlib is not installed.
    """
    check_matplotlib("plot", "figure.png")
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
