"""Worlds of processes for tests: gloo, one thread a rank, results and tracebacks brought home.

A world costs one fresh interpreter and one import of torch, whatever its size: its ranks are
forked from that interpreter before anything in it has been started (no thread, no store).
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path


def run(function, num_ranks: int, *args, limit_s: float = 120.0) -> list:
    """What ``function(rank, num_ranks, *args)`` returns on every rank of a world.

    Args:
        function: A function at the top of a module; it finds the default group made, and may
            return what pickles.
        num_ranks: The size of the world.
        *args: What pickles.
        limit_s: When it has passed, every process is ended.

    Raises:
        AssertionError: A rank raised, died or was not done in time; with every traceback.
    """
    return run_each(function, [num_ranks], *args, limit_s=limit_s)[num_ranks]


def run_each(function, sizes: list[int], *args, limit_s: float = 120.0) -> dict[int, list]:
    """As :func:`run`, for several worlds one after the other, at the cost of one import."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code = function.__code__.co_filename, function.__qualname__
        (folder / "job").write_bytes(pickle.dumps((*code, sizes, args, limit_s)))
        command = [sys.executable, "-W", "error", __file__, name]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        found: dict[int, list] = {size: [] for size in sizes}
        faults = []
        for size in sizes:
            for rank in range(size):
                file = folder / f"{size}-{rank}"
                good, value = pickle.loads(file.read_bytes()) if file.exists() else (False, "ended")
                found[size].append(value)
                if not good:
                    faults.append(f"rank {rank} of {size}: {value}")
    assert not faults, "\n".join([*faults, outcome.stderr[-4000:]])
    return found


def _launch(folder: Path) -> None:
    path, name, sizes, args, limit_s = pickle.loads((folder / "job").read_bytes())
    sys.path[:0] = [str(Path(__file__).parent), str(Path(path).parent)]
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    end = time.monotonic() + limit_s
    for size in sizes:
        if not _world(folder, getattr(module, name), size, args, end):
            return


def _world(folder: Path, function, size: int, args: tuple, end: float) -> bool:
    """Whether all ranks were done in time. When one fails, the others get 5 s more."""
    ranks = {}
    for rank in range(size):
        pid = os.fork()
        if not pid:
            _rank(folder, function, rank, size, args)
        ranks[pid] = rank
    good = True
    while ranks and time.monotonic() < end:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            time.sleep(0.005)
            continue
        del ranks[pid]
        if status:
            good, end = False, min(end, time.monotonic() + 5)
    late = not good or bool(ranks)
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return not late


def _rank(folder: Path, function, rank: int, size: int, args: tuple) -> None:
    """Never returns: a forked process has nothing of the launcher's to end in good order."""
    good = True
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        store = f"file://{folder}/store-{size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        value = function(rank, size, *args)
        content = pickle.dumps((True, value))
        dist.barrier()
    except BaseException:
        good, content = False, pickle.dumps((False, traceback.format_exc()))
    part = folder / f"{size}-{rank}.part"
    part.write_bytes(content)
    part.rename(folder / f"{size}-{rank}")
    sys.stderr.flush()
    os._exit(0 if good else 1)


if __name__ == "__main__":
    _launch(Path(sys.argv[1]))
