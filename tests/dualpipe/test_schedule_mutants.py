"""Broken schedules are caught, sound ones are not, and the finger points at the place.

Whether a mutant is broken is for `schedule_checker` to say, which shares no code with the verifier.
"""

from __future__ import annotations

import os
import random
import re

import pytest
from dualpipe import Schedule, ScheduleError
from schedule_checker import Step, judge, read_word

CASES = [
    ("gpipe", 3, 3),
    ("looped_bfs", 2, 3),
    ("1f1b", 4, 5),
    ("interleaved_1f1b", 2, 4),
    ("interleaved_zero_bubble", 2, 3),
    ("zb_h1", 3, 4),
    ("zb_h2", 3, 5),
    ("zbv", 2, 4),
    ("v_half", 3, 3),
    ("v_min", 3, 4),
    ("chimera", 4, 6),
    ("dualpipe", 4, 8),
    ("dualpipe", 2, 3),
    ("dualpipev", 2, 5),
    ("dualpipev", 3, 4),
]
MUTANTS_PER_CASE = int(os.environ.get("EPLB_MUTANTS_PER_CASE", "700"))


def mutate(lines: list[str], rng: random.Random) -> tuple[list[str], list[tuple[int, int, str]]]:
    """One change to one rank's stream; and where: (rank, index, word) before and after it."""
    heads = [line for line in lines if not line.startswith("rank ") or line.startswith("ranks ")]
    streams = [
        line.partition(":")[2].split()
        for line in lines
        if line.startswith("rank ") and not line.startswith("ranks ")
    ]
    rank = rng.randrange(len(streams))
    stream = streams[rank]
    at = rng.randrange(len(stream))
    touched = [(rank, at, stream[at])]
    kind = rng.choice(["delete", "swap", "neighbours", "move", "retarget", "twice", "relabel"])
    if kind == "delete":
        del stream[at]
    elif kind == "twice":
        stream.insert(rng.randrange(len(stream) + 1), stream[at])
    elif kind == "move":
        word = stream.pop(at)
        to = rng.randrange(len(stream) + 1)
        stream.insert(to, word)
        touched.append((rank, to, word))
    elif kind in {"swap", "neighbours"}:
        near = kind == "neighbours"
        other = min(at + 1, len(stream) - 1) if near else rng.randrange(len(stream))
        touched.append((rank, other, stream[other]))
        stream[at], stream[other] = stream[other], stream[at]
    elif kind == "retarget":
        step = read_word(stream[at])
        change = rng.choice([-1, 1])
        if rng.random() < 0.5 or step.mb is None:
            stream[at] = stream[at].replace(str(step.stage), str(max(step.stage + change, 0)), 1)
        else:
            head, _, tail = stream[at].rpartition(str(step.mb))
            stream[at] = f"{head}{max(step.mb + change, 0)}{tail}"
        touched.append((rank, at, stream[at]))
    else:
        step = read_word(stream[at])
        if step.mb is not None:
            form = rng.choice(
                ["{}F{}", "{}B{}", "{}I{}", "{}W{}", "{}f{}>", "<{}f{}", "{}b{}>", "<{}b{}"]
            )
            stream[at] = form.format(f"{step.stage}{chr(39) * step.copy}", step.mb)
        touched.append((rank, at, stream[at]))
    rows = [f"rank {r}: {' '.join(words)}" for r, words in enumerate(streams)]
    return heads + rows, touched


def related(step: Step, other: Step) -> bool:
    """Whether two words speak of one micro-batch on one stage or its neighbours."""
    same = step.copy == other.copy and abs(step.stage - other.stage) <= 1
    return same and (step.mb == other.mb or None in {step.mb, other.mb})


def refusal(text: str) -> ScheduleError | None:
    try:
        Schedule.parse(text)
    except ScheduleError as error:
        return error
    return None


def points_at(error: ScheduleError, touched: list[tuple[int, int, str]]) -> bool:
    words = [read_word(word) for _, _, word in touched if readable(word)]
    named = [error.instruction or "", *(wait[2] for wait in error.waits)]
    # The grid marks each cell that takes part.
    marked = [
        part.split("]")[0]
        for line in (error.report or "").splitlines()
        for part in line.split("[")[1:]
    ]
    steps = [read_word(word) for word in named + marked if readable(word)]
    if any(related(step, word) for step in steps for word in words):
        return True
    cells = re.findall(r"rank (\d+) @ (\d+)", error.report or "")
    return any(
        rank == int(cell_rank) and abs(index - int(cell_index)) <= 1
        for rank, index, _ in touched
        for cell_rank, cell_index in cells
    )


def readable(word: str) -> bool:
    try:
        read_word(word)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(("method", "ranks", "micro_batches"), CASES)
def test_mutants(method: str, ranks: int, micro_batches: int) -> None:
    schedule = Schedule.generate(method, ranks, micro_batches)
    lines = schedule.text().splitlines()
    assert judge(schedule.text()) is None
    rng = random.Random(f"{method} {ranks} {micro_batches}")
    broken = 0
    for _ in range(MUTANTS_PER_CASE):
        mutant, touched = mutate(lines, rng)
        text = "\n".join(mutant)
        verdict = judge(text)
        error = refusal(text)
        if error is None:
            assert verdict is None, f"{verdict}, but accepted: {touched}\n{text}"
            continue
        assert verdict is not None, f"sound, but refused: {touched}\n{error}"
        broken += 1
        if error.rank is not None:
            assert points_at(error, touched), f"{verdict}: {touched}\n{error}"
        else:
            # The text itself is out of shape: the message quotes line and word.
            quoted = any(f'"{word}"' in error.got for _, _, word in touched)
            assert quoted or error.code == "torn_pair"
    # A mutation that breaks nothing is possible, but the exception.
    assert broken > MUTANTS_PER_CASE // 2


def test_enough_mutants() -> None:
    assert len(CASES) * MUTANTS_PER_CASE >= 10_000


@pytest.mark.parametrize(("method", "ranks", "micro_batches"), CASES)
def test_valid_forms(method: str, ranks: int, micro_batches: int) -> None:
    schedule = Schedule.generate(method, ranks, micro_batches, forward_only=True)
    assert judge(schedule.text()) is None
    assert not schedule.has_backward
