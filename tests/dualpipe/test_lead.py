"""Forwards that a rank runs while the ranks still agree: what stays, and what is taken back."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import world
from dualpipe import MismatchError, PeerLostError, Schedule
from pipelines import Part, sequential
from torch import nn

WIDTH = 8


class Traced(nn.Module):
    """Has buffers that change, draws random numbers, and counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("calls", torch.zeros(()))
        self.num_forwards = 0
        self.fails = False

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        self.num_forwards += 1
        self.calls = self.calls + 1  # another tensor
        if self.fails:
            raise ValueError("this forward fails")
        return self.norm(self.linear(x)) * scale + 0 * torch.rand(())


def stages() -> list[Traced]:
    torch.manual_seed(3)
    return [Traced(), Traced()]


def state_of(module: Traced) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in module.buffers()] + [torch.get_rng_state()]


def lead(rank: int, size: int) -> dict:
    schedule = Schedule.generate("1f1b", size, 4)
    torch.manual_seed(0)
    rows = [((torch.randn(4, WIDTH),), (torch.randn(4, WIDTH),), {}) for _ in range(4)]
    part, expected = Part(rank, stages(), schedule), stages()
    own = part.stages[rank]
    for _ in range(4):
        losses, _ = sequential(expected, rows)
        difference = part.check(part.step(rows), losses, expected)
    found = {"difference": difference}

    # What is refused leaves no traces, though a forward has run.
    before, num_forwards = state_of(own), own.num_forwards
    with pytest.raises(MismatchError, match="training"), torch.set_grad_enabled(rank != 1):
        part.step(rows)
    found["refused"] = own.num_forwards - num_forwards
    assert all(map(torch.equal, state_of(own), before))

    # The other rank has something new, so the forward is run again, by another plan.
    num_forwards = own.num_forwards
    losses, _ = sequential([expected[0], partial(expected[1], scale=2.0)], rows)
    result = part.step(rows, kwargs={"scale": 2.0} if rank == 1 else {})
    found["difference"] = max(difference, part.check(result, losses, expected))
    found["again"] = own.num_forwards - num_forwards
    assert all(map(torch.equal, own.buffers(), expected[rank].buffers()))

    # Its error is raised when the ranks have agreed, and reaches the other.
    for _ in range(3):
        part.step(rows)
    own.fails = rank == 0
    with pytest.raises(ValueError if rank == 0 else PeerLostError):
        part.step(rows)
    part.executor.close(drop=True)
    return found


def test_a_forward_before_the_agreement_is_taken_back_where_there_is_none():
    first, last = world.run(lead, 2)
    assert max(first["difference"], last["difference"]) < 1e-13
    # Four micro-batches; a dry one for the new plan; the one that was taken back.
    assert (first["refused"], first["again"]) == (1, 6)
    assert (last["refused"], last["again"]) == (0, 4)
