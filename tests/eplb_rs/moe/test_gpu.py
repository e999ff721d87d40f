"""The layer, the mover and the loop on GPUs, by one rank and by two.

Each rank has its GPU and NCCL between them; or two share one, and what they send each other goes
through the host (`staged.py`). A world runs all checks in one go, each in turn on all ranks; a test
looks at what one has found.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import eplb_rs
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import staged  # noqa: E402
import torch.distributed as dist  # noqa: E402
from eplb_rs.moe import (  # noqa: E402
    ExpertField,
    ExpertMover,
    ExpertParallelMoE,
    ExpertWeights,
    Rebalancer,
    RebalancerSettings,
    TopK,
    predicted_tokens,
    sum_replica_gradients,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

LAYERS, EXPERTS, TOP_K, HIDDEN, INTER, TOKENS = 3, 16, 4, 256, 128, 333
FIELDS = [
    ExpertField("gate_up.weight", (2 * INTER, HIDDEN), torch.bfloat16),
    ExpertField("down.weight", (HIDDEN, INTER), torch.bfloat16),
]
LIMIT_S = 150


class Told(torch.nn.Module):
    """A router that chooses what it is told."""

    def __init__(self, gate_TK, expert_TK):
        super().__init__()
        self.choice = TopK(gate_TK, expert_TK)

    def forward(self, x):
        del x
        return self.choice


class Rank:
    """One process, its device and its experts."""

    def __init__(self, rank, size, folder):
        self.rank, self.size = rank, size
        self.slots = EXPERTS // size + 2
        self.device = torch.device("cpu")
        self.staged = False
        backend = "gloo"
        if torch.cuda.is_available():
            gpus = torch.cuda.device_count()
            self.device = torch.device("cuda", rank % gpus)
            torch.cuda.set_device(self.device)
            self.staged = size > gpus
            backend = staged.NAME if self.staged else "cpu:gloo,cuda:nccl"
        store = f"file://{folder}/store"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=size)

    def plan(self, seed):
        load = np.random.default_rng(seed).lognormal(0, 1.2, (LAYERS, EXPERTS))
        topology = eplb_rs.Topology(1, self.size, self.slots)
        return eplb_rs.Planner(topology, policy="balanced").plan(load)

    def expert(self, layer, number):
        """The weights of an expert, the same on all ranks."""
        generator = torch.Generator().manual_seed(layer * EXPERTS + number)
        return {
            field.name: (torch.randn(field.shape, generator=generator) / 8).bfloat16()
            for field in FIELDS
        }

    def held(self, plan, layer):
        return plan.phy2log[layer, self.rank * self.slots :][: self.slots].tolist()

    def weights(self, plan):
        weights = ExpertWeights(FIELDS, num_layers=LAYERS, num_slots=self.slots, device=self.device)
        for layer in range(LAYERS):
            for slot, number in enumerate(self.held(plan, layer)):
                for name, part in self.expert(layer, number).items():
                    weights[layer][name][slot].copy_(part)
        return weights

    def check_weights(self, weights, plan):
        for layer in range(LAYERS):
            for slot, number in enumerate(self.held(plan, layer)):
                for name, part in self.expert(layer, number).items():
                    got = weights[layer][name][slot].cpu()
                    assert torch.equal(got, part), f"{name} of slot {slot}, layer {layer}"

    def inputs(self, seed, tokens=TOKENS):
        """Tokens, gates, experts, and the gradient of the output; some choose no expert."""
        generator = torch.Generator().manual_seed(1000 * seed + self.rank)
        x, grad = torch.randn(2, tokens, HIDDEN, generator=generator).bfloat16()
        gates = torch.rand(tokens, TOP_K, generator=generator).bfloat16()
        liked = torch.arange(1, EXPERTS + 1) * torch.rand(tokens, EXPERTS, generator=generator)
        ids = liked.argsort(-1, descending=True)[:, :TOP_K]
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.05, -1)
        return [part.to(self.device) for part in (x, gates, ids, grad)]

    def layer(self, weights, plan, layer=0, **options):
        return ExpertParallelMoE(Told(None, None), weights[layer], plan, layer=layer, **options)


def run(layer, x, gates, ids, grad):
    """Output, gradients of tokens and gates; those of the weights stay in the layer."""
    x, gates = x.detach().requires_grad_(), gates.detach().requires_grad_()
    layer.router.choice = TopK(gates, ids)
    out = layer(x)
    out.backward(grad)
    return out.detach(), x.grad, gates.grad


def direct(rank, layer, x, gates, ids, grad):
    """The same in float32 without a layer, and the gradients of all experts."""
    x, gates = (part.cpu().float().requires_grad_() for part in (x, gates))
    ids, grad = ids.cpu(), grad.cpu().float()
    experts = [rank.expert(layer, number) for number in range(EXPERTS)]
    gate_up, down = (
        torch.stack([e[f.name].float() for e in experts]).requires_grad_() for f in FIELDS
    )
    out = torch.zeros_like(x)
    for number in range(EXPERTS):
        tokens, k = torch.nonzero(ids == number, as_tuple=True)
        gate, up = (x[tokens] @ gate_up[number].T).chunk(2, 1)
        rows = (torch.nn.functional.silu(gate) * up) @ down[number].T
        out = out.index_add(0, tokens, rows * gates[tokens, k, None])
    out.backward(grad)
    return out.detach(), x.grad, gates.grad, gate_up.grad, down.grad


def close(got, wanted, what, limit=0.03):
    """Row by row, to what bfloat16 can say."""
    got, wanted = got.float().cpu(), wanted.float().cpu()
    apart = (got - wanted).flatten(1).norm(dim=1)
    size = wanted.flatten(1).norm(dim=1) + 0.1 * wanted.norm() / len(wanted) ** 0.5
    worst = float((apart / (size + 1e-30)).max())
    assert worst < limit, f"{what}: a row is {worst:.3f} of its size off"


def as_computed_directly(rank):
    """Outputs and gradients, replicas' gradients summed, under several plans and rules."""
    found = {}
    for seed in range(3):
        plan = rank.plan(seed)
        weights = rank.weights(plan)
        given = rank.inputs(1)
        wanted = direct(rank, 0, *given)
        for part in wanted[3:]:
            dist.all_reduce(part)
        for options in (
            {"routing": ["uniform", "nearest", plan.with_shares()][seed]},
            {"capacity": TOKENS * TOP_K},
            {"row_multiple": 48},
            {"fused": False},
            {"fused": False, "capacity": TOKENS * TOP_K},
            {"fused": False, "row_multiple": 16},
        ):
            layer = rank.layer(weights, plan, **options)
            got = run(layer, *given)
            close(got[0], wanted[0], f"out, plan {seed}, {options}")
            close(got[1], wanted[1], f"x, plan {seed}, {options}")
            # Products that nearly cancel: four numbers a row, of sums of 256.
            close(got[2], wanted[2], f"gates, plan {seed}, {options}", limit=0.15)
            grads = [{"gate_up": layer.gate_up.grad, "down": layer.down.grad}]
            one = eplb_rs.Plan.from_phy2log(plan.topology, plan.phy2log[:1], plan.expert_load[:1])
            sum_replica_gradients(grads, one)
            here = torch.tensor(rank.held(plan, 0))
            close(grads[0]["gate_up"], wanted[3][here], f"gate_up, plan {seed}, {options}")
            close(grads[0]["down"], wanted[4][here], f"down, plan {seed}, {options}")
            found.setdefault("fused" in options, []).append(got[0])
    for first, *others in found.values() if rank.device.type == "cuda" else ():
        equal = [torch.equal(first, other) for other in others]
        assert all(equal), f"the same bits wherever experts live: {equal}"


def experts_without_rows(rank):
    """All tokens choose one expert: the gradients of the others are zeros, not what was there."""
    plan = rank.plan(0)
    layer = rank.layer(rank.weights(plan), plan)
    x, gates, ids, grad = rank.inputs(3)
    junk = [torch.full_like(layer.gate_up, 7.0) for _ in range(3)]
    del junk
    run(layer, x, gates, torch.where(ids >= 0, 5, -1), grad)
    for slot, number in enumerate(rank.held(plan, 0)):
        idle = number != 5
        assert idle == (not layer.gate_up.grad[slot].any()), f"slot {slot}, expert {number}"
        assert idle == (not layer.down.grad[slot].any()), f"slot {slot}, expert {number}"
    none = rank.inputs(4, tokens=0)
    assert run(layer, *none)[0].shape == (0, HIDDEN)


def tokens_as_predicted(rank):
    plan = rank.plan(0)
    layer = rank.layer(rank.weights(plan), plan)
    x, gates, ids, _ = rank.inputs(2)
    made = layer.begin(x, gates, ids)
    counts = torch.zeros(rank.size * EXPERTS, dtype=torch.int64, device=rank.device)
    dist.all_gather(list(counts.view(rank.size, EXPERTS)), layer.load_E)
    one = eplb_rs.Plan.from_phy2log(plan.topology, plan.phy2log[:1], plan.expert_load[:1])
    tokens = predicted_tokens(one, counts.cpu().numpy().reshape(1, rank.size, EXPERTS))[0]
    mine = tokens[rank.rank * rank.slots :][: rank.slots].tolist()
    assert made.rows_by_slot.tolist() == mine


def one_wait_for_the_device(rank):
    """A pass waits once, for the sizes; with a capacity not at all, but for the look at the end."""
    plan = rank.plan(0)
    weights = rank.weights(plan)
    found = []
    for capacity in (None, TOKENS * TOP_K):
        layer = rank.layer(weights, plan, capacity=capacity)
        layer.raise_on_overflow = lambda: None
        given = rank.inputs(5)
        for _ in range(2):
            run(layer, *given)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            run(layer, *given)
            torch.cuda.set_sync_debug_mode("default")
        found.append([str(w.message) for w in said if "called a sync" in str(w.message)])
    assert [len(waits) for waits in found] == [1, 0], found


def a_captured_pass_follows(rank):
    """A graph replayed on new tokens, a new plan and too many rows."""
    plan, other = rank.plan(0), rank.plan(7)
    weights = rank.weights(plan)
    uneven = rank.layer(weights, plan)
    # One rank has room for what has an expert; of two, each for three quarters of it.
    room = TOKENS * TOP_K * (98 if rank.size == 1 else 75) // 100
    layer = rank.layer(weights, plan, capacity=room)
    x, gates, ids, grad = rank.inputs(6)
    x, gates = x.requires_grad_(), gates.requires_grad_()
    layer.router.choice = TopK(gates, ids)

    def work():
        x.grad = gates.grad = layer.gate_up.grad = layer.down.grad = None
        out = layer(x)
        out.backward(grad)
        return out

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    kept = [x.grad, gates.grad, layer.gate_up.grad, layer.down.grad]

    def replay(seed):
        given = rank.inputs(seed)
        with torch.no_grad():
            for target, source in zip((x, gates, ids, grad), given, strict=True):
                target.copy_(source)
        graph.replay()
        layer.raise_on_overflow()
        uneven.gate_up.grad = uneven.down.grad = None
        wanted = *run(uneven, *given), uneven.gate_up.grad, uneven.down.grad
        for number, (a, b) in enumerate(zip((out, *kept), wanted, strict=True)):
            assert torch.equal(a, b), f"tensor {number} of replay {seed}"

    for seed in (10, 11, 12):
        replay(seed)
    mover = ExpertMover(weights)
    mover.apply(plan, other)
    rank.check_weights(weights, other)
    layer.follow(other)
    uneven.follow(other)
    for seed in (13, 14):
        replay(seed)
    # Every choice of every token is one expert, whose replicas' ranks have no room for all.
    with torch.no_grad():
        ids.fill_(int(other.logcnt[0].argmin()))
    graph.replay()
    with pytest.raises(OverflowError, match="`capacity`"):
        layer.raise_on_overflow()
    replay(15)


def moves(rank):
    """Whole moves, and moves between passes, that take every expert to its place."""
    plan = rank.plan(0)
    weights = rank.weights(plan)
    layers = [rank.layer(weights, plan, number) for number in range(LAYERS)]
    expected = [run(layers[n], *rank.inputs(20 + n))[0] for n in range(LAYERS)]
    expert_bytes = weights.expert_bytes

    def switch(number, new):
        layers[number].follow(new)

    for most in (1, 3 * expert_bytes, 1 << 30):
        mover = ExpertMover(
            weights, checksums=True, max_bytes_in_flight=most, on_switch=switch, limit_s=30
        )
        for seed in (1, 2):
            new = rank.plan(seed)
            mover.apply(plan, new)
            rank.check_weights(weights, new)
            plan = new
        for seed in (3, 4):
            new = rank.plan(seed)
            mover.begin(plan, new)
            steps = 0
            while mover.step():
                steps += 1
                for number in range(LAYERS):
                    out = run(layers[number], *rank.inputs(20 + number))[0]
                    assert torch.equal(out, expected[number]), f"step {steps}"
            assert steps >= 2
            rank.check_weights(weights, new)
            plan = new
    if rank.size > 1:
        assert mover.stats.bytes_received > 0


def the_loop_follows(rank):
    """The load drifts; the loop plans and moves between passes, and no output changes."""
    plan = rank.plan(0)
    weights = rank.weights(plan)
    layers = [rank.layer(weights, plan, number) for number in range(LAYERS)]
    loop = Rebalancer(
        eplb_rs.Planner(plan.topology),
        layers,
        weights,
        plan,
        settings=RebalancerSettings(
            window_passes=4, interval_passes=8, estimator="last", limit_s=30.0
        ),
    )
    for phase in range(3):
        x, gates, ids, grad = rank.inputs(30 + phase)
        given = x, gates, torch.where(ids >= 0, (ids + 5 * phase) % EXPERTS, -1), grad
        expected = [run(layer, *given)[0] for layer in layers]
        for number in range(24):
            for layer, wanted in zip(layers, expected, strict=True):
                assert torch.equal(run(layer, *given)[0], wanted), f"pass {number}, phase {phase}"
            loop.step()
    while loop.busy:
        loop.step()
    rank.check_weights(weights, loop.plan)
    told = loop.metrics()
    assert told.windows >= 17, told
    assert told.plans_failed == 0, told
    if rank.size > 1:  # one rank has nothing to gain
        assert told.plans_adopted >= 2, told
        assert told.moves > 0, told
        assert told.balance_measured > 0.9, told


CHECKS = [
    as_computed_directly,
    experts_without_rows,
    tokens_as_predicted,
    one_wait_for_the_device,
    a_captured_pass_follows,
    moves,
    the_loop_follows,
]
ON_NCCL = {"one_wait_for_the_device", "a_captured_pass_follows"}
"""What cannot go through the host."""


def main(number, size, folder, *names):
    rank = Rank(int(number), int(size), folder)
    found = {}
    for check in CHECKS:
        if check.__name__ not in (names or [each.__name__ for each in CHECKS]):
            continue
        if check.__name__ in ON_NCCL and rank.staged:
            continue
        try:
            check(rank)
            found[check.__name__] = None
        except Exception:
            found[check.__name__] = traceback.format_exc()[-3000:]
        (Path(folder) / f"{number}.json").write_text(json.dumps(found))
        if found[check.__name__]:
            os._exit(1)  # others may wait for this rank, and are ended
    dist.destroy_process_group()


@functools.cache
def world(size):
    """What each check has found on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__]
        found = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        ranks = [
            subprocess.Popen([*command, str(rank), str(size), folder], env=found)
            for rank in range(size)
        ]
        end = time.monotonic() + LIMIT_S
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            if any(rank.poll() for rank in ranks):
                end = min(end, time.monotonic() + 5)
            time.sleep(0.05)
        for rank in ranks:
            rank.kill()
            rank.wait()
        files = [Path(folder) / f"{rank}.json" for rank in range(size)]
        return [json.loads(f.read_text()) if f.exists() else {} for f in files]


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize("size", [1, 2])
def test_on_gpus(size, check):
    if torch.cuda.device_count() < size and check in ON_NCCL:
        pytest.skip(f"needs {size} CUDA GPUs")
    for rank, found in enumerate(world(size)):
        assert check in found, f"rank {rank} ended before"
        assert found[check] is None, f"rank {rank}: {found[check]}"


if __name__ == "__main__":
    main(*sys.argv[1:])
