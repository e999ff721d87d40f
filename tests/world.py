"""Worlds of processes for tests: gloo, one thread a rank, results and tracebacks brought home.

A world costs one fresh interpreter and one import of torch, whatever its size: its ranks are
forked from that interpreter before anything in it has been started (no thread, no store).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def run(function, num_ranks: int, *args, limit_s: float = 240.0) -> list:
    """What ``function(rank, num_ranks, *args)`` returns on every rank of a world.

    Args:
        function: A function at the top of a module; it finds the default group made, and may
            return what pickles. The module may name others in ``PRELOAD`` that its ranks would
            import, each of them for itself.
        num_ranks: The size of the world.
        *args: What pickles.
        limit_s: When it has passed, every process is ended.

    Raises:
        AssertionError: A rank raised, died or was not done in time; with every traceback.
    """
    return run_each(function, [num_ranks], *args, limit_s=limit_s)[num_ranks]


def run_each(function, sizes: list[int], *args, limit_s: float = 240.0) -> dict[int, list]:
    """As :func:`run`, for several worlds one after the other, at the cost of one import."""
    found = _run(function, [(size, args) for size in sizes], limit_s, lossy=False)
    return dict(zip(sizes, found, strict=True))


def run_parts(parts: list, num_ranks: int) -> dict[str, list]:
    """As :func:`run`, for several functions of one module one after the other in one world: what
    each rank returned, by the name of the function.
    """
    by_rank = run(parts, num_ranks)
    return {part.__name__: [one[part.__name__] for one in by_rank] for part in parts}


def run_lossy(
    function, num_ranks: int, trials: list[tuple], *, limit_s: float = 30.0, at_once: int = 1
) -> list:
    """As :func:`run` for the arguments of each trial, in worlds whose ranks may die or stop.

    Such a rank gives None, and is ended when all others are done. The store of the default group
    lives in a process that is none of the ranks, and no rank waits for another at the end.

    Args:
        limit_s: For each trial.
        at_once: How many worlds there are at a time: those that wait take no time of others.
    """
    worlds = [(num_ranks, args) for args in trials]
    return _run(function, worlds, limit_s, lossy=True, at_once=at_once)


def _run(
    function, worlds: list[tuple[int, tuple]], limit_s: float, *, lossy: bool, at_once: int = 1
) -> list:
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        several = isinstance(function, list)
        path = (function[0] if several else function).__code__.co_filename
        name = [part.__qualname__ for part in function] if several else function.__qualname__
        (folder / "job").write_bytes(pickle.dumps((path, name, worlds, limit_s, lossy, at_once)))
        command = [sys.executable, "-W", "error", __file__, where]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        found, faults = [], []
        for number, (size, args) in enumerate(worlds):
            found.append([])
            for rank in range(size):
                file = folder / f"{number}-{rank}"
                good, value = pickle.loads(file.read_bytes()) if file.exists() else (False, "ended")
                found[-1].append(value)
                if not good:
                    faults.append(f"rank {rank} of {size}, {args}: {value}")
            if faults:
                break
    assert not faults, "\n".join([*faults, outcome.stderr[-4000:]])
    return found


def _launch(folder: Path) -> None:
    path, name, worlds, limit_s, lossy, at_once = pickle.loads((folder / "job").read_bytes())
    sys.path[:0] = [str(Path(__file__).parent), str(Path(path).parent)]
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for heavy in getattr(module, "PRELOAD", ()):
        importlib.import_module(heavy)
    function = (
        partial(_all, [getattr(module, one) for one in name])
        if isinstance(name, list)
        else getattr(module, name)
    )
    end = time.monotonic() + limit_s
    host = _host(folder) if lossy else None
    waiting, running, good = list(enumerate(worlds)), [], True
    while running or (waiting and good):
        if waiting and good and len(running) < at_once:
            number, (size, args) = waiting.pop(0)
            if lossy:
                end = time.monotonic() + limit_s
            running.append(_world(folder, function, number, size, args, end, lossy=lossy))
        for one in running.copy():
            outcome = next(one)
            if outcome is not None:
                good &= outcome
                running.remove(one)
        time.sleep(0.005)
    if host is not None:
        os.kill(host, signal.SIGKILL)


def _all(parts, rank: int, size: int) -> dict:
    return {part.__name__: part(rank, size) for part in parts}


def _host(folder: Path) -> int:
    """Starts the process where the store lives."""
    pid = os.fork()
    if not pid:
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        part = folder / "port.part"
        part.write_text(str(store.port))
        part.rename(folder / "port")
        while os.getppid() != 1:
            time.sleep(1)
        os._exit(0)
    while not (folder / "port").exists():
        time.sleep(0.005)
    return pid


def _world(
    folder: Path, function, number: int, size: int, args: tuple, end: float, *, lossy: bool
) -> Iterator[bool | None]:
    """Starts a world and looks after it: None while it runs, then whether all ranks were done in
    time. When one fails, the others get 5 s more.
    """
    ranks = {}
    for rank in range(size):
        pid = os.fork()
        if not pid:
            _rank(folder, function, number, rank, size, args, lossy=lossy)
        ranks[pid] = rank
    good = True
    # A rank that is stopped from outside, and goes on, is like any other.
    noticed = os.WUNTRACED | os.WCONTINUED if lossy else 0
    stopped: set[int] = set()
    moving = time.monotonic()
    while ranks and time.monotonic() < min(end, moving + 0.5):
        yield None
        if ranks.keys() - stopped:
            moving = time.monotonic()
        for pid, rank in list(ranks.items()):
            changed, status = os.waitpid(pid, os.WNOHANG | noticed)
            if not changed:
                continue
            if os.WIFCONTINUED(status):
                stopped.discard(pid)
                continue
            file = folder / f"{number}-{rank}"
            if lossy and not os.WIFEXITED(status) and not file.exists():
                file.write_bytes(pickle.dumps((True, None)))
            if os.WIFSTOPPED(status):
                stopped.add(pid)
                continue
            del ranks[pid]
            if status and not (lossy and os.WIFSIGNALED(status)):
                good, end = False, min(end, time.monotonic() + 5)
    late = bool(ranks.keys() - (stopped if lossy else set()))
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    yield good and not late


def _rank(
    folder: Path, function, number: int, rank: int, size: int, args: tuple, *, lossy: bool
) -> None:
    """Never returns: a forked process has nothing of the launcher's to end in good order."""
    good = True
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        if lossy:
            host = dist.TCPStore("127.0.0.1", int((folder / "port").read_text()))
            store = dist.PrefixStore(str(number), host)
        else:
            store = dist.FileStore(f"{folder}/store-{number}", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        value = function(rank, size, *args)
        content = pickle.dumps((True, value))
        if not lossy:
            dist.barrier()
    except BaseException:
        good, content = False, pickle.dumps((False, traceback.format_exc()))
    part = folder / f"{number}-{rank}.part"
    part.write_bytes(content)
    part.rename(folder / f"{number}-{rank}")
    sys.stderr.flush()
    os._exit(0 if good else 1)


if __name__ == "__main__":
    _launch(Path(sys.argv[1]))
