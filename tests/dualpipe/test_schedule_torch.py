"""PyTorch runs what is exported, on CPU, with the losses of a sequential run, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from dualpipe import METHODS, Schedule

pytest.importorskip("torch")

WORKER = Path(__file__).with_name("torch_worker.py")
EXPRESSIBLE = [method for method in METHODS if method not in {"chimera", "dualpipe"}]
WORLD = 4


class StageStub:
    """What PyTorch's schedules ask of a stage when they are made."""

    def __init__(self, ranks: int, stages: int) -> None:
        self.group, self.group_rank, self.group_size = None, 0, ranks
        self.num_stages, self.stage_index = stages, 0
        self.is_first = self.is_last = self.has_backward = True
        self.submod = None
        self.stage_index_to_group_rank: dict[int, int] = {}


@pytest.mark.parametrize(
    ("name", "method", "stages_per_rank"),
    [
        ("ScheduleLoopedBFS", "looped_bfs", 2),
        ("ScheduleLoopedBFS", "looped_bfs", 3),
        ("ScheduleInterleaved1F1B", "interleaved_1f1b", 2),
        ("ScheduleInterleaved1F1B", "interleaved_1f1b", 3),
        ("ScheduleInterleavedZeroBubble", "interleaved_zero_bubble", 2),
        ("ScheduleInterleavedZeroBubble", "interleaved_zero_bubble", 3),
        ("ScheduleInterleavedZeroBubble", "zb_h1", 1),
        ("ScheduleZBVZeroBubble", "zbv", 2),
        ("ScheduleDualPipeV", "dualpipev", 2),
    ],
)
def test_orders_are_those_of_torch_wherever_it_takes_the_sizes(
    name: str, method: str, stages_per_rank: int
) -> None:
    import torch
    from torch.distributed.pipelining import schedules

    compared = 0
    for ranks in range(2, 6):
        for micro_batches in range(1, 3 * ranks + 1):
            stages = [StageStub(ranks, stages_per_rank * ranks) for _ in range(stages_per_rank)]
            try:
                made = getattr(schedules, name)(
                    stages, micro_batches, loss_fn=torch.nn.functional.mse_loss
                )
            except ValueError:
                continue  # PyTorch wants other numbers of micro-batches.
            v = stages_per_rank if method.startswith(("looped", "interleaved")) else None
            ours = Schedule.generate(method, ranks, micro_batches, stages_per_rank=v).to_csv()
            theirs = [
                ",".join(str(action) for action in made.pipeline_order[rank] if action is not None)
                for rank in range(ranks)
            ]
            assert ours.splitlines() == theirs, (ranks, micro_batches)
            compared += 1
    assert compared >= 10


def waits() -> bool:
    """Whether this PyTorch knows waits for sends, and so wants them."""
    from torch.distributed.pipelining import schedules

    return hasattr(schedules, "WAIT_SEND_F")


def test_runs_in_torch(tmp_path: Path) -> None:
    folder = tmp_path / "schedules"
    folder.mkdir()
    for method in EXPRESSIBLE:
        for micro_batches in (3, 8):
            schedule = Schedule.generate(method, WORLD, micro_batches)
            for form in ("compute_only", "compute_comms"):
                name = f"{method}-{schedule.num_stages}-{micro_batches}-{form}.csv"
                text = schedule.to_csv(form, waits=waits())
                (folder / name).write_bytes(text.encode())
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                str(WORKER),
                str(rank),
                str(WORLD),
                str(tmp_path / "store"),
                str(folder),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [worker.communicate(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors[-4000:]
    ran = outputs[0][0].split()
    assert ran == sorted(path.stem for path in folder.glob("*.csv"))
    assert len(ran) == len(EXPRESSIBLE) * 4
