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
