"""What the benchmarks share: loads, times, and where they were taken.

Machines are shared, and a neighbour on the same core can double a time for seconds. So `timed`
measures in rounds and keeps the quietest, that of the least median, whole.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from eplb_rs.loads import read_loads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benches" / "results"
ROUNDS = 5

Load = npt.NDArray[np.float32]


def deepseek_r1() -> Load:
    """The load of DeepSeek-R1 at 1k in, 1k out: 58 layers, 256 experts."""
    file = ROOT / "examples" / "data" / "deepseek_r1_1k1k.json"
    return read_loads(file).loads.sum(axis=0).astype(np.float32)


def log_normal(sigma: float, num_layers: int = 58, num_experts: int = 256) -> Load:
    """A random load, the same everywhere."""
    draws = np.random.default_rng(0).lognormal(0, sigma, (num_layers, num_experts))
    return np.round(draws * 1000).astype(np.float32)


def pin() -> None:
    """Keeps this process on one core, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def samples(
    call: Callable[[], object], *, seconds: float = 0.0, calls: int = 1, warm_up: int = 20
) -> list[float]:
    """Times of single calls in microseconds, for so long, but at least so many."""
    for _ in range(warm_up):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < calls or time.perf_counter() < end:
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return times


def quantiles(times_us: Iterable[float]) -> dict[str, float]:
    """Best, median and tail, in microseconds."""
    ordered = sorted(times_us)

    def at(share: float) -> float:
        return round(ordered[round((len(ordered) - 1) * share)], 2)

    return {
        "calls": len(ordered),
        "best_us": at(0),
        "median_us": at(0.5),
        "p99_us": at(0.99),
        "p999_us": at(0.999),
    }


def quietest(rounds: Iterable[dict[str, Any]], figure: str | None = None) -> dict[str, Any]:
    """The round of the least median, of all figures or of the one named."""
    return min(rounds, key=lambda found: (found[figure] if figure else found)["median_us"])


def timed(call: Callable[[], object], seconds: float) -> dict[str, float]:
    """Quantiles of the time of a call, over so many seconds of calls."""
    samples(call, seconds=min(seconds / ROUNDS, 0.1), warm_up=0)
    rounds = (samples(call, seconds=seconds / ROUNDS, warm_up=0) for _ in range(ROUNDS))
    return quietest(map(quantiles, rounds))


def build(name: str) -> str:
    """Builds a program of `rust/eplb/benches`; its path."""
    command = ["cargo", "bench", "--locked", "--quiet", "--package", "eplb", "--bench", name]
    output = subprocess.run(
        [*command, "--no-run", "--message-format", "json"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    messages = map(json.loads, output.stdout.splitlines())
    return next(
        message["executable"]
        for message in messages
        if message.get("executable") and message["target"]["name"] == name
    )


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    flags = ""
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        model, flags = fields.get("model name", model), fields.get("flags", "")
    vectors = "AVX-512" if "avx512vl" in flags else "AVX2" if "avx2" in flags else "baseline"
    return {
        "cpu": f"{model}, {os.cpu_count()} cores, {vectors}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": f"CPython {platform.python_version()}, NumPy {np.__version__}",
    }


def commit() -> str:
    """The commit that is measured, marked if there are changes since."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    output = subprocess.run(describe, cwd=ROOT, check=True, capture_output=True, text=True)
    return output.stdout.strip()


def parser(
    description: str, output: str, *, seconds: float | None = None
) -> argparse.ArgumentParser:
    """What every benchmark's command line has."""
    made = argparse.ArgumentParser(description=description.partition("\n")[0])
    if seconds is not None:
        made.add_argument("--seconds", type=float, default=seconds, help="of calls per figure")
    made.add_argument("--output", type=Path, default=RESULTS / output)
    made.add_argument("--commit", help="of the wheel, where there is no checkout")
    return made


def write(path: Path, results: dict[str, Any], revision: str | None = None) -> None:
    """Writes figures as JSON, with machine and commit."""
    whole = {"machine": machine(), "commit": revision or commit(), **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=2) + "\n")
    print(f"written: {path}")
