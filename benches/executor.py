"""Times pipeline steps on two GPUs: this executor, PyTorch's schedules, DeepSeek's DualPipe.

    python benches/executor.py [--deepseek CHECKOUT] [--only NAME ...] [--rounds 10]
                               [--halves [PERCENT PERCENT]] [--sequence LENGTH ...]
                               [--output benches/results/executor.json] [--add]

Eight transformer layers (hidden 4096, FFN 14336, 32 heads, bf16), micro-batches of one sequence,
mean squared error in float32, gradients accumulate, no optimizer.

Every contender runs in a pair of processes of its own, one a GPU. The *ideal* is one rank's share
of the work without a pipeline: its share of the layers, all micro-batches one after the other,
forward and backward, and the loss of every second one. (It computes the gradients of all inputs, which a
pipeline's first stage does not: .6 % of DualPipe's work here.) With short sequences there is a
*launch-free* ideal too: the layers' forward and backward replayed as a CUDA graph. A GPU that has
just started is faster, so contender and ideal alternate after a warm-up, and the ratio is the
median of the pairs. A time is that of the slower rank, from a common start to the end of its
device's work. Peak memory is that of the contender alone, before the ideal is made.

Losses are compared with those of one process without a pipeline while all this runs.

`--only predict`: the executor measures itself under DualPipeV, and what the simulator makes of
those times for other schedules is compared with what they take.

With one GPU, `--halves` gives each process a half of its multiprocessors (see halves.py), and both
run the ideal at the same time as they do the step. So the ratios compare like with like, but
they are not those of two GPUs: the halves share memory's bandwidth, caches and power, what is sent
stays in the same memory, and a rank is faster while the other waits. Two other shares (`--halves 50
44`) make ranks of different speeds. NCCL takes part from version 2.30 on, if
`NCCL_MULTI_RANK_GPU_ENABLE=1`; without it, what needs it is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from contenders import CONTENDERS, WARM_UP, make_contender, num_ranks
from copied import reduction
from halves import nccl_shares_gpus, nccl_version, two_halves
from memory import terms_of
from prediction import predict
from transformer import Case, loss_of, make_batch, make_layers

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
CASES = (Case(2048, 8), Case(256, 32))
TINY = (Case(64, 8, hidden=64, ffn=96, heads=4), Case(16, 12, hidden=64, ffn=96, heads=4))
LAUNCH_BOUND = 512
"""Sequences up to this length are compared with the launch-free ideal too."""
LIMIT_S = 90
GIB = 2.0**30


class Rank:
    """One process of a pair, and its clock."""

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self.rank, self.size = rank, size
        self.device = torch.device("cpu")
        self.has_nccl = False
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            self.device = torch.device("cuda", rank % count)
            torch.cuda.set_device(self.device)
            self.has_nccl = size <= count or nccl_shares_gpus()
        else:
            torch.set_num_threads(1)
        backend = "cpu:gloo,cuda:nccl" if self.has_nccl else "gloo"
        store = f"file://{folder}/store"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=size)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def gathered(self, value: Any) -> list[Any]:
        """What every rank gives."""
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value, group=self.side)
        return every

    @property
    def side(self) -> dist.ProcessGroup:
        if not hasattr(self, "_side"):
            self._side = dist.new_group(backend="gloo")
        return self._side

    def started(self) -> float:
        """When all ranks start together, which is now, in seconds of the wall clock."""
        self.wait()
        start = max(self.gathered(time.time())) + 1e-3
        while time.time() < start:
            pass
        return start

    def timed(self, work: Callable[[], Any]) -> float:
        """Milliseconds from a common start to the end of the last rank."""
        start = self.started()
        work()
        self.wait()
        return 1e3 * (max(self.gathered(time.time())) - start)

    def memory(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {"allocated": 0.0, "reserved": 0.0}
        return {
            "allocated": torch.cuda.max_memory_allocated() / GIB,
            "reserved": torch.cuda.max_memory_reserved() / GIB,
        }


class Ideal:
    """A rank's share of the layers without a pipeline."""

    def __init__(self, case: Case, share: torch.nn.Module, device: torch.device) -> None:
        self._share = share
        inputs, targets = make_batch(case, device)
        self._inputs = [part.requires_grad_() for part in inputs.split(1)]
        self._targets = targets.split(1)
        self._grad = torch.randn_like(self._inputs[0])
        self._ranks = dist.get_world_size()

    def run(self) -> None:
        for m, (given, target) in enumerate(zip(self._inputs, self._targets, strict=True)):
            given.grad = None
            output = self._share(given)
            if m % self._ranks:
                output.backward(self._grad)
            else:
                loss_of(output, target).backward()

    def captured(self) -> Callable[[], None]:
        """The same without launches: one micro-batch as a graph, replayed."""
        own = self._inputs[0].detach().clone().requires_grad_()
        # Layers of its own: what a contender has left of its graphs would be drawn in.
        share = copy.deepcopy(self._share)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                share(own).backward(self._grad)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        own.grad = None
        with torch.cuda.graph(graph):
            share(own).backward(self._grad)
        count = len(self._inputs)

        def run() -> None:
            for _ in range(count):
                graph.replay()

        # The graph reads and writes what it was captured with.
        run.kept = own, share  # type: ignore[attr-defined]
        return run


def quartiles(values: list[float]) -> list[float]:
    return [round(q, 4) for q in statistics.quantiles(values, n=4, method="inclusive")]


def run_case(rank: Rank, name: str, case: Case, rounds: int) -> dict[str, Any]:
    """One contender's figures."""
    gc.collect()
    if rank.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    contender = make_contender(name, case, rank.device)
    found: dict[str, Any] = {}
    for _ in range(WARM_UP):
        losses = contender.step()
    rank.wait()
    found["losses"] = {
        str(m): loss.item() for part in rank.gathered(losses) for m, loss in part.items()
    }
    transport = getattr(getattr(contender, "executor", None), "transport", None)
    own = getattr(transport, "num_bytes", 0) / GIB
    found["peak_gib"] = rank.gathered({**rank.memory(), "transport": own})
    ideal = Ideal(case, contender.share, rank.device)
    works = {"ideal": ideal.run}
    if case.sequence <= LAUNCH_BOUND and rank.device.type == "cuda":
        works["launch-free ideal"] = ideal.captured()
    times: dict[str, list[float]] = {key: [] for key in ("step", *works)}
    for work in works.values():
        work()
    for _ in range(rounds):
        times["step"].append(rank.timed(contender.step))
        for key, work in works.items():
            times[key].append(rank.timed(work))
    for key, values in times.items():
        found[f"{key} ms"] = quartiles(values)
        if key != "step":
            ratios = [a / b for a, b in zip(times["step"], values, strict=True)]
            found[f"step / {key}"] = quartiles(ratios)
    if hasattr(contender, "executor"):
        found.update(own_figures(rank, contender, case, ideal))
    contender.close()
    return found


def own_figures(rank: Rank, contender: Any, case: Case, ideal: Ideal) -> dict[str, Any]:
    """What only this executor can say: idle time, memory by its terms, why no graphs.

    A step lasts from the common start to the end of the last computation here: after it, what was
    measured is exchanged.
    """
    executor = contender.executor
    executor.measure = True
    contender.step()
    idle, outside = [], []
    for _ in range(5):
        start = rank.started()
        contender.step()
        report = executor.report()
        whole = max(spans[-1].end_s for spans in report.spans) - start
        idle.append((1 - report.busy_us / 1e6 / whole).tolist())
        outside.append(1e3 * whole - report.makespan_us / 1e3)
        # As hot as the steps that were timed.
        rank.timed(ideal.run)
    executor.measure = False
    on_gpu = rank.device.type == "cuda"
    own = terms_of(contender, rank.rank, case, rank.device) if on_gpu else {}
    return {
        "idle": [round(statistics.median(values), 5) for values in zip(*idle, strict=True)],
        "before the first computation ms": round(statistics.median(outside), 3),
        "report": str(report),
        "memory_gib": rank.gathered(own),
        "notes": list(report.notes),
        "transport": executor.transport.name,
    }


def reference(case: Case, device: torch.device) -> dict[str, float]:
    """The losses without a pipeline."""
    model = make_layers(case, range(case.layers), device)
    inputs, targets = make_batch(case, device)
    with torch.no_grad():
        pairs = zip(inputs.split(1), targets.split(1), strict=True)
        return {str(m): loss_of(model(x), y).item() for m, (x, y) in enumerate(pairs)}


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases asked for."""
    cases = TINY if args.tiny else CASES
    return [case for case in cases if args.sequence is None or case.sequence in args.sequence]


def worker(args: argparse.Namespace) -> None:
    folder = Path(args.folder)
    cases = chosen(args)
    found: Any
    if args.worker == "reference":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found = {case.name: reference(case, device) for case in cases}
    else:
        rank = Rank(args.rank, num_ranks(args.worker), folder)
        works = {"reduction": reduction, "predict": predict}
        work = works.get(args.worker)
        found = {}
        for case in cases[:1] if work is not None else cases:
            found[case.name] = (
                run_case(rank, args.worker, case, args.rounds)
                if work is None
                else work(rank, case, args.rounds)
            )
            # What was found stands, should the next case fail.
            (folder / f"{args.rank}.json").write_text(json.dumps(found))
    (folder / f"{args.rank}.json").write_text(json.dumps(found))
    # Whatever a contender's communicators still wait for is no concern of the figures.
    sys.stdout.flush()
    os._exit(0)


def launched(name: str, args: argparse.Namespace, shares: list[dict[str, str]]) -> Any:
    """The figures of one worker pair; why there are none, as text, where it failed.

    Args:
        name: Which.
        args: The command line.
        shares: What each rank's environment has beside that of all.
    """
    with tempfile.TemporaryDirectory() as folder:
        count = 1 if name == "reference" else num_ranks(name)
        command = [sys.executable, __file__, "--worker", name, "--folder", folder]
        command += ["--rounds", str(args.rounds), *(["--tiny"] if args.tiny else [])]
        if args.sequence is not None:
            command += ["--sequence", *map(str, args.sequence)]
        environment = dict(os.environ)
        if args.deepseek:
            environment["DEEPSEEK_DUALPIPE"] = args.deepseek
        ranks = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                env=environment | shares[rank],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]
        end = time.monotonic() + LIMIT_S
        said = []
        for rank in ranks:
            try:
                said.append(rank.communicate(timeout=max(1.0, end - time.monotonic()))[0])
            except subprocess.TimeoutExpired:
                rank.kill()
                said.append(rank.communicate()[0] + f"\nnot done within {LIMIT_S} s")
        if any(rank.returncode for rank in ranks):
            print(*(text[-3000:] for text in said), sep="\n", file=sys.stderr)
        file = Path(folder) / "0.json"
        return json.loads(file.read_text()) if file.exists() else said[0][-3000:]


def check(found: dict[str, Any], wanted: dict[str, dict[str, float]]) -> None:
    """Says of every case how far its losses are from those without a pipeline."""
    for case, figures in found.items():
        losses = figures.pop("losses")
        assert losses.keys() == wanted[case].keys(), (case, sorted(losses))
        figures["largest difference of losses"] = max(
            abs(losses[m] - wanted[case][m]) / wanted[case][m] for m in losses
        )


def machine(halves: list[int] | None) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if halves is not None:
        found["one GPU as two"] = f"{halves} % of its multiprocessors, by CUDA MPS"
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
        found["nccl"] = ".".join(map(str, nccl_version()))
    return found


def commit() -> str:
    if named := os.environ.get("COMMIT"):
        return named
    answer = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--deepseek", help="a checkout of DeepSeek's DualPipe")
    parser.add_argument("--only", nargs="*", help=", ".join([*CONTENDERS, "reduction", "predict"]))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sequence", nargs="*", type=int, help="only cases of these lengths")
    parser.add_argument(
        "--halves", nargs="*", type=int, help="one GPU as two, of these percents: 50 50"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the program")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--add", action="store_true", help="to what the output has of others")
    parser.add_argument("--worker")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.worker:
        worker(args)
    names = args.only or [*CONTENDERS, "reduction", "predict"]
    if not args.deepseek:
        names = [name for name in names if not name.startswith("DeepSeek")]
    halves = args.halves if args.halves is None else args.halves or [50, 50]
    if halves is not None and not nccl_shares_gpus():
        names = [name for name in names if not name.startswith(("DeepSeek", "torch"))]
    with contextlib.nullcontext([{}, {}]) if halves is None else two_halves(halves) as shares:
        measure(names, args, halves, shares)


def measure(
    names: list[str],
    args: argparse.Namespace,
    halves: list[int] | None,
    shares: list[dict[str, str]],
) -> None:
    """Runs one after the other, and writes down what has been found so far."""
    wanted = launched("reference", args, shares)
    assert isinstance(wanted, dict), wanted
    results: dict[str, Any] = {}
    earlier: dict[str, str] = {}
    if args.add:
        before = json.loads(args.output.read_text())
        results = before["results"]
        earlier = dict.fromkeys(results, before["commit"]) | before.get("of earlier commits", {})
    for name in names:
        found = launched(name, args, shares)
        if isinstance(found, dict) and name in CONTENDERS:
            check(found, wanted)
        results[name] = found
        earlier.pop(name, None)
        print(name, json.dumps(found) if isinstance(found, dict) else found, flush=True)
        if args.output:
            document = {
                "machine": machine(halves),
                "commit": commit(),
                "of earlier commits": earlier,
                "results": results,
            }
            args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
