"""Ranks that die, stop or disagree: everybody is told who and why, and the others go on."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import world
from dualpipe import PeerLostError, PipelineExecutor, Schedule
from dualpipe.executor.checkpoint import layers_of, load_checkpoint, save_checkpoint
from dualpipe.executor.stream import Stream
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WIDTH, NUM_LAYERS, ROWS, MICRO_BATCHES = 8, 12, 16, 8
LIMIT_S = 2.0
STEPS_BEFORE, STEPS_AFTER = 2, 2

BEFORE = ["gpipe", "1f1b", "zb_h1", "zbv", "interleaved_1f1b", "dualpipe", "dualpipev", "chimera"]
AFTER = ["gpipe", "1f1b", "zb_h1", "zbv", "interleaved_zero_bubble", "dualpipev"]


def layers() -> list[nn.Module]:
    torch.manual_seed(5)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(NUM_LAYERS)]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, ROWS, WIDTH, generator=generator)
    return x, y


def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - target) ** 2).mean()


class Momentum:
    """As torch.optim.SGD, which takes every new process 5 s to import."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.state: dict[nn.Parameter, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.parameters:
            state = self.state.setdefault(parameter, {"momentum": torch.zeros_like(parameter)})
            state["momentum"].mul_(0.9).add_(parameter.grad)
            parameter -= 0.02 * state["momentum"]
            parameter.grad = None


class Trainer:
    """One rank's part of a run of training."""

    def __init__(self, method: str, group: dist.ProcessGroup, folder: Path) -> None:
        self.group, self.folder = group, folder
        schedule = Schedule.generate(method, group.size(), MICRO_BATCHES)
        stages = schedule.num_stages
        self.bounds = [NUM_LAYERS * stage // stages for stage in range(stages + 1)]
        everything = layers()
        held = {
            (stage, copy): nn.Sequential(*everything[self.bounds[stage] : self.bounds[stage + 1]])
            for copy, row in enumerate(schedule.placement.tolist())
            for stage, holder in enumerate(row)
            if holder == group.rank()
        }
        self.layers = layers_of(held, self.bounds)
        parameters = [p for layer in self.layers.values() for p in layer.parameters()]
        self.optimizer = Momentum(parameters)
        self.executor = PipelineExecutor(
            held, schedule, group, limit_s=LIMIT_S, store=dist.distributed_c10d._get_default_store()
        )

    def step(self, number: int) -> list[float] | None:
        x, y = batch(number)
        stages = self.executor.stages.values()
        # Each copy has a part of the rows, and enters and leaves on ranks of its own.
        copies = self.executor.schedule.num_copies
        inputs = [x.chunk(copies)[stage.copy] for stage in stages if stage.is_first]
        labels = [y.chunk(copies)[stage.copy] for stage in stages if stage.is_last]
        result = self.executor.step(*inputs, labels=labels, criterion=squared)
        self.optimizer.step()
        save_checkpoint(self.folder, number, self.layers, NUM_LAYERS, optimizer=self.optimizer)
        return None if result.losses is None else result.losses.tolist()


def lose_a_rank(rank: int, size: int, seed: int, stop: bool, folder: str) -> Any:
    """Trains, loses a rank at a random instruction, and trains on with the others."""
    random_ = random.Random(seed)
    method, then = random_.choice(BEFORE), random_.choice(AFTER)
    victim, where = random_.randrange(size), random_.random()
    moment = Path(folder) / "moment"
    trainer = Trainer(method, dist.group.WORLD, Path(folder) / "checkpoint")
    losses = [trainer.step(number) for number in range(STEPS_BEFORE)]
    if rank == victim:
        arm(where, signal.SIGSTOP if stop else signal.SIGKILL, moment)
    try:
        for number in range(STEPS_BEFORE, STEPS_BEFORE + 2):
            trainer.step(number)
    except PeerLostError as error:
        raised = time.monotonic()
        lost = error
    trainer.executor.close()
    alive = [other for other in range(size) if other not in lost.lost]
    group = dist.new_group(alive, use_local_synchronization=True)
    trainer = Trainer(then, group, trainer.folder)
    last = load_checkpoint(
        trainer.folder, trainer.layers, NUM_LAYERS, optimizer=trainer.optimizer, group=group
    )
    after = [trainer.step(last + 1 + number) for number in range(STEPS_AFTER)]
    trainer.executor.close()
    late = raised - float(moment.read_text())
    return lost, victim, late, losses, last, after


def arm(where: float, number: signal.Signals, moment: Path) -> None:
    """Ends or stops this process at an instruction of the next step."""

    def run(self: Stream) -> None:
        fatal = int(where * len(self.actions))
        for index, action in enumerate(self.actions):
            self.at = index
            if index == fatal:
                moment.write_text(repr(time.monotonic()))
                os.kill(os.getpid(), number)
            action()

    Stream.run = run  # type: ignore[method-assign]


def sequential(steps: int) -> list[list[float]]:
    """The losses of every micro-batch in one process."""
    model = nn.Sequential(*layers())
    optimizer = Momentum(model.parameters())
    found = []
    for number in range(steps):
        rows = zip(*(part.chunk(MICRO_BATCHES) for part in batch(number)), strict=True)
        losses = []
        for x, y in rows:
            loss = squared(model(x), y)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        found.append(losses)
    return found


def check(trials: Sequence[tuple[int, bool, str]]) -> set[int]:
    """The ranks that were lost."""
    expected = sequential(STEPS_BEFORE + STEPS_AFTER)
    victims = set()
    for (seed, stop, _), found in zip(
        trials, world.run_lossy(lose_a_rank, 4, list(trials)), strict=True
    ):
        where = f"seed {seed}"
        survivors = [value for value in found if value is not None]
        assert len(survivors) == 3, where
        victim = survivors[0][1]
        victims.add(victim)
        assert found[victim] is None, where
        together: list[list[float] | None] = [[] for _ in range(STEPS_AFTER)]
        for rank, value in enumerate(found):
            if value is None:
                continue
            lost, _, late, _, last, after = value
            print(seed, stop, rank, f"{late:.3f}", str(lost).replace("\n", " | "))
            assert isinstance(lost, PeerLostError), where
            assert (lost.code, lost.lost, lost.peer) == ("lost", (victim,), victim), where
            assert lost.rank == rank
            assert str(victim) in str(lost)
            assert set(lost.notes) == {0, 1, 2, 3} - {victim}
            assert late < LIMIT_S + 2, f"{where}: {late:.2f} s"
            assert last == STEPS_BEFORE - 1
            for step, losses in enumerate(after):
                together[step] = together[step] + (losses or [])
        for step, losses in enumerate(together):
            torch.testing.assert_close(losses, expected[STEPS_BEFORE + step], rtol=1e-4, atol=1e-5)
    return victims


def trials(folder: Path, seeds: Sequence[int], stops: int) -> list[tuple[int, bool, str]]:
    found = []
    for index, seed in enumerate(seeds):
        own = folder / str(seed)
        own.mkdir()
        found.append((seed, index < stops, str(own)))
    return found


def test_survivors_of_a_lost_rank_go_on(tmp_path: Path) -> None:
    assert check(trials(tmp_path, range(10), stops=2)) == {0, 1, 2, 3}


@pytest.mark.slow
def test_survivors_of_many_lost_ranks_go_on(tmp_path: Path) -> None:
    check(trials(tmp_path, range(10, 50), stops=15))
