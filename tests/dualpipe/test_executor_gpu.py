"""The executor on GPUs: pushes and NCCL, with CUDA graphs and without, and a lost process.

Two processes, each with a GPU; if there is one alone they share it. NCCL can do so from version 2.30 on,
if NCCL_MULTI_RANK_GPU_ENABLE=1; before, its tests are skipped.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

MICRO_BATCHES, SIZE, SEQUENCE, HIDDEN = 20, 3, 256, 512
LIMIT_S = 5.0
SHARED = torch.cuda.device_count() < 2


def nccl_is_there() -> bool:
    """Whether NCCL takes two ranks here."""
    if not torch.cuda.is_available() or not SHARED:
        return torch.cuda.is_available()
    version = ctypes.c_int()
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" and version.value >= 23000


NCCL = nccl_is_there()
TRANSPORTS = ("push", "nccl") if NCCL else ("push",)
every_transport = pytest.mark.parametrize(
    "transport",
    [
        "push",
        pytest.param(
            "nccl",
            marks=pytest.mark.skipif(not NCCL, reason="this NCCL wants a GPU for each rank"),
        ),
    ],
)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Linear(HIDDEN, 4 * HIDDEN)
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.narrow = torch.nn.Linear(4 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x):
        return x + self.narrow(torch.nn.functional.gelu(self.wide(self.norm(x))))


def criterion(output, target):
    return torch.nn.functional.mse_loss(output, target).clone()


def model(num_stages, device):
    torch.manual_seed(233)
    with torch.device(device):
        return torch.nn.Sequential(*[Block() for _ in range(num_stages)])


def batch(device):
    source = torch.Generator().manual_seed(5)
    shape = (MICRO_BATCHES * SIZE, SEQUENCE, HIDDEN)
    return [torch.randn(shape, generator=source).to(device) for _ in range(2)]


def sequential(blocks, x, y):
    """Losses, outputs and gradients without a pipeline."""
    losses, outputs = [], []
    for part, target in zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True):
        output = blocks(part)
        loss = criterion(output, target)
        loss.backward()
        losses.append(loss.detach())
        outputs.append(output.detach())
    return torch.stack(losses), torch.cat(outputs)


def difference(x, y):
    x, y = x.double(), y.double()
    whole = (x * x + y * y).sum().item()
    return 1 - 2 * (x * y).sum().item() / whole if whole else 0.0


def worst_difference(own, blocks, stages, num_copies):
    """Of the gradients' sums over copies, from the sequential ones."""
    import torch.distributed as dist

    worst = 0.0
    for stage in sorted({stage for stage, _ in stages}):
        pairs = zip(own[stage].parameters(), blocks[stage].parameters(), strict=True)
        for parameter, wanted in pairs:
            grad = parameter.grad.cpu()
            if num_copies > 1:
                dist.all_reduce(grad)
            worst = max(worst, difference(grad, wanted.grad.cpu()))
    return worst


def start(rank, folder):
    import torch.distributed as dist

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    device = torch.device("cuda", 0 if SHARED else rank)
    torch.cuda.set_device(device)
    store = f"file://{folder}/store"
    backend = "cpu:gloo,cuda:nccl" if NCCL else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=2)
    return device


def run_schedules(rank, folder):
    """Every way of running against the sequential run; a line for each."""
    import itertools

    import torch.distributed as dist
    from dualpipe import Schedule
    from dualpipe.executor import PipelineExecutor

    device = start(rank, folder)
    x, y = batch(device)
    lines = []
    ways = [("dualpipe", *way) for way in itertools.product(TRANSPORTS, (False, True))] + [
        ("dualpipev", *way) for way in itertools.product(TRANSPORTS, (False, True))
    ]
    ways += [
        (method, "push", graphs) for method in ("zbv", "1f1b", "zb_h1") for graphs in (False, True)
    ]
    ways += [("chimera", "auto", "auto")]
    for method, transport, graphs in ways:
        schedule = Schedule.generate(method, 2, MICRO_BATCHES)
        blocks = model(schedule.num_stages, device)
        losses, outputs = sequential(blocks, x, y)
        own = model(schedule.num_stages, device)
        placement = schedule.placement.tolist()
        stages = {
            (stage, copy): own[stage]
            for copy, ranks in enumerate(placement)
            for stage, holder in enumerate(ranks)
            if holder == rank
        }
        inputs, labels, ends = [], [], []
        bounds = [0]
        for count in schedule.micro_batches:
            bounds.append(bounds[-1] + count)
        for copy, ranks in enumerate(placement):
            part = slice(bounds[copy] * SIZE, bounds[copy + 1] * SIZE)
            if ranks[0] == rank:
                inputs.append(x[part])
            if ranks[-1] == rank:
                labels.append(y[part])
                ends.append((bounds[copy], bounds[copy + 1]))
        given = {
            "labels": [torch.cat(labels)] if labels else (),
            "criterion": criterion if labels else None,
        }
        with PipelineExecutor(
            stages,
            schedule,
            transport=transport,
            graphs=graphs,
            reduce_copies=False,
            limit_s=60,
        ) as executor:
            for step in range(4):
                for block in own:
                    # Alternately to None, which the graphs' memory must outlast.
                    block.zero_grad(set_to_none=step % 2 == 0)
                result = executor.step(*([torch.cat(inputs)] if inputs else []), **given)
                same = True
                if ends:
                    wanted = torch.cat([losses[a:b] for a, b in ends])
                    same = torch.equal(result.losses, wanted)
                worst = worst_difference(own, blocks, stages, schedule.num_copies)
                lines.append((method, transport, graphs, step, same, worst))
            with torch.no_grad():
                result = executor.step(
                    *([torch.cat(inputs)] if inputs else []), return_outputs=True, **given
                )
            if ends:
                wanted = torch.cat([outputs[a * SIZE : b * SIZE] for a, b in ends])
                lines.append(
                    (method, transport, graphs, "eval", torch.equal(result.outputs, wanted), 0.0)
                )
            captured = graphs is True and not executor.graphs.why and executor.graphs.num_bytes > 0
            lines.append(
                (method, transport, graphs, "captured", captured or graphs is not True, 0.0)
            )
            lines.append(
                (method, executor.transport.name, str(executor.graphs.why), "why", True, 0.0)
            )
    dist.destroy_process_group()
    return lines


def run_copies(rank, folder, transport, way):
    """Gradients of copies are summed by the executor, and each sum once, to the same bits."""
    import torch.distributed as dist
    from dualpipe import Schedule
    from dualpipe.executor import PipelineExecutor

    device = start(rank, folder)
    x, y = batch(device)
    schedule = Schedule.generate("dualpipe", 2, MICRO_BATCHES)
    blocks, own = model(2, device), model(2, device)
    losses, _ = sequential(blocks, x, y)
    half = MICRO_BATCHES // 2
    part = slice(0, half * SIZE) if rank == 0 else slice(half * SIZE, None)
    other = slice(half * SIZE, None) if rank == 0 else slice(0, half * SIZE)
    lines = []
    stages = {(rank, 0): own[rank], (1 - rank, 1): own[1 - rank]}
    reduce = "pairs" if way == "pairs" else True
    with PipelineExecutor(
        stages, schedule, transport=transport, reduce_copies=reduce, limit_s=20
    ) as executor:
        for step in range(4):
            own.zero_grad()
            result = executor.step(x[part], labels=[y[other]], criterion=criterion)
            wanted = losses.chunk(2)[1 - rank]
            worst = worst_difference(own, blocks, stages, 1)
            for parameter in own.parameters():
                mine, theirs = parameter.grad.cpu(), parameter.grad.cpu()
                dist.broadcast(theirs, src=0)
                assert torch.equal(mine, theirs)
            lines.append(
                ("copies", transport, "auto", step, torch.equal(result.losses, wanted), worst)
            )
    return lines


def run_sums(rank, folder):
    """Pairs of tensors of all sizes, several times, beside other work, equal bit for bit."""
    import torch.distributed as dist
    from dualpipe.executor.transport.push import PushTransport

    device = start(rank, folder)
    transport = PushTransport(dist.group.WORLD, device, 20)
    pair = transport.pair_sums([1 - rank])[1 - rank]
    sizes = [(5, torch.int32), (3, torch.float32), ((100 << 20) + 2, torch.bfloat16)]
    sizes += [(1 << 24, torch.float64)] * 3 + [(16 << 20, torch.bfloat16), (7, torch.float16)]
    found = []
    for turn in range(3):
        given = []
        for both in range(2):
            source = torch.Generator().manual_seed(10 * turn + both)
            numbers = [torch.randn(min(n, 4096), generator=source) * 100 for n, _ in sizes]
            given.append(
                [
                    x.repeat(-(-n // len(x)))[:n].to(dtype).to(device)
                    for x, (n, dtype) in zip(numbers, sizes, strict=True)
                ]
            )
        wanted = [x + y for x, y in zip(*given, strict=True)]
        factor = torch.randn(4096, 4096, device=device)
        for tensor in given[rank]:
            pair.add(tensor)
            factor = factor @ factor / 64
        pair.wait()
        found += [torch.equal(x, y) for x, y in zip(given[rank], wanted, strict=True)]
    transport.poll()
    transport.close()
    return found


class Traced(torch.nn.Module):
    """Has buffers that change, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(HIDDEN, HIDDEN)
        self.norm = torch.nn.BatchNorm1d(SEQUENCE)

    def forward(self, x):
        return self.norm(self.linear(x)) + 0 * torch.rand((), device=x.device)


def run_leads(rank, folder, method):
    """Forwards before the ranks have agreed: what stays, what is taken back; graphs and none."""
    import torch.distributed as dist
    from dualpipe import MismatchError, Schedule
    from dualpipe.executor import PipelineExecutor

    device = start(rank, folder)
    x, y = batch(device)
    schedule = Schedule.generate(method, 2, MICRO_BATCHES)
    lines = []
    for graphs in (False, True):
        made = []
        for _ in range(2):
            torch.manual_seed(7)
            with torch.device(device):
                made.append(torch.nn.Sequential(*[Traced() for _ in range(schedule.num_stages)]))
        blocks, own = made
        stages = {s: own[s] for s, r in enumerate(schedule.placement[0]) if r == rank}
        held = torch.nn.ModuleList(stages.values())
        inputs = [x] if 0 in stages else []
        labels = [y] if schedule.num_stages - 1 in stages else []
        given = {"labels": labels, "criterion": criterion if labels else None}

        def state(held=held):
            return [b.clone() for b in held.buffers()] + [torch.cuda.get_rng_state(device)]

        with PipelineExecutor(stages, schedule, graphs=graphs, limit_s=60) as executor:
            leads = []
            lead = executor._runner.lead

            def counted(settings, lead=lead, leads=leads):
                leads.append(settings)
                lead(settings)

            executor._runner.lead = counted
            for step in range(8):
                if step == 6:
                    # The other rank disagrees, so everything is as before.
                    before = state()
                    num_leads = len(leads)
                    own.zero_grad(set_to_none=True)
                    refused = False
                    try:
                        with torch.set_grad_enabled(0 in stages):
                            executor.step(*inputs, **given)
                    except MismatchError:
                        refused = True
                    same = refused and all(map(torch.equal, before, state()))
                    same = same and all(p.grad is None for p in held.parameters())
                    led = len(leads) - num_leads == len(inputs)
                    lines.append((method, graphs, step, "refused", same and led, 0.0))
                for model in made:
                    model.zero_grad(set_to_none=step % 2 == 0)
                losses, _ = sequential(blocks, x, y)
                result = executor.step(*inputs, **given)
                same = torch.equal(result.losses, losses) if labels else True
                for stage, module in stages.items():
                    same &= all(map(torch.equal, module.buffers(), blocks[stage].buffers()))
                worst = worst_difference(own, blocks, [(s, 0) for s in stages], 1)
                lines.append((method, graphs, step, "trained", same, worst))
            wanted = len(inputs) * 6
            lines.append((method, graphs, len(leads), "leads", len(leads) == wanted, 0.0))
    dist.destroy_process_group()
    return lines


def run_until_killed(rank, folder, transport):
    """Rank 1 dies within a forward of the third step; what rank 0 raises, and when."""
    from dualpipe import Schedule
    from dualpipe.errors import PeerLostError
    from dualpipe.executor import PipelineExecutor

    device = start(rank, folder)
    x, y = batch(device)
    schedule = Schedule.generate("dualpipev", 2, MICRO_BATCHES)
    own = model(4, device)
    held = [stage for stage, holder in enumerate(schedule.placement[0]) if holder == rank]
    calls = [0]

    def die(*_):
        calls[0] += 1
        if calls[0] == 2 * MICRO_BATCHES + 7:
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        own[held[0]].wide.register_forward_hook(die)
    executor = PipelineExecutor(
        {stage: own[stage] for stage in held}, schedule, transport=transport, limit_s=LIMIT_S
    )
    given = {"labels": [y], "criterion": criterion} if rank == 0 else {}
    since = time.monotonic()
    try:
        for _ in range(3):
            since = time.monotonic()
            executor.step(*([x] if rank == 0 else []), **given)
    except PeerLostError as error:
        took = time.monotonic() - since
        executor.close(drop=True)
        # The device is as good as before.
        fine = (torch.ones(64, device=device).sum() == 64).item()
        return {"peer": error.peer, "took": took, "fine": fine, "text": str(error)}
    return {"peer": None}


def launched(tmp_path, *arguments, limit_s=150):
    """Both ranks' results; None for one that died."""
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path), *arguments])
        for rank in range(2)
    ]
    end = time.monotonic() + limit_s
    for process in ranks:
        try:
            process.wait(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    files = [Path(tmp_path) / f"{rank}.json" for rank in range(2)]
    return [json.loads(f.read_text()) if f.exists() else None for f in files]


def test_every_way_equals_the_sequential_run(tmp_path: Path) -> None:
    found = launched(tmp_path, "schedules")
    for lines in found:
        assert lines is not None
        wrong = [line for line in lines if not line[4] or abs(line[5]) > 1e-13]
        assert not wrong


@pytest.mark.parametrize("way", ["group", "pairs"])
@every_transport
def test_copies_are_reduced(tmp_path: Path, transport: str, way: str) -> None:
    for lines in launched(tmp_path, "copies", transport, way):
        assert lines is not None
        wrong = [line for line in lines if not line[4] or abs(line[5]) > 1e-13]
        assert not wrong


@pytest.mark.parametrize("method", ["1f1b", "zbv"])
def test_a_lead_is_taken_back_where_ranks_disagree(tmp_path: Path, method: str) -> None:
    for lines in launched(tmp_path, "leads", method):
        assert lines is not None
        wrong = [line for line in lines if not line[4] or abs(line[5]) > 1e-13]
        assert not wrong


def test_pushed_sums(tmp_path: Path) -> None:
    for found in launched(tmp_path, "sums"):
        assert found
        assert all(found)


@every_transport
def test_a_killed_process_is_named_in_time(tmp_path: Path, transport: str) -> None:
    survivor, dead = launched(tmp_path, "killed", transport)
    assert dead is None
    assert survivor is not None
    assert survivor["peer"] == 1
    assert survivor["took"] < LIMIT_S + 2
    assert survivor["fine"]


if __name__ == "__main__":
    number, place, what, *rest = sys.argv[1:]
    works = {
        "schedules": run_schedules,
        "copies": run_copies,
        "leads": run_leads,
        "sums": run_sums,
        "killed": run_until_killed,
    }
    work = works[what]
    # What hangs says where.
    faulthandler.dump_traceback_later(float(os.environ.get("HANG_S", "140")), exit=True)
    answer = work(int(number), place, *rest)
    (Path(place) / f"{number}.json").write_text(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)
