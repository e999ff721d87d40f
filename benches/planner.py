"""Times the reference policy, in Rust and through Python, beside a plain NumPy version.

    python benches/planner.py [--seconds 3] [--output benches/results/planner.json]

One thread, pinned to one core. Every answer is compared with the NumPy version's, and the Rust
program's by a checksum. Times are of one call with all three outputs:

- `rust`: `Planner::plan_into`, buffers given.
- `rebalance_experts`, `plan`, `plan_into`: through Python. The drop-in also makes a planner for
  each call, and new arrays; `plan_into` writes into the buffers it is given.
- `busy`: `plan_into` while another thread computes in Python, with the interpreter kept and let
  go. `native` is the time inside the native call, `wait` that for the interpreter.

Each figure is that of the quietest of several rounds.

Instructions of the Rust program are counted by valgrind's callgrind, where it is installed. It
emulates AVX2; a machine with AVX-512 needs fewer.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import eplb_rs
import measuring
import numpy as np
import numpy.typing as npt
from measuring import ROUNDS, deepseek_r1, quantiles, quietest, timed

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.append(str(measuring.ROOT / "tests"))
import reference

HOW = (
    "`rebalance_experts` through Python, one core, new arrays each call, "
    f"the quietest of {ROUNDS} rounds"
)


@dataclass(frozen=True)
class Case:
    """A load and the machines to plan it for."""

    name: str
    load: npt.NDArray[np.float32]
    replicas: int
    gpus: int
    groups: int = 1
    nodes: int = 1

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        """What `rebalance_experts` takes besides the load."""
        return self.replicas, self.groups, self.nodes, self.gpus

    def planner(self, *, release_gil: bool | None = None) -> eplb_rs.Planner:
        """A planner for these machines."""
        topology = eplb_rs.Topology.from_totals(
            num_replicas=self.replicas, num_nodes=self.nodes, num_gpus=self.gpus
        )
        return eplb_rs.Planner(topology, self.groups, "deepseek", release_gil=release_gil)


def cases() -> Iterator[Case]:
    """The shapes of DeepSeek-R1, of a model with 128 experts, and of one with 384."""
    r1 = deepseek_r1()
    rng = np.random.default_rng(0)

    def log_normal(layers: int, experts: int) -> npt.NDArray[np.float32]:
        return np.round(rng.lognormal(0, 1, (layers, experts)) * 1000).astype(np.float32)

    yield Case("DeepSeek-R1", r1, 288, 32, groups=8, nodes=4)
    yield Case("DeepSeek-R1", r1, 288, 32)
    yield Case("log-normal", log_normal(94, 128), 160, 32)
    yield Case("log-normal", log_normal(60, 384), 448, 64)
    yield Case("DeepSeek-R1", r1, 288, 144)
    yield Case("DeepSeek-R1", r1, 320, 64, groups=8, nodes=8)


def busy(case: Case, seconds: float, *, release_gil: bool) -> dict[str, Any]:
    """`plan_into` while another thread keeps the interpreter busy."""
    planner = case.planner(release_gil=release_gil)
    buffers = planner.allocate(*case.load.shape, int(planner.plan(case.load).logcnt.max()))
    stop = threading.Event()

    def compute() -> None:
        if hasattr(os, "sched_setaffinity"):  # of this thread: any core but the measured one
            others = set(range(os.cpu_count() or 1)) - os.sched_getaffinity(0)
            os.sched_setaffinity(0, others or {0})
        while not stop.is_set():
            sum(range(1000))

    def one_round() -> dict[str, Any]:
        native, wait = [], []
        end = time.perf_counter() + seconds / ROUNDS
        while time.perf_counter() < end:
            planner.plan_into(case.load, buffers)
            timing = planner.last_timing
            native.append(timing.native_us)
            wait.append(timing.wait_us)
        return {"native": quantiles(native), "wait": quantiles(wait)}

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        return quietest([one_round() for _ in range(ROUNDS)], "native")
    finally:
        stop.set()
        thread.join()


class Rust:
    """The program in rust/eplb/benches/planner.rs."""

    def __init__(self, program: str | None = None) -> None:
        """Takes a built one, or builds it."""
        self.program = program or measuring.build("planner")

    def command(self, case: Case, file: Path, length: str) -> list[str]:
        """How to run it on a case."""
        case.load.astype("<f4").tofile(file)
        numbers = (*case.load.shape, *case.arguments)
        return [self.program, str(file), *map(str, numbers), length]

    def timed(self, case: Case, file: Path, seconds: float) -> dict[str, float]:
        """Quantiles of the time of a call, and the checksum of its answer."""
        command = self.command(case, file, str(seconds / ROUNDS))

        def one_round() -> dict[str, float]:
            output = subprocess.run(command, check=True, capture_output=True, text=True)
            result: dict[str, float] = json.loads(output.stdout)
            return result

        return quietest(one_round() for _ in range(ROUNDS))

    def instructions(self, case: Case, file: Path) -> int | None:
        """How many instructions a call takes: the difference that ten more calls make."""
        if shutil.which("valgrind") is None:
            return None

        def count(calls: int) -> int:
            command = self.command(case, file, f"{calls}x")
            valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
            output = subprocess.run(
                [*valgrind, *command], check=True, capture_output=True, text=True
            )
            line = next(line for line in output.stderr.splitlines() if "Collected" in line)
            return int(line.rpartition(":")[2])

        return (count(12) - count(2)) // 10


def checksum(arrays: tuple[npt.NDArray[np.int64], ...]) -> int:
    """What the Rust program prints of its answer."""
    total = 0
    for turn, array in enumerate(arrays):
        value = 0x811C9DC5
        for low in (array.ravel() & 0xFFFF).tolist():
            value = (value ^ low) * 0x01000193 & 0xFFFFFFFF
        total ^= (value << turn | value >> (32 - turn)) & 0xFFFFFFFF
    return total


def measure(case: Case, rust: Rust, file: Path, seconds: float) -> dict[str, Any]:
    """All figures of a case."""
    load = case.load
    start = time.perf_counter()
    expected = reference.rebalance_experts(load, *case.arguments)
    numpy_us = (time.perf_counter() - start) * 1e6

    planner = case.planner(release_gil=False)
    plan = planner.plan(load)
    buffers = planner.allocate(*load.shape, expected[1].shape[2])
    planner.plan_into(load, buffers)
    drop_in = eplb_rs.rebalance_experts(load, *case.arguments)
    given = (buffers.phy2log, buffers.log2phy, buffers.logcnt)
    for answer in (drop_in, (plan.phy2log, plan.log2phy, plan.logcnt), given):
        for got, wanted in zip(answer, expected, strict=True):
            np.testing.assert_array_equal(got, wanted)

    times = {
        "rebalance_experts": timed(
            lambda: eplb_rs.rebalance_experts(load, *case.arguments), seconds
        ),
        "plan": timed(lambda: planner.plan(load), seconds),
        "plan_into": timed(lambda: planner.plan_into(load, buffers), seconds),
        "rust": rust.timed(case, file, seconds),
    }
    if times["rust"].pop("checksum") != checksum(expected):
        raise SystemExit(f"{case.name}: the Rust program gave another answer")
    headline = times["rebalance_experts"]
    return {
        "name": case.name,
        "layers": load.shape[0],
        "experts": load.shape[1],
        "replicas": case.replicas,
        "gpus": case.gpus,
        "groups": case.groups,
        "nodes": case.nodes,
        "balance": round(plan.balance, 4),
        "how": HOW,
        "median_us": headline["median_us"],
        "p99_us": headline["p99_us"],
        "p999_us": headline["p999_us"],
        "numpy_reference_us": round(numpy_us),
        "times": times,
        "busy": {
            "interpreter kept": busy(case, seconds, release_gil=False),
            "interpreter let go": busy(case, seconds, release_gil=True),
        },
        "instructions": rust.instructions(case, file),
    }


def main() -> None:
    """Runs all cases, prints a line for each and writes the file."""
    parser = measuring.parser(__doc__, "planner.json", seconds=3.0)
    parser.add_argument(
        "--rust", metavar="PROGRAM", help="built elsewhere, where there is no cargo"
    )
    options = parser.parse_args()
    measuring.pin()

    rust = Rust(options.rust)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            result = measure(case, rust, Path(folder) / "loads.f32", options.seconds)
            results.append(result)
            shape = f"{result['layers']}x{result['experts']} -> {case.replicas} on {case.gpus}"
            print(
                f"{shape:26} groups {case.groups}, nodes {case.nodes}: "
                f"median {result['median_us']:.0f} us, p99.9 {result['p999_us']:.0f} us, "
                f"NumPy {result['numpy_reference_us'] / 1e3:.0f} ms",
                flush=True,
            )
    measuring.write(options.output, {"cases": results}, options.commit)


if __name__ == "__main__":
    main()
