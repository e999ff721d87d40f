"""Replays the experts that a real model chose, through layers whose experts move to where they are
needed.

    python examples/replay_choices.py --ranks 8 --plot replay.svg

The sample holds, for every token of four texts, the six experts of 64 that DeepSeek-V2-Lite chose in
each of its 26 layers. A window of tokens is one forward pass through 26 expert-parallel layers, on as
many processes as there are ranks (gloo, on a CPU): hidden sizes are tiny, but every token goes to its
experts. After each window the planner replans for it, the mover moves experts while passes go on, and
the window is passed once more.

Before anything is sent, `predicted_tokens` says how many tokens each slot will get, from nothing but
the tokens that each rank has for each expert. The program counts what comes in every pass, and stops
at the first slot that gets another number, or token whose output is not what it was before the move.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import eplb_rs
import numpy as np
import torch
import torch.distributed as dist
from eplb_rs.draw import LIGHT, calm, check_matplotlib, heat_map
from eplb_rs.moe import (
    ExpertField,
    ExpertMover,
    ExpertParallelMoE,
    ExpertWeights,
    TopK,
    predicted_tokens,
    slots_of,
)
from torch import Tensor, nn
from torch.multiprocessing import start_processes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt
    from eplb_rs.moe import RoutingRule

    Tokens = npt.NDArray[np.int64]

# Letters: L layers, D ranks, S slots of a rank, R slots of all, E experts, T tokens of a rank and
# window, K experts of a token.

SAMPLE = Path(__file__).parent / "data" / "esft_v2lite_topk_ids.npz"
TEXTS = ("law", "translation", "intent", "summary")
NUM_EXPERTS = 64
HIDDEN, INTER = 16, 8


@dataclass(frozen=True)
class Settings:
    ranks: int
    slots: int
    tokens: int
    layers: int
    windows: int
    routing: str
    max_moves: float
    steps_per_pass: int
    plot: str | None

    @property
    def topology(self) -> eplb_rs.Topology:
        nodes = 2 if self.ranks % 2 == 0 and self.ranks > 2 else 1
        return eplb_rs.Topology(nodes, self.ranks // nodes, self.slots)


@dataclass(frozen=True)
class Window:
    text: str
    expert_LDTK: Tensor

    @cached_property
    def counts(self) -> Tokens:
        """`[L, D, E]`, the tokens that each rank has for each expert: all that a prediction needs."""
        layers, ranks = self.expert_LDTK.shape[:2]
        counts = torch.zeros(layers, ranks, NUM_EXPERTS, dtype=torch.int64)
        chosen = self.expert_LDTK.flatten(2)
        return counts.scatter_add_(2, chosen, torch.ones_like(chosen)).numpy()


def read_windows(settings: Settings) -> Iterator[Window]:
    """The first windows of each text; a text ends before the first window that it cannot fill."""
    size = settings.ranks * settings.tokens
    with np.load(SAMPLE) as sample:
        for text in TEXTS:
            choices = torch.from_numpy(sample[text][: settings.layers].astype(np.int64))
            for window in choices.split(size, dim=1)[: settings.windows]:
                if window.shape[1] == size:
                    yield Window(text, window.unflatten(1, (settings.ranks, -1)))


class Recorded(nn.Module):
    """A router that chooses what was recorded."""

    choice: TopK

    def forward(self, x: Tensor) -> TopK:
        del x
        return self.choice


class Model:
    """The layers of one rank."""

    def __init__(self, plan: eplb_rs.Plan) -> None:
        self.rank = dist.get_rank()
        here = slots_of(plan, self.rank)
        fields = (
            ExpertField("gate_up.weight", (2 * INTER, HIDDEN), torch.float64),
            ExpertField("down.weight", (HIDDEN, INTER), torch.float64),
        )
        self.weights = ExpertWeights(fields, num_layers=plan.num_layers, num_slots=len(here))
        for layer, row in enumerate(plan.phy2log[:, here.start : here.stop].tolist()):
            for slot, expert in enumerate(row):
                generator = torch.Generator().manual_seed(layer * NUM_EXPERTS + expert)
                for tensor in self.weights.slot(layer, slot).values():
                    tensor.normal_(generator=generator)
        self.layers = [
            ExpertParallelMoE(Recorded(), self.weights[layer], plan, layer=layer)
            for layer in range(plan.num_layers)
        ]

    @torch.no_grad()
    def serve(self, window: Window) -> tuple[Tokens, Tensor]:
        """One forward pass; how many tokens came to each slot, `[L, R]`, as each rank counted, and
        this rank's outputs, `[T, H]`."""
        h_TH = torch.ones(window.expert_LDTK.shape[2], HIDDEN, dtype=torch.float64)
        rows = []
        for layer, chosen_DTK in zip(self.layers, window.expert_LDTK, strict=True):
            expert_TK = chosen_DTK[self.rank]
            made = layer.begin(
                h_TH, torch.full(expert_TK.shape, 1 / 6, dtype=torch.float64), expert_TK
            )
            made.dispatch()
            made.experts()
            made.combine()
            h_TH = nn.functional.normalize(h_TH + made.output())
            rows.append(made.rows_by_slot)
        rows_LS = torch.stack(rows).long()
        everywhere = [torch.empty_like(rows_LS) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, rows_LS)
        return torch.cat(everywhere, dim=1).numpy(), h_TH

    def recorded_load(self) -> Tokens:
        """What the layers of all ranks have counted since the last call, `[L, E]`."""
        load_LE = torch.stack([layer.load_E for layer in self.layers])
        dist.all_reduce(load_LE)
        for layer in self.layers:
            layer.load_E.zero_()
        return load_LE.numpy()


class Row(NamedTuple):
    """One window: what arrived under the plan in force, and again under the one made for it."""

    text: str
    before_LD: Tokens
    after_LD: Tokens
    promised: float
    moved: int
    passes: int


class Replay:
    """What every rank does, in step with the others."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.planner = eplb_rs.Planner(settings.topology)
        nothing = np.zeros((settings.layers, NUM_EXPERTS))
        self.plan = eplb_rs.Planner(settings.topology, policy="trivial").plan(nothing)
        self.rule = self.rule_for(self.plan)
        self.model = Model(self.plan)
        for layer in self.model.layers:
            layer.follow(self.plan, self.rule)
        self.mover = ExpertMover(self.model.weights, on_switch=self.switch)

    def rule_for(self, plan: eplb_rs.Plan) -> RoutingRule:
        rule = self.settings.routing
        return plan.with_shares() if rule == "shares" else rule

    def switch(self, layer: int, plan: eplb_rs.Plan) -> None:
        """Called by the mover when a layer's experts have moved, after the same pass on all ranks."""
        self.model.layers[layer].follow(plan, self.next_rule)
        self.switched[layer] = True

    def window(self, window: Window) -> Row:
        """One window: passed, replanned for, passed while experts move, passed again."""
        self.outputs = None
        expected = predicted_tokens(self.plan, window.counts, self.rule)
        before = self.passed(window, expected)
        load = self.model.recorded_load()
        if not np.array_equal(load, window.counts.sum(axis=1)):
            raise RuntimeError("the layers have recorded another load than was chosen")

        most = int(self.settings.max_moves * self.plan.phy2log.size)
        plan = self.planner.plan(load, previous=self.plan, max_moves=most)
        self.next_rule = self.rule_for(plan)
        then = predicted_tokens(plan, window.counts, self.next_rule)
        self.switched = np.zeros((plan.num_layers, 1), dtype=bool)
        self.mover.begin(self.plan, plan)
        passes = steps = 0
        while self.mover.step():
            steps += 1
            if steps % self.settings.steps_per_pass == 0:
                self.passed(window, np.where(self.switched, then, expected))
                passes += 1
            else:
                dist.barrier()  # in place of a pass: what keeps ranks in step
        for layer in np.flatnonzero(~self.switched):  # nothing moved there, but shares may be new
            self.switch(int(layer), plan)
        after = self.passed(window, then)
        self.model.recorded_load()

        self.plan, self.rule = plan, self.next_rule
        promised = plan.balance if isinstance(self.rule, str) else self.rule.balance
        received = torch.tensor(self.mover.stats.received)
        dist.all_reduce(received)
        return Row(window.text, before, after, promised, int(received), passes + 2)

    def passed(self, window: Window, expected_LR: Tokens) -> Tokens:
        """A pass; the tokens that came to each rank, `[L, D]`.

        Raises:
            RuntimeError: A slot got another number of tokens than was predicted, or a token has
                another output than in the window's first pass.
        """
        found_LR, outputs_TH = self.model.serve(window)
        if not np.array_equal(found_LR, expected_LR):
            layer, slot = np.argwhere(found_LR != expected_LR)[0].tolist()
            raise RuntimeError(
                f"slot {slot} of layer {layer} got {found_LR[layer, slot]} tokens, "
                f"{expected_LR[layer, slot]} were predicted"
            )
        if self.outputs is None:
            self.outputs = outputs_TH
        if not torch.allclose(outputs_TH, self.outputs, rtol=0, atol=1e-9):
            raise RuntimeError("a token has another output than before experts were moved")
        return found_LR.reshape(len(found_LR), self.settings.ranks, -1).sum(axis=2)


def balance(tokens_LD: Tokens) -> float:
    """The mean tokens of a rank over the largest, both summed over layers."""
    return float(tokens_LD.mean(axis=1).sum() / tokens_LD.max(axis=1).sum())


def work(rank: int, settings: Settings, folder: str) -> None:
    """One process."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=settings.ranks)
    replay = Replay(settings)
    table = Table(settings) if rank == 0 else None
    for window in read_windows(settings):
        row = replay.window(window)
        if table is not None:
            table.add(row)
    if table is not None:
        table.finish()
        if settings.plot is not None:
            draw(table.rows, settings)
    dist.barrier()
    dist.destroy_process_group()


class Table:
    """What the first rank prints and draws."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rows: list[Row] = []
        print(
            f"{settings.layers} layers of {NUM_EXPERTS} experts in {settings.ranks * settings.slots} "
            f"slots on {settings.ranks} ranks; {settings.ranks} x {settings.tokens} tokens a window, "
            f"6 experts a token; routing {settings.routing}\n"
            "\n"
            "                      balance (mean / largest tokens of a rank)     experts  passes as\n"
            "window  text         in force    plan says    moved there    moved    predicted",
            flush=True,
        )

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(
            f"{len(self.rows):>6}  {row.text:<12} {balance(row.before_LD):>8.4f} {row.promised:>12.4f}"
            f" {balance(row.after_LD):>14.4f} {row.moved:>8} {row.passes:>8} of {row.passes}",
            flush=True,
        )

    def finish(self) -> None:
        before, after, promised = (
            np.mean(figures)
            for figures in zip(
                *(
                    (balance(row.before_LD), balance(row.after_LD), row.promised)
                    for row in self.rows
                ),
                strict=True,
            )
        )
        passes = sum(row.passes for row in self.rows)
        slots = self.settings.layers * self.settings.ranks * self.settings.slots
        print(
            f"{'':>6}  {'mean':<12} {before:>8.4f} {promised:>12.4f} {after:>14.4f}\n"
            "\n"
            f"tokens of all {slots} slots as predicted, in all {passes} passes"
        )


def draw(rows: list[Row], settings: Settings) -> None:
    """Balance by window; and what each rank got in each layer of the window that gained most."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 8), facecolor=LIGHT.background)
    fig.subplots_adjust(left=0.08, right=0.97, top=0.93, bottom=0.07)
    grid = fig.add_gridspec(2, 2, height_ratios=(1, 1.5), hspace=0.3, wspace=0.08)
    above = fig.add_subplot(grid[0, :], facecolor=LIGHT.background)
    figures = np.array([(balance(row.before_LD), balance(row.after_LD)) for row in rows])
    windows = np.arange(1, len(rows) + 1)
    names = ("under the plan in force", "after replanning")
    for line, name, colour in zip(figures.T, names, (LIGHT.before, LIGHT.after), strict=True):
        above.plot(windows, line, color=colour, marker="o", markersize=4, label=name)
    for number, row in enumerate(rows, 1):
        if number == 1 or row.text != rows[number - 2].text:
            above.axvline(number, color=LIGHT.grid, linewidth=0.8, zorder=0)
            above.annotate(
                row.text, (number, 1.03), fontsize=8, color=LIGHT.quiet, annotation_clip=False
            )
    above.set(xticks=windows, ylim=(min(0.5, figures.min()), 1.02))
    above.set_xlabel("window", color=LIGHT.quiet, fontsize=9)
    above.set_ylabel("balance, as measured", color=LIGHT.quiet, fontsize=9)
    above.legend(loc="lower right", frameon=False, fontsize=9, labelcolor=LIGHT.text)
    calm(above, LIGHT)

    gained = int(np.argmax(figures[:, 1] - figures[:, 0]))
    loads = (rows[gained].before_LD, rows[gained].after_LD)
    for column, (tokens_LD, when) in enumerate(zip(loads, ("before", "after"), strict=True)):
        axis = fig.add_subplot(grid[1, column])
        heat_map(
            axis,
            tokens_LD / tokens_LD.mean(axis=1, keepdims=True),
            largest=2.0,
            layer_ids=range(settings.layers),
            gpus_per_node=settings.topology.gpus_per_node,
        )
        title = f"Window {gained + 1}, {when}: tokens of each rank / mean of the layer"
        axis.set_title(title, color=LIGHT.text, fontsize=9, loc="left")
        axis.tick_params(labelleft=column == 0)
    fig.savefig(settings.plot, facecolor=LIGHT.background)


def parse(arguments: list[str]) -> Settings:
    parser = argparse.ArgumentParser(
        description="Replays the experts that a real model chose, and replans as it goes.",
        epilog="examples:\n"
        "  python examples/replay_choices.py\n"
        "  python examples/replay_choices.py --ranks 4 --slots 18 --routing nearest\n"
        "  python examples/replay_choices.py --routing shares --max-moves 0.02 --plot replay.svg\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def option(name: str, default: float | str, what: str, **others: Any) -> None:
        text = f"{what} ({default})"
        parser.add_argument(name, type=type(default), default=default, help=text, **others)

    option("--ranks", 8, "how many ranks, each a process", metavar="N")
    option("--slots", 9, "expert slots of a rank", metavar="N")
    option("--tokens", 256, "tokens of a rank in a window", metavar="N")
    option("--layers", 26, "how many of the 26 layers", metavar="N")
    option("--windows", 4, "how many windows of each text, at most", metavar="N")
    option(
        "--routing",
        "uniform",
        "how tokens are split over replicas",
        choices=("uniform", "nearest", "shares"),
    )
    option("--max-moves", 1.0, "the part of all slots that a replan may change", metavar="PART")
    option("--steps-per-pass", 6, "steps of the mover between two passes", metavar="N")
    parser.add_argument("--plot", metavar="FILE", help="draw into a .svg or .png file")
    settings = Settings(**vars(parser.parse_args(arguments)))
    for name in ("ranks", "slots", "tokens", "windows", "steps_per_pass"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if settings.ranks * settings.slots < NUM_EXPERTS:
        parser.error(f"--ranks times --slots must be at least {NUM_EXPERTS}, the number of experts")
    if not 1 <= settings.layers <= 26:
        parser.error("--layers must be 1 to 26")
    if not 0 <= settings.max_moves <= 1:
        parser.error("--max-moves must be 0 to 1")
    if settings.plot is not None:
        if Path(settings.plot).suffix.lower() not in (".png", ".svg"):
            parser.error("--plot must be a .svg or .png file")
        try:
            check_matplotlib("plot", settings.plot)
        except eplb_rs.InvalidInputError as error:
            parser.error(str(error))
    return settings


def main() -> None:
    settings = parse(sys.argv[1:])
    # The processes are forked off one that has imported torch already, where that can be had.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(["torch", "eplb_rs.moe"])
    with tempfile.TemporaryDirectory() as folder:
        start_processes(work, (settings, folder), settings.ranks, start_method=method)


if __name__ == "__main__":
    main()
