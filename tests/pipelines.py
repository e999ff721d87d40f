"""What tests of the executor share: a sequential run, and a rank's part of a pipelined one."""

from __future__ import annotations

import torch
from dualpipe.executor import MicroBatches, PipelineExecutor
from torch import nn


def published_difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """1 - 2<x, y> / (|x|^2 + |y|^2) in float64; two zero gradients count as equal."""
    x, y = x.double(), y.double()
    norms = (x * x + y * y).sum().item()
    return 0.0 if norms == 0 else 1 - 2 * (x * y).sum().item() / norms


def perceptrons(num_stages: int, width: int = 8) -> list[nn.Module]:
    """Small stages with seeded weights."""
    torch.manual_seed(num_stages)
    return [
        nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.LayerNorm(width))
        for _ in range(num_stages)
    ]


def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - target) ** 2).mean()


def sequential(stages, rows, criterion=squared, before=None):
    """Losses and outputs of ``rows`` of (inputs, labels, kwargs); gradients stay in the stages.

    ``before(stage, micro_batch)`` is called before each forward.
    """
    losses, outputs = [], []
    for m, (inputs, labels, kwargs) in enumerate(rows):
        values = inputs
        for index, stage in enumerate(stages):
            if before is not None:
                before(index, m)
            values = stage(*values, **kwargs)
            values = values if isinstance(values, (tuple, list)) else (values,)
        loss = criterion(*values, *labels)
        if torch.is_grad_enabled():
            loss.backward()
        losses.append(loss.detach())
        outputs.append(tuple(None if v is None else v.detach() for v in values))
    return torch.stack(losses), outputs


class Part:
    """One rank's part of a pipeline over ``stages``, which every rank has made alike."""

    def __init__(self, rank: int, stages: list[nn.Module], schedule, **options) -> None:
        self.rank, self.schedule, self.stages = rank, schedule, stages
        held = schedule.placement
        self.places = [
            (stage, copy)
            for copy in range(schedule.num_copies)
            for stage in range(schedule.num_stages)
            if held[copy, stage] == rank
        ]
        modules = {(stage, copy): stages[stage] for stage, copy in self.places}
        self.executor = PipelineExecutor(modules, schedule, **options)

    def rows_of(self, stage: int, rows: list, schedule=None) -> list:
        """The rows of the copies that have this stage here; copy 0's come first."""
        counts = (schedule or self.schedule).micro_batches
        found = []
        for at, copy in self.places:
            if at == stage:
                start = sum(counts[:copy])
                found += rows[start : start + counts[copy]]
        return found

    def step(self, rows: list, criterion=squared, schedule=None, **options):
        """A step on rows of (inputs, labels, kwargs), each of them a micro-batch."""
        entering = self.rows_of(0, rows, schedule)
        leaving = self.rows_of(self.schedule.num_stages - 1, rows, schedule)
        return self.executor.step(
            *(MicroBatches(column) for column in zip(*(row[0] for row in entering), strict=True)),
            labels=[MicroBatches(c) for c in zip(*(row[1] for row in leaving), strict=True)],
            criterion=criterion,
            schedule=schedule,
            **options,
        )

    def check(self, result, losses, expected: list[nn.Module], schedule=None) -> float:
        """Losses bit-equal; the greatest published difference of this rank's gradients."""
        ours = self.rows_of(self.schedule.num_stages - 1, list(losses), schedule)
        if ours:
            assert torch.equal(result.losses, torch.stack(ours)), (result.losses, ours)
        else:
            assert result.losses is None
        return self.difference(expected)

    def difference(self, expected: list[nn.Module]) -> float:
        worst = 0.0
        for stage, _ in self.places:
            pairs = zip(self.stages[stage].parameters(), expected[stage].parameters(), strict=True)
            for parameter, reference in pairs:
                assert (parameter.grad is None) == (reference.grad is None)
                if parameter.grad is not None:
                    worst = max(worst, published_difference(parameter.grad, reference.grad))
        return worst


class Momentum:
    """As torch.optim.SGD, which takes every new process 5 s to import."""

    def __init__(self, parameters) -> None:
        self.parameters = list(parameters)
        self.state: dict[nn.Parameter, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.parameters:
            state = self.state.setdefault(parameter, {"momentum": torch.zeros_like(parameter)})
            state["momentum"].mul_(0.9).add_(parameter.grad)
            parameter.sub_(0.02 * state["momentum"])
            parameter.grad = None
