"""Tables of a report on a plan."""

from __future__ import annotations

import textwrap
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from eplb_rs._words import quantity
from eplb_rs.report.bars import bar

if TYPE_CHECKING:
    from eplb_rs.report.report import Report
    from eplb_rs.report.style import Style

__all__ = ["rank_table", "replicated", "worst"]


def worst(report: Report, style: Style, top: int) -> str:
    """The worst layers, and beside them the hottest experts."""
    layers = [f"{'worst layers':<12}{'before':>8}{'after':>8}"]
    layers += [
        f"{report.plan.layer_ids[row]:>12}"
        + style.before(f"{report.before.layer_imbalance[row]:8.3f}")
        + style.after(f"{report.plan.layer_imbalance[row]:8.3f}")
        for row in report.worst_layers(top)
    ]
    experts = ["hottest experts   of layer  replicas  each*"]
    experts += [
        f"{f'layer {hot.layer_id}':<9}{hot.expert:>6}{100 * hot.share:>10.1f} %"
        f"{hot.num_replicas:>10}{hot.per_replica:>7.2f}"
        for hot in report.hottest_experts(top)
    ]
    layers[0], experts[0] = style.dim(layers[0]), style.dim(experts[0])
    note = style.dim(f"{'* load of a replica; 1 = mean rank load':>{min(style.width, 79)}}")
    if style.width < 80:
        return "\n".join([*layers, "", *experts, note])
    blank = " " * 28
    lines = [
        f"{left}        {right}" for left, right in zip_longest(layers, experts, fillvalue=blank)
    ]
    return "\n".join(line.rstrip() for line in [*lines, note])


def rank_table(report: Report, row: int, style: Style) -> str:
    """What each rank of one layer holds and carries."""
    plan = report.plan
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
        shown = bar(load[rank] / mean / top, 10, style.blocks)
        lines.append(
            f"{rank:>4}{quantity(load[rank]):>9}{load[rank] / mean:>8.3f}  "
            f"{style.after(f'{shown:<10}')}  {wrapped[0]}"
        )
        lines += [" " * 35 + line for line in wrapped[1:]]
    return "\n".join(lines)


def replicated(report: Report, row: int, style: Style, top: int) -> str:
    """The hottest experts of one layer and the ranks that hold them."""
    plan = report.plan
    load = plan.expert_load[row]
    total = float(load.sum(dtype=np.float64)) or 1.0
    lines = [style.dim(f"{'expert':>6}{'of layer':>10}{'replicas':>10}  on ranks")]
    for expert in np.argsort(-load, kind="stable")[:top]:
        count = int(plan.logcnt[row, expert])
        ranks = sorted(plan.log2phy[row, expert, :count] // plan.topology.slots_per_gpu)
        names = " ".join(str(rank) for rank in ranks)
        wrapped = textwrap.wrap(names, max(style.width - 28, 20))
        lines.append(f"{expert:>6}{100 * load[expert] / total:>8.1f} %{count:>10}  {wrapped[0]}")
        lines += [" " * 28 + line for line in wrapped[1:]]
    return "\n".join(lines) if len(lines) > 1 else ""
