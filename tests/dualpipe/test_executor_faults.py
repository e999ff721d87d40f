"""Ranks that die, stop or disagree: everybody is told who and why, and the others go on."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import world
from dualpipe import MismatchError, PeerLostError, PipelineError, PipelineExecutor, Schedule
from dualpipe.executor.checkpoint import layers_of, load_checkpoint, save_checkpoint
from dualpipe.executor.stream import Stream
from dualpipe.executor.transport.base import TensorSpec
from pipelines import Momentum, Part, perceptrons, squared
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, NUM_LAYERS, ROWS, MICRO_BATCHES = 8, 12, 16, 8
LIMIT_S = 1.5
STEPS_BEFORE, STEPS_AFTER = 1, 2

Trial = tuple[int, bool, str]
"""Seed, whether the rank is stopped instead of killed, a folder."""

BEFORE = ["gpipe", "1f1b", "zb_h1", "zbv", "interleaved_1f1b", "dualpipe", "dualpipev", "chimera"]


AFTER = ["gpipe", "1f1b", "zb_h1", "zbv", "interleaved_zero_bubble", "dualpipev"]


def layers() -> list[nn.Module]:
    torch.manual_seed(5)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(NUM_LAYERS)]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, ROWS, WIDTH, generator=generator)
    return x, y


class Stalls(threading.Thread):
    """Adds up the time in which the machine did not let this process run."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.total_s = 0.0
        self.start()

    def run(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(0.05)
            now = time.monotonic()
            if now - before > 0.3:
                self.total_s += now - before
            before = now


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
            held,
            schedule,
            group,
            boundaries=[TensorSpec((ROWS // MICRO_BATCHES, WIDTH), torch.float32)],
            limit_s=LIMIT_S,
            store=dist.distributed_c10d._get_default_store(),
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
    stalls = Stalls()
    if rank == victim:
        arm(where, signal.SIGSTOP if stop else signal.SIGKILL, moment)
    try:
        for number in range(STEPS_BEFORE, STEPS_BEFORE + 2):
            trainer.step(number)
    except PeerLostError as error:
        raised = time.monotonic() - stalls.total_s
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


def check(trials: Sequence[Trial], every: Sequence[list[Any]]) -> set[int]:
    """The ranks that were lost."""
    expected = sequential(STEPS_BEFORE + 1 + STEPS_AFTER)
    victims = set()
    for trial, found in zip(trials, every, strict=True):
        where = f"seed {trial[0]}"
        survivors = [value for value in found if value is not None]
        assert len(survivors) == 3, where
        victim = survivors[0][1]
        victims.add(victim)
        assert found[victim] is None, where
        together: list[list[float] | None] = [[] for _ in range(STEPS_AFTER)]
        saved = {value[4] for value in survivors}
        # Where all stages have a second copy, the step may be whole without its last instructions.
        assert saved in ({STEPS_BEFORE - 1}, {STEPS_BEFORE}), where
        for rank, value in enumerate(found):
            if value is None:
                continue
            lost, _, late, _, _, after = value
            assert isinstance(lost, PeerLostError), where
            assert (lost.code, lost.lost, lost.peer) == ("lost", (victim,), victim), where
            assert lost.rank == rank
            assert str(victim) in str(lost)
            assert set(lost.notes) == {0, 1, 2, 3} - {victim}
            assert late < LIMIT_S + 2, f"{where}: {late:.2f} s"
            for step, losses in enumerate(after):
                together[step] = together[step] + (losses or [])
        for step, losses in enumerate(together):
            of_one_process = expected[min(saved) + 1 + step]
            torch.testing.assert_close(losses, of_one_process, rtol=1e-4, atol=1e-5)
    return victims


def trials(folder: Path, seeds: Sequence[int], stops: int) -> list[Trial]:
    found = []
    for index, seed in enumerate(seeds):
        own = folder / str(seed)
        own.mkdir()
        found.append((seed, index < stops, str(own)))
    return found


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Any], list[Any]]]:
    """What is asked and what comes home: ten worlds that lose a rank, and one for each fault."""
    lost = trials(tmp_path_factory.mktemp("lost"), range(10), stops=1)
    kinds = ["raises", "sleeps", "no store", "two", "stops"]
    faults = [(kind, str(tmp_path_factory.mktemp(kind))) for kind in kinds]
    asked = [("lose_a_rank", *trial) for trial in lost] + [("with_fault", *args) for args in faults]
    found = world.run_lossy(one_of_many, 4, asked)
    return {"lost": (lost, found[:10]), "faults": (kinds, found[10:])}


def one_of_many(rank: int, size: int, name: str, *args: Any) -> Any:
    return {"lose_a_rank": lose_a_rank, "with_fault": with_fault}[name](rank, size, *args)


def test_survivors_of_a_lost_rank_go_on(worlds: dict[str, tuple[list[Any], list[Any]]]) -> None:
    assert check(*worlds["lost"]) == {0, 1, 2, 3}


@pytest.mark.slow
def test_survivors_of_many_lost_ranks_go_on(tmp_path: Path) -> None:
    many = trials(tmp_path, range(10, 50), stops=15)
    check(many, world.run_lossy(lose_a_rank, 4, many))


# Faults of ranks that live


class Fault(nn.Module):
    """Does something at a forward of a later step."""

    def __init__(self, at: int, act: Any) -> None:
        super().__init__()
        self.at, self.act = at, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.at -= 1
        if self.at == 0:
            self.act()
        return x


def with_fault(rank: int, size: int, kind: str, folder: str) -> Any:
    """A rank raises, is late, takes another with it, or stops and goes on; what is raised then."""
    schedule = Schedule.generate("1f1b", size, 4)
    stages = perceptrons(size, WIDTH)
    moment = Path(folder) / "moment"

    def act() -> None:
        moment.write_text(repr(time.monotonic()))
        if kind in {"raises", "no store"}:
            raise ValueError("out of luck")
        if kind == "two":
            os.kill(int((Path(folder) / "other").read_text()), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stops":
            if not os.fork():
                time.sleep(LIMIT_S + 3)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            time.sleep(LIMIT_S + 1)

    if rank == 0:
        (Path(folder) / "other").write_text(str(os.getpid()))
    if rank == 2:
        stages[2].append(Fault(1 + 4 + 2, act))  # a dry forward, a step, and two forwards
    store = dist.distributed_c10d._get_default_store() if kind != "no store" else None
    part = Part(rank, stages, schedule, limit_s=LIMIT_S, store=store)
    rows = [((torch.randn(2, WIDTH),), (torch.randn(2, WIDTH),), {}) for _ in range(4)]
    part.step(rows)
    try:
        part.step(rows)
    except (ValueError, PeerLostError) as error:
        raised = error
    late = time.monotonic() - float(moment.read_text())
    with pytest.raises(PipelineError, match="broke off") as again:
        part.step(rows)
    assert again.value.code == "broken"
    part.executor.close()
    return raised, late


@pytest.fixture
def faults(worlds: dict[str, tuple[list[Any], list[Any]]]) -> dict[str, list[Any]]:
    return dict(zip(*worlds["faults"], strict=True))


def test_the_error_of_one_rank_reaches_all(faults: dict[str, list[Any]]) -> None:
    for rank, (error, late) in enumerate(faults["raises"]):
        assert late < 2
        if rank == 2:
            assert isinstance(error, ValueError)
            continue
        assert (error.code, error.lost, error.peer, error.rank) == ("failed", (2,), 2, rank)
        assert "rank 2 raised ValueError: out of luck" in str(error)
        assert "broke off at 2F1: ValueError: out of luck" in error.notes[2]


def test_a_rank_that_is_late_is_named(faults: dict[str, list[Any]]) -> None:
    for rank in (0, 1, 3):
        error, late = faults["sleeps"][rank]
        assert late < LIMIT_S + 2
        assert (error.code, error.lost, error.peer) == ("limit", (2,), 2)
        assert error.notes[2] == "was at 2F1"
    error, _ = faults["sleeps"][2]
    assert isinstance(error, PeerLostError)


def test_without_a_store_the_neighbour_is_named(faults: dict[str, list[Any]]) -> None:
    for rank, (error, late) in enumerate(faults["no store"]):
        assert late < 2
        if rank == 2:
            assert isinstance(error, ValueError)
            continue
        assert (error.code, error.lost, error.notes) == ("closed", (), {})
        assert error.peer in {rank - 1, rank + 1}
        assert "store" in error.hint


def test_two_ranks_lost_at_once_are_both_named(faults: dict[str, list[Any]]) -> None:
    assert faults["two"][0] is faults["two"][2] is None
    for rank in (1, 3):
        error, late = faults["two"][rank]
        assert late < LIMIT_S + 2
        assert (error.code, error.lost, error.peer) == ("lost", (0, 2), 0)
        assert set(error.notes) == {1, 3}


def test_a_rank_that_goes_on_later_learns_that_it_was_taken_for_lost(
    faults: dict[str, list[Any]],
) -> None:
    # It has gone on before the world was over, and so brought its error home.
    for rank, value in enumerate(faults["stops"]):
        if value is None:
            assert rank == 2
            continue
        error, late = value
        assert error.lost == (2,)
        assert error.code == ("expelled" if rank == 2 else "lost")
        assert rank == 2 or late < LIMIT_S + 2


# Disagreements


def disagree(rank: int, size: int) -> list[Any]:
    """What each rank raised for each kind of disagreement; all go on after each."""
    schedule = Schedule.generate("dualpipe", size, 8)
    rows = [((torch.randn(2, WIDTH),), (torch.randn(2, WIDTH),), {}) for _ in range(8)]
    found: list[Any] = []
    odd = rank == 1

    def refused(run: Any) -> None:
        start = time.monotonic()
        with pytest.raises(PipelineError) as error:
            run()
        assert time.monotonic() - start < 30
        found.append(error.value)

    def part(**options: Any) -> Part:
        return Part(rank, perceptrons(schedule.num_stages, WIDTH), schedule, **options)

    # At the set-up
    refused(lambda: part(reduce_copies=odd))
    refused(lambda: part(gradients="product" if odd else "sum"))
    refused(lambda: part(transport="none" if odd else "gloo"))
    refused(lambda: part(store=dist.HashStore() if odd else None))
    other = Schedule.generate("zbv" if odd else "interleaved_1f1b", size, 8)
    refused(lambda: Part(rank, perceptrons(other.num_stages, WIDTH), other))
    wrong = perceptrons(size, WIDTH)[: 1 if odd else 2]
    refused(lambda: PipelineExecutor(wrong, schedule))

    # At a step
    good = part()
    step = good.step
    fewer = Schedule.generate("dualpipe", size, 6 if odd else 8)
    refused(lambda: step(rows[: fewer.num_micro_batches], schedule=fewer))
    text = schedule.text().replace(
        "schedule dualpipe", "schedule other" if odd else "schedule dualpipe"
    )
    refused(lambda: step(rows, schedule=Schedule.parse(text)))
    refused(lambda: step(rows, accumulate=odd))
    with torch.set_grad_enabled(not odd):
        refused(lambda: step(rows))
    with torch.autocast("cpu", torch.bfloat16, enabled=odd):
        refused(lambda: step(rows))
    good.executor.measure = odd
    refused(lambda: step(rows))
    good.executor.measure = False
    good.executor.seed = 1 if odd else None
    refused(lambda: step(rows))
    good.executor.seed = None
    specs = [((2, WIDTH), torch.bfloat16 if odd else torch.float32)]
    good.executor.boundaries = [TensorSpec(*spec) for spec in specs]
    refused(lambda: step(rows))
    good.executor.boundaries = [TensorSpec((2, WIDTH), torch.float32)]
    refused(
        lambda: good.executor.step(*(["no tensor"] if odd else ()), labels=[], criterion=squared)
    )

    # Copies that are not equal; then the same weights, and all is well.
    def negate() -> None:
        with torch.no_grad():
            for parameter in good.stages[1].parameters() if odd else ():
                parameter.neg_()

    negate()
    refused(lambda: step(rows))
    negate()
    good.step(rows)
    good.executor.close()
    return found


def test_disagreements_are_reported_before_anything_is_sent() -> None:
    every = world.run(disagree, 4)
    expected = [
        ("mismatch", "reduce_copies"),
        ("gradients", "gradients"),
        ("mismatch", "transport"),
        ("mismatch", "store"),
        ("mismatch", "placement"),
        ("stages", "stages"),
        ("mismatch", "num_micro_batches"),
        ("mismatch", "schedule"),
        ("mismatch", "reducing"),
        ("mismatch", "reducing"),
        ("mismatch", "autocast"),
        ("mismatch", "measure"),
        ("mismatch", "seed"),
        ("mismatch", "boundaries"),
        ("inputs", "inputs"),
        ("copies", "stages"),
    ]
    for errors in every:
        assert [(error.code, error.argument) for error in errors] == expected
        for error in errors:
            assert isinstance(error, MismatchError) == (error.code in {"mismatch", "copies"})
            if error.code == "mismatch":
                assert "rank 1" in error.got, error
                assert "ranks 0, 2, 3" in error.got, error
