"""Stages that live on two ranks: equal at the start, one gradient at the end."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import world
from dualpipe import Kind, MismatchError, PipelineError, Schedule
from dualpipe.executor import products, reduction
from dualpipe.executor.transport.base import PairSum
from dualpipe.executor.transport.gloo import GlooTransport
from pipelines import Part, perceptrons, sequential
from torch import nn

WIDTH = 8
STEPS = 3


def rows_of(count: int, seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        x, y = (torch.randn(2, WIDTH, generator=generator) for _ in range(2))
        rows.append(((x,), (y,), {}))
    return rows


class Paired(GlooTransport):
    """Sums pairs of ranks' tensors by itself, as the transports of GPUs do."""

    def pair_sums(self, peers):
        group = dist.new_group(range(self.group.size()))
        return {peer: Pair(peer, group) for peer in peers}


class Pair(PairSum):
    sizes: ClassVar[list[int]] = []
    """Of all tensors that were given, 0 where a stage's last backward has ended."""

    def __init__(self, peer: int, group) -> None:
        self.peer, self.group = peer, group
        self.under_way: list = []

    def add(self, tensor: torch.Tensor) -> None:
        assert tensor.is_contiguous()
        self.sizes.append(tensor.numel())
        own, theirs = tensor.clone(), torch.empty_like(tensor)
        works = [self.group.send([own], self.peer, 0), self.group.recv([theirs], self.peer, 0)]
        self.under_way.append((works, tensor, theirs, own))

    def wait(self) -> None:
        for works, tensor, theirs, _ in self.under_way:
            for work in works:
                work.wait()
            tensor.add_(theirs)
        self.under_way = []


def by_group() -> dict[str, Any]:
    return {}


def by_pairs() -> dict[str, Any]:
    return {
        "transport": Paired(dist.group.WORLD, torch.device("cpu"), 60.0),
        "fuse_accumulation": True,
        "reduce_copies": "pairs",
    }


def weight_by_weight(rank: int, size: int) -> list[int]:
    """What is summed, in which order: weights before their stage's last backward has ended."""
    schedule = Schedule.generate("dualpipe", size, 2 * size)
    torch.manual_seed(9)
    own, expected = (
        [nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(3)]) for _ in range(size)]
        for _ in range(2)
    )
    for module, like in zip(own, expected, strict=True):
        module.load_state_dict(like.state_dict())
    rows = rows_of(schedule.num_micro_batches, 8)
    losses, _ = sequential(expected, rows)
    part = Part(rank, own, schedule, **by_pairs())
    copies = part.executor._copies
    start = copies.start
    copies.start = lambda stage: (Pair.sizes.append(0), start(stage))
    Pair.sizes.clear()
    assert part.check(part.step(rows), losses, expected) < 1e-13
    same_on_both(part, rank, size)
    part.executor.close()
    return list(Pair.sizes)


def accumulation(rank: int, size: int, options) -> dict[str, float]:
    """Over three steps gradients are reduced once, at the last, as those of one long step."""
    found = {}
    for method in ("dualpipe", "chimera"):
        schedule = Schedule.generate(method, size, 2 * size)
        expected = perceptrons(size)
        part = Part(rank, perceptrons(size), schedule, **options())
        reductions = count_reductions(part.executor._copies)
        for turn in range(2):
            for step in range(STEPS):
                rows = rows_of(schedule.num_micro_batches, turn * STEPS + step)
                losses, _ = sequential(expected, rows)
                result = part.step(rows, accumulate=step < STEPS - 1)
                last = part.rows_of(schedule.num_stages - 1, list(losses))
                assert not last or torch.equal(result.losses, torch.stack(last))
                assert len(reductions) == (turn * 2 if step < STEPS - 1 else turn * 2 + 2)
            found[f"{method} {turn}"] = part.difference(expected)
            same_on_both(part, rank, size)
            for module in (*expected, *part.stages):
                module.zero_grad()
        part.executor.close()
    return found


def count_reductions(copies) -> list[int]:
    """The stages that are reduced, as they start."""
    started: list[int] = []
    start = copies.start

    def counted(stage: int) -> None:
        started.append(stage)
        start(stage)

    copies.start = counted
    return started


def same_on_both(part: Part, rank: int, size: int) -> None:
    """Copies must stay equal: their reduced gradients are, byte for byte."""
    mine = {
        stage: [p.grad.clone() for p in part.stages[stage].parameters()] for stage, _ in part.places
    }
    every: list = [None] * size
    dist.all_gather_object(every, mine)
    for stage, grads in mine.items():
        for other in every:
            if stage in other:
                assert all(map(torch.equal, grads, other[stage]))


def summed_twice(rank: int, size: int) -> list[str]:
    """Reduced gradients that are still there are not reduced again in silence."""
    schedule = Schedule.generate("dualpipe", size, 2 * size)
    rows = rows_of(schedule.num_micro_batches, 0)
    part = Part(rank, perceptrons(size), schedule)
    part.step(rows)
    codes = []
    try:
        part.step(rows)
    except PipelineError as error:
        codes.append(error.code)
    expected = perceptrons(size)
    sequential(expected, rows)
    for clear in (torch.Tensor.zero_, lambda grad: grad.data.zero_()):
        for module in part.stages:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    clear(parameter.grad)
        part.step(rows)
        assert part.difference(expected) < 1e-13
    part.executor.close()
    return codes


class Half(nn.Module):
    """Parameters that are frozen, that are not used, and that are tied over stages of a rank."""

    def __init__(self, shared: nn.Parameter, *, used: bool) -> None:
        super().__init__()
        self.shared = shared
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(WIDTH))
        self.large = nn.Parameter(torch.linspace(-1, 1, WIDTH * 9000).reshape(9000, WIDTH))
        self.used = used

    def forward(self, x):
        y = x @ self.shared * self.scale * self.frozen
        return torch.tanh(y + self.large.sum(0) if self.used else y)


def tied(rank: int, size: int, options) -> float:
    def made() -> list[nn.Module]:
        torch.manual_seed(3)
        shared = [nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(size // 2)]
        # Rank r holds stages r and size - 1 - r.
        ties = [shared[min(r, size - 1 - r)] for r in range(size)]
        return [Half(tie, used=at % 2 == 0) for at, tie in enumerate(ties)]

    schedule = Schedule.generate("dualpipe", size, 2 * size)
    rows = rows_of(schedule.num_micro_batches, 1)
    expected = made()
    losses, _ = sequential(expected, rows)
    part = Part(rank, made(), schedule, **options())
    worst = part.check(part.step(rows), losses, expected)
    part.executor.close()
    return worst


def unequal(rank: int, size: int) -> list[tuple[str, str]]:
    """Copies that differ in a bit of a parameter or buffer, or in shape, are refused everywhere."""
    found = []
    schedule = Schedule.generate("dualpipe", size, 2 * size)
    rows = rows_of(schedule.num_micro_batches, 2)

    def refused(spoil) -> None:
        stages = [nn.Sequential(*stage, nn.BatchNorm1d(WIDTH)) for stage in perceptrons(size)]
        spoil(stages[1])
        part = Part(rank, stages, schedule)
        try:
            part.step(rows)
        except (MismatchError, PipelineError) as error:
            found.append((error.code, error.got))
        part.executor.close()

    def negative_zero(stage) -> None:
        stage[0].bias.data[0] = -0.0 if rank == 1 else 0.0

    def buffer(stage) -> None:
        stage[3].running_mean[3] = rank * 1e-9

    def shape(stage) -> None:
        if rank == 1:
            stage[0].bias = None

    for spoil in (negative_zero, buffer, shape):
        refused(spoil)
    return found


def hidden(rank: int, size: int) -> bool:
    """Whether the first reduction starts before the last backward of the rank."""
    schedule = Schedule.generate("dualpipe", size, 2 * size)
    kinds = [i.kind for i in schedule.instructions(rank)]
    last = max(at for at, kind in enumerate(kinds) if kind in {Kind.B, Kind.W, Kind.OVERLAP_B})
    return kinds.index(Kind.REDUCE_GRAD) < last


def without_instructions(rank: int, size: int) -> float:
    """An odd number of micro-batches, and a schedule that does not say when to reduce."""
    text = Schedule.generate("dualpipe", size, 5).text()
    schedule = Schedule.parse(re.sub(r" \d'?R!?(?= |\n)", "", text), check=False)
    assert Kind.REDUCE_GRAD not in {i.kind for i in schedule.instructions(rank)}
    rows = rows_of(5, 4)
    expected = perceptrons(size)
    losses, _ = sequential(expected, rows)
    part = Part(rank, perceptrons(size), schedule)
    worst = part.check(part.step(rows), losses, expected)
    part.executor.close()
    return worst


def everything(rank: int, size: int) -> dict:
    found = {
        "accumulation": accumulation(rank, size, by_group),
        "twice": summed_twice(rank, size),
        "tied": tied(rank, size, by_group),
        "unequal": unequal(rank, size),
        "hidden": hidden(rank, size),
        "odd": without_instructions(rank, size),
    }
    # Small stages, as if they were large.
    reduction._SMALL_BYTES = 4 * WIDTH
    products._MIN_BYTES = 0
    found["accumulation by pairs"] = accumulation(rank, size, by_pairs)
    found["tied by pairs"] = tied(rank, size, by_pairs)
    found["order"] = weight_by_weight(rank, size)
    return found


def test_copies():
    ranks = world.run(everything, 4)
    for found in ranks:
        assert max(found["accumulation"].values()) < 1e-13
        assert max(found["accumulation by pairs"].values()) < 1e-13
        assert found["twice"] == ["reduced_twice"]
        assert found["tied"] < 1e-13
        assert found["tied by pairs"] < 1e-13
        assert found["odd"] < 1e-13
        assert [code for code, _ in found["unequal"]] == ["copies"] * 3
        assert all("stage 1" in got for _, got in found["unequal"])
        names = [got.rpartition("content of ")[2] for _, got in found["unequal"]]
        assert names[:2] == ["'0.bias'", "'3.running_mean'"]
    assert all(found["hidden"] for found in ranks)
    # Three weights, then, once the stage is complete, three biases together and who has gradients;
    # but the first weight of the first stage, which nothing else comes before, waits for the end.
    weight, small, present = WIDTH * WIDTH, 3 * WIDTH, 6
    late = [weight, weight, weight, 0, small, present]
    early = [weight, weight, 0, weight, small, present]
    assert [found["order"] for found in ranks] == [late + early, late * 2, late * 2, late + early]
