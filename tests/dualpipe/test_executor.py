"""The executor over gloo: every schedule, and everything a step can be given."""

from __future__ import annotations

import pytest
import torch
import world
from dualpipe import METHODS, PipelineError, Schedule
from dualpipe.executor import MicroBatches, TensorSpec, seed_of
from pipelines import Part, perceptrons, sequential, squared
from torch import nn

WIDTH = 8
PRELOAD = ["torch._dynamo"]
"""Checkpoints import it."""


def rows_of(count: int, *, width: int = WIDTH, sizes=(2,), seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for m in range(count):
        shape = (sizes[m % len(sizes)], width)
        x, y = (torch.randn(shape, generator=generator) for _ in range(2))
        rows.append(((x,), (y,), {}))
    return rows


def every_schedule(rank: int, size: int) -> dict[str, float]:
    """Losses of every generator are those of a sequential run; returns the gradients' difference."""
    found = {}
    for method in METHODS:
        schedule = Schedule.generate(method, size, 2 * size)
        rows = rows_of(schedule.num_micro_batches)
        expected = perceptrons(schedule.num_stages)
        losses, outputs = sequential(expected, rows)
        part = Part(rank, perceptrons(schedule.num_stages), schedule)
        found[method] = part.check(part.step(rows), losses, expected)
        with torch.no_grad():
            result = part.step(rows, return_outputs=True)
        part.check(result, losses, expected)
        ours = part.rows_of(schedule.num_stages - 1, outputs)
        if ours:
            assert torch.equal(result.outputs, torch.cat([output for (output,) in ours]))
        assert not part.executor.stages[part.places[0]].flights
        part.executor.close()
    return found


class Several(nn.Module):
    """Hands on two float tensors, an integer one and None."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, skip, index, nothing, *, scale=None, shift=1.0):
        assert nothing is None
        assert index.dtype == torch.int64
        y = torch.tanh(self.first(x)) + skip
        if scale is not None:
            y = y * scale
        return y, self.second(skip)[..., : WIDTH // 2].repeat(1, 2) * shift, index + 1, None


def weighted(x, skip, index, nothing, target, weight):
    return (((x + skip - target) ** 2).mean(-1) * weight).sum() + index.sum() * 0


def several_rows(count: int, start: int = 0) -> list:
    rows = []
    for m in range(start, start + count):
        generator = torch.Generator().manual_seed(m)
        size = 1 + m % 3
        x, skip, y = (torch.randn(size, WIDTH, generator=generator) for _ in range(3))
        index, weight = torch.arange(size), torch.rand(size, generator=generator)
        scale = torch.rand(size, 1, generator=generator)
        rows.append(((x, skip, index, None), (y, weight), {"scale": scale, "shift": 0.5}))
    return rows


def what_steps_take(rank: int, size: int) -> list[float]:
    """Several inputs and outputs, not all of them floats, uneven micro-batches, keyword arguments."""
    found = []
    for method in ("dualpipe", "zbv", "interleaved_1f1b"):
        schedule = Schedule.generate(method, size, 2 * size)
        torch.manual_seed(0)
        expected = [Several() for _ in range(schedule.num_stages)]
        torch.manual_seed(0)
        part = Part(rank, [Several() for _ in range(schedule.num_stages)], schedule)
        for start in (0, 100):
            rows = several_rows(schedule.num_micro_batches, start)
            losses, outputs = sequential(expected, rows, weighted)
            counts = schedule.micro_batches
            kwargs = {}
            for stage, copy in part.places:
                first = sum(counts[:copy])
                own = [row[2] for row in rows[first : first + counts[copy]]]
                scale = MicroBatches(row["scale"] for row in own)
                kwargs[stage, copy] = {"scale": scale, "shift": 0.5}
            result = part.step(rows, weighted, kwargs=kwargs, return_outputs=True)
            found.append(part.check(result, losses, expected))
            ours = part.rows_of(schedule.num_stages - 1, outputs)
            if ours:
                for got, column in zip(result.outputs, zip(*ours, strict=True), strict=True):
                    assert got is None if column[0] is None else torch.equal(got, torch.cat(column))
            for module in (*expected, *part.stages):
                module.zero_grad()
        part.executor.close()
    return found


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.dropout(torch.tanh(self.linear(x)), 0.5, train=self.training)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)


class Batched(nn.Module):
    """Batch norm in training: a dry forward must not leave traces in its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return self.norm(self.linear(x))


def seeded(kind, count):
    torch.manual_seed(5)
    return [kind() for _ in range(count)]


def kinds_of_stages(rank: int, size: int) -> list[float]:
    """Dropout by seeds, checkpoints, buffers, autocast, means, compute orders without transfers."""
    found = []
    schedule = Schedule.generate("zb_h1", size, 2 * size)
    rows = rows_of(2 * size, sizes=(4, 3))

    for step in range(2):
        expected = seeded(Dropped, size)
        losses, _ = sequential(
            expected, rows, before=lambda s, m, at=step: torch.manual_seed(seed_of(7, at, s, m))
        )
        if step == 0:
            part = Part(rank, seeded(Dropped, size), schedule, seed=7)
        for module in part.stages:
            module.zero_grad()
        state = torch.get_rng_state()
        found.append(part.check(part.step(rows), losses, expected))
        assert torch.equal(torch.get_rng_state(), state)
    part.executor.close()

    for kind in (Checkpointed, Batched):
        expected = seeded(kind, size)
        losses, _ = sequential(expected, rows)
        part = Part(rank, seeded(kind, size), schedule.compute_only())
        found.append(part.check(part.step(rows), losses, expected))
        for stage, _ in part.places:
            buffers = zip(part.stages[stage].buffers(), expected[stage].buffers(), strict=True)
            assert all(torch.equal(*pair) for pair in buffers)
        part.executor.close()

    expected = perceptrons(size)
    part = Part(rank, perceptrons(size), schedule, gradients="mean")
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = sequential(expected, rows)
        result = part.step(rows)
    for module in expected:
        for parameter in module.parameters():
            parameter.grad /= len(rows)
    found.append(part.check(result, losses, expected))
    part.executor.close()
    return found


class Gated(nn.Module):
    """Batches along dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.sigmoid(self.linear(x)) * x


def how_batches_are_cut(rank: int, size: int) -> list[float]:
    """Whole tensors cut along a dimension, inputs that need gradients, changing shapes, given ones."""
    schedule = Schedule.generate("1f1b", size, 2 * size)
    m = schedule.num_micro_batches
    found = []
    expected, stages = seeded(Gated, size), seeded(Gated, size)
    part = Part(rank, stages, schedule, batch_dim=1)
    for length, batch in ((3, 2 * m), (5, 2 * m + 1), (3, 2 * m)):
        torch.manual_seed(batch)
        weight = torch.randn(WIDTH, requires_grad=True)
        noise, y = torch.randn(2, length, batch, WIDTH)
        x = noise * weight
        cut = zip(x.tensor_split(m, 1), y.tensor_split(m, 1), strict=True)
        leaf = [(part_x.detach().requires_grad_(), part_y) for part_x, part_y in cut]
        losses, _ = sequential(expected, [((a,), (b,), {}) for a, b in leaf])
        x.backward(torch.cat([a.grad for a, _ in leaf], 1))
        reference, weight.grad = weight.grad, None

        result = part.executor.step(
            *([noise * weight] if rank == 0 else []),
            labels=[y] if rank == size - 1 else [],
            criterion=squared,
            return_outputs=True,
        )
        found.append(part.check(result, losses, expected))
        if rank == 0:
            torch.testing.assert_close(weight.grad, reference)
        if rank == size - 1:
            assert result.outputs.shape == y.shape
    part.executor.close()

    given = [TensorSpec((2, WIDTH), torch.float32)]
    part = Part(rank, perceptrons(size), schedule, boundaries=given)
    rows = rows_of(m)
    expected = perceptrons(size)
    losses, _ = sequential(expected, rows)
    found.append(part.check(part.step(rows), losses, expected))
    # Another number of micro-batches.
    other = Schedule.generate("1f1b", size, 3)
    rows = rows_of(3, seed=1)
    more, _ = sequential(expected, rows)
    found.append(part.check(part.step(rows, schedule=other), more, expected, other))
    part.executor.close()
    return found


def refusals(rank: int, size: int) -> list[str]:
    """What cannot be is refused on every rank before anything is sent, and the next step runs."""
    schedule = Schedule.generate("1f1b", size, size)
    rows = rows_of(size)
    part = Part(rank, perceptrons(size), schedule)
    codes = []

    def refused(run) -> None:
        try:
            run()
        except PipelineError as error:
            codes.append(error.code)
        else:
            codes.append("none")

    x, y = torch.zeros(size, WIDTH), torch.zeros(size, WIDTH)
    first, last = ([x] if rank == 0 else []), ([y] if rank == size - 1 else [])
    step = part.executor.step
    refused(lambda: step(*first, labels=last))
    refused(lambda: step(*(v[1:] for v in first), labels=last, criterion=squared))
    refused(lambda: step(*(v[0, 0] for v in first), labels=last, criterion=squared))
    refused(lambda: step(x, labels=last, criterion=squared))
    refused(lambda: step(*first, labels=last, criterion=squared, kwargs={"a": 1, 0: {}}))
    forwards = schedule.forward_only()
    refused(lambda: step(*first, labels=last, criterion=squared, schedule=forwards))
    refused(lambda: step(*(["x"] * len(first)), labels=last, criterion=squared))
    expected = perceptrons(size)
    losses, _ = sequential(expected, rows)
    assert part.check(part.step(rows), losses, expected) < 1e-13
    part.executor.close()
    return codes


def everything(rank: int, size: int) -> dict:
    return {
        "schedules": every_schedule(rank, size),
        "steps": what_steps_take(rank, size),
        "stages": kinds_of_stages(rank, size),
        "cut": how_batches_are_cut(rank, size),
        "refusals": refusals(rank, size),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    """What every rank of one world has found; all of it has been compared there already."""
    return world.run(everything, 4)


def test_every_schedule_equals_a_sequential_run(ranks):
    for found in ranks:
        assert set(found["schedules"]) == set(METHODS)
        assert max(found["schedules"].values()) < 1e-13


def test_what_a_step_takes(ranks):
    for found in ranks:
        assert max(found["steps"]) < 1e-13


def test_kinds_of_stages(ranks):
    for found in ranks:
        assert max(found["stages"]) < 1e-13


def test_how_batches_are_cut(ranks):
    for found in ranks:
        assert max(found["cut"]) < 1e-13


def test_refusals(ranks):
    for found in ranks:
        assert found["refusals"] == [
            "criterion",
            "batch_size",
            "batch_dim",
            "inputs",
            "kwargs",
            "no_backward",
            "not_a_tensor",
        ]
