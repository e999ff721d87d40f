"""What training programs do to modules and to torch while a pipeline runs them."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import torch
import torch.distributed as dist
import world
from dualpipe import DualPipe, Schedule
from pipelines import Part, perceptrons, sequential, squared
from torch import nn

WIDTH = 8


def rows(num_micro_batches: int) -> list[Any]:
    torch.manual_seed(0)
    pairs = torch.randn(num_micro_batches, 2, 4, WIDTH)
    return [((x,), (y,), {}) for x, y in pairs]


def clear(stages: list[nn.Module]) -> None:
    for stage in stages:
        stage.zero_grad()


def thawed(rank: int, size: int) -> float:
    """Stages that are frozen in one step learn in the next, and the other way round."""
    worst = 0.0
    for method in ("1f1b", "zbv"):
        schedule = Schedule.generate(method, size, 4)
        stages = perceptrons(schedule.num_stages)
        expected = perceptrons(schedule.num_stages)
        part = Part(rank, stages, schedule)
        for learning in ([-1], [0, -1], range(len(stages)), [0]):
            for model in (stages, expected):
                clear(model)
                for stage in model:
                    stage.requires_grad_(False)
                for index in learning:
                    model[index].requires_grad_()
            losses, _ = sequential(expected, rows(4))
            worst = max(worst, part.check(part.step(rows(4)), losses, expected))
        part.executor.close()
    return worst


class Auxiliary(nn.Module):
    """Returns a second tensor in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, *_: torch.Tensor) -> Any:
        y = self.linear(x)
        return (y, y.mean(-1)) if self.training else y


def switched(rank: int, size: int) -> float:
    """Other outputs in training mode than in evaluation, gradients or not."""
    schedule = Schedule.generate("zb_h1", size, 4)
    torch.manual_seed(0)
    expected = [Auxiliary() for _ in range(size)]
    stages = [Auxiliary() for _ in range(size)]
    worst = 0.0
    for own, other in zip(stages, expected, strict=True):
        own.load_state_dict(other.state_dict())

    def loss(y: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return squared(y, rest[-1])

    part = Part(rank, stages, schedule)
    for mode in (True, False, True):
        for stage in (*stages, *expected):
            stage.train(mode)
        clear(stages + expected)
        losses, _ = sequential(expected, rows(4), loss)
        worst = max(worst, part.check(part.step(rows(4), loss), losses, expected))
    part.executor.close()
    return worst


def default_device(rank: int, size: int) -> float:
    """Nothing of the executor's own is put on the default device, which may be a GPU."""
    schedule = Schedule.generate("dualpipe", size, 8)
    stages, expected = perceptrons(size), perceptrons(size)
    losses, _ = sequential(expected, rows(8))
    given = rows(8)
    torch.set_default_device("meta")
    try:
        part = Part(rank, stages, schedule)
        worst = part.check(part.step(given), losses, expected)
        part.executor.close()
    finally:
        torch.set_default_device(None)
    return worst


def lone_label(rank: int, size: int) -> float:
    """As published, one label needs no list."""
    del size
    model = DualPipe(perceptrons(2))
    (x,), (y,), _ = rows(1)[0]
    given = [model.step(x, num_chunks=4, criterion=squared, labels=labels) for labels in ([y], y)]
    model.executor.close()
    return (given[0][0] - given[1][0]).abs().max().item()


def lone_micro_batch(rank: int, size: int) -> float:
    """Of schedules with two copies of the stages, one has nothing to do."""
    worst = 0.0
    for method in ("dualpipe", "chimera"):
        schedule = Schedule.generate(method, size, 1)
        expected = perceptrons(size)
        losses, _ = sequential(expected, rows(1))
        part = Part(rank, perceptrons(size), schedule)
        result = part.step(rows(1), return_outputs=True)
        worst = max(worst, part.check(result, losses, expected))
        assert (result.outputs is None) == (result.losses is None)
        part.executor.close()
    return worst


def forgotten(rank: int, size: int) -> float:
    """A pipeline that nobody has closed does not keep its modules."""
    del size
    stages = perceptrons(2)
    store = dist.distributed_c10d._get_default_store()
    model = DualPipe(stages, store=store)
    (x,), (y,), _ = rows(1)[0]
    model.step(x, num_chunks=4, criterion=squared, labels=[y])
    module = weakref.ref(stages[0])
    del model, stages
    end = time.monotonic() + 10
    while module() is not None and time.monotonic() < end:
        gc.collect()
        time.sleep(0.05)
    return float(module() is not None)


def every(rank: int, size: int) -> dict[str, float]:
    parts = (thawed, switched, default_device, lone_label, lone_micro_batch, forgotten)
    return {part.__name__: part(rank, size) for part in parts}


def test_training_programs():
    for found in world.run(every, 2):
        assert max(found.values()) < 1e-13, found
