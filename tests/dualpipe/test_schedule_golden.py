"""The compute orders are those of DeepSeek's and PyTorch's programs, word for word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dualpipe import Instruction, Kind, Schedule

DATA = Path(__file__).parents[1] / "data" / "dualpipe"
GOLDEN: dict[str, list[str]] = json.loads((DATA / "dualpipe.json").read_text())
TORCH = {
    "DualPipeV": "dualpipev",
    "Interleaved1F1B": "interleaved_1f1b",
    "InterleavedZeroBubble": "interleaved_zero_bubble",
    "LoopedBFS": "looped_bfs",
    "ZBVZeroBubble": "zbv",
}


def golden_words(schedule: Schedule, rank: int) -> list[str]:
    """A rank's computations in the words of the recording: kind, direction, micro-batch."""

    def word(step: Instruction) -> str:
        second_stage = step.stage >= schedule.num_ranks
        direction = step.copy if schedule.num_copies == 2 else int(second_stage)
        return f"{step.kind.name.removeprefix('OVERLAP_')}{direction}.{step.micro_batch}"

    words: list[str] = []
    for step in schedule.instructions(rank):
        if step.kind is Kind.OVERLAP_B:
            words[-1] += f"+{word(step)}"
        elif step.kind.computes:
            words.append(word(step))
    return words


@pytest.mark.parametrize("key", GOLDEN)
def test_deepseek(key: str) -> None:
    method, ranks, micro_batches = key.split(":")
    schedule = Schedule.generate(method, int(ranks), int(micro_batches))
    for rank, line in enumerate(GOLDEN[key]):
        recorded = [word for word in line.split() if word[0] not in "<>|"]
        assert golden_words(schedule, rank) == recorded


@pytest.mark.parametrize("name", TORCH)
def test_torch(name: str) -> None:
    recorded = (DATA / "torch_csv" / f"{name}_4r8m_compute_only.csv").read_text()
    rows = [[cell for cell in row.split(",") if cell] for row in recorded.splitlines()]
    written = Schedule.generate(TORCH[name], 4, 8).to_csv()
    assert [row.split(",") for row in written.splitlines()] == rows


@pytest.mark.parametrize("path", sorted((DATA / "torch_csv").glob("*.csv")), ids=lambda p: p.stem)
def test_torch_files_are_read_proved_and_written_back(path: Path) -> None:
    schedule = Schedule.load(path)
    form = "compute_comms" if "comms" in path.stem else "compute_only"
    assert schedule.has_transfers == (form == "compute_comms")
    rows = [
        ",".join(cell for cell in row.split(",") if cell)
        for row in path.read_bytes().decode().split("\r\n")
    ]
    assert schedule.to_csv(form, waits=False) == "\r\n".join(rows)


@pytest.mark.parametrize("name", TORCH)
def test_torch_transfers_hold_the_same_computations(name: str) -> None:
    comms = Schedule.load(DATA / "torch_csv" / f"{name}_4r8m_compute_comms.csv")
    ours = Schedule.generate(TORCH[name], 4, 8)
    assert comms.compute_only().to_csv() == ours.compute_only().to_csv()
