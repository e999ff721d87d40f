"""The layer on several ranks against the same experts on one: bit for bit, through moves."""

import eplb_rs
import numpy as np
import pytest
import world

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from eplb_rs.moe import (  # noqa: E402
    ExpertMover,
    ExpertParallelMoE,
    ExpertWeights,
    TopK,
    sum_replica_gradients,
)

LAYERS, EXPERTS, TOP_K, HIDDEN, INTER = 3, 12, 3, 16, 8
TOPOLOGY = eplb_rs.Topology(2, 2, 5)
SLOTS = 5


class Chosen(torch.nn.Module):
    """A router that chooses what it is told."""

    def forward(self, x):
        del x
        return self.choice


def random_plan(seed):
    load = np.random.default_rng(seed).lognormal(0, 1.2, (LAYERS, EXPERTS))
    return eplb_rs.Planner(TOPOLOGY, policy="balanced").plan(load)


def draw(generator, exact, *shape):
    if exact:
        keep = torch.rand(*shape, generator=generator) < 0.4
        return torch.randint(-1, 2, shape, generator=generator).float() * keep
    return torch.randn(*shape, generator=generator) / 4


def whole_weights(exact):
    generator = torch.Generator().manual_seed(1)
    gate_up = draw(generator, exact, LAYERS, EXPERTS, 2 * INTER, HIDDEN)
    return gate_up, draw(generator, exact, LAYERS, EXPERTS, HIDDEN, INTER)


def inputs(exact, seed):
    """Tokens, gates, experts and the gradient of the output, of one rank and pass."""
    generator = torch.Generator().manual_seed(seed)
    tokens = int(torch.randint(0, 30, (), generator=generator))
    x = draw(generator, exact, tokens, HIDDEN)
    gates = torch.rand(LAYERS, tokens, TOP_K, generator=generator)
    if exact:
        gates = 2.0 ** torch.randint(0, 2, gates.shape, generator=generator)
    ids = torch.rand(LAYERS, tokens, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K]
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.05, -1)
    return x, gates, ids, draw(generator, exact, tokens, HIDDEN)


def between(h, y, exact):
    """What stands between layers; clipped, so that whole numbers stay small enough to be exact."""
    return torch.clamp(h + y, -2, 2) if exact else h + y


def reference(exact, x, gates, ids, gate_up, down):
    """The same experts on one process, expert by expert."""
    activate = torch.relu if exact else torch.nn.functional.silu
    h = x
    for layer in range(LAYERS):
        y = None
        for k in range(TOP_K):
            part = torch.zeros_like(h)
            for expert in range(EXPERTS):
                (chosen,) = torch.nonzero(ids[layer, :, k] == expert, as_tuple=True)
                if not len(chosen):
                    continue
                rows = h[chosen]
                if not exact:
                    rows = torch.cat([rows, rows.new_zeros(-len(rows) % 16, HIDDEN)])
                gate, up = (rows @ gate_up[layer, expert].T).chunk(2, 1)
                out = ((activate(gate) * up) @ down[layer, expert].T)[: len(chosen)]
                part = part.index_put((chosen,), out)
            part = part * gates[layer, :, k : k + 1]
            y = part if y is None else y + part
        h = between(h, y, exact)
    return h


class Model:
    """Three layers on this rank."""

    def __init__(self, rank, exact, plan, **options):
        held = [
            torch.from_numpy(plan.phy2log[layer, rank * SLOTS : (rank + 1) * SLOTS].copy())
            for layer in range(LAYERS)
        ]
        gate_up, down = whole_weights(exact)
        self.weights = ExpertWeights.adopt(
            [
                {"gate_up.weight": gate_up[layer][mine], "down.weight": down[layer][mine]}
                for layer, mine in enumerate(held)
            ]
        )
        self.exact = exact
        self.layers = [
            ExpertParallelMoE(
                Chosen(),
                self.weights[layer],
                plan,
                layer=layer,
                activation="relu" if exact else "silu",
                row_multiple=1 if exact else 16,
                **options,
            )
            for layer in range(LAYERS)
        ]

    def __call__(self, x, gates, ids):
        h = x
        for layer, gate, chosen in zip(self.layers, gates, ids, strict=True):
            layer.router.choice = TopK(gate, chosen)
            h = between(h, layer(h), self.exact)
        return h

    def gradients(self):
        return [{"gate_up": layer.gate_up.grad, "down": layer.down.grad} for layer in self.layers]

    def forget(self):
        for layer in self.layers:
            layer.gate_up.grad = layer.down.grad = None


def apart(a, b):
    """1 - 2<a,b> / (|a|^2 + |b|^2), 0 for two zeros."""
    a, b = a.double(), b.double()
    both = (a * a).sum() + (b * b).sum()
    return 0.0 if both == 0 else float(1 - 2 * (a * b).sum() / both)


def same(a, b, exact):
    return torch.equal(a.to(b.dtype), b) if exact else abs(apart(a, b)) <= 1e-13


def compare(model, rank, plan, exact, seed):
    """One pass, forward and backward, against the reference."""
    x, gates, ids, grad = inputs(exact, seed * 10 + rank)
    x, gates = x.requires_grad_(), gates.requires_grad_()
    out = model(x, gates, ids)
    out.backward(grad)

    dtype = torch.float64 if exact else torch.float32  # doubles: whole numbers are exact in both
    ref_x, ref_gates = (t.detach().to(dtype).requires_grad_() for t in (x, gates))
    ref_weights = [t.to(dtype).requires_grad_() for t in whole_weights(exact)]
    expected = reference(exact, ref_x, ref_gates, ids, *ref_weights)
    expected.backward(grad.to(dtype))
    assert torch.equal(out.to(dtype), expected), f"outputs of pass {seed}"
    assert same(x.grad, ref_x.grad, exact), f"gradient of the input, pass {seed}"
    assert same(gates.grad, ref_gates.grad, exact), f"gradient of the gates, pass {seed}"

    sum_replica_gradients(model.gradients(), plan)
    for index, name in enumerate(("gate_up", "down")):
        total = ref_weights[index].grad
        total = torch.zeros_like(ref_weights[index]) if total is None else total
        dist.all_reduce(total)
        for layer in range(LAYERS):
            slots = plan.phy2log[layer, rank * SLOTS : (rank + 1) * SLOTS]
            wanted = total[layer][torch.from_numpy(slots.copy())]
            got = model.gradients()[layer][name]
            assert same(got, wanted, exact), f"{name} of layer {layer}: {apart(got, wanted)}"
    model.forget()


def with_many_plans(rank, size, exact, num_plans):
    for seed in range(num_plans):
        plan = random_plan(seed)
        rule = ["uniform", "nearest", plan.with_shares()][seed % 3]
        capacity = 90 if seed % 4 == 3 and exact else None
        compare(Model(rank, exact, plan, routing=rule, capacity=capacity), rank, plan, exact, seed)


def through_moves(rank, size, exact, num_passes):
    """Passes with a replan every ten; moves are carried out between them, a layer at a time."""
    plan = random_plan(0)
    model = Model(rank, exact, plan)
    in_force = [plan] * LAYERS

    def switch(layer, new):
        model.layers[layer].follow(new)
        in_force[layer] = new

    mover = ExpertMover(model.weights, on_switch=switch, limit_s=60, checksums=True)
    mixed = 0
    for number in range(num_passes):
        if number % 10 == 5:
            assert not mover.busy
            mover.begin(plan, plan := random_plan(1000 + number))
        mover.step()
        mixed += len({id(p) for p in in_force}) > 1
        if number % 10 == 0:
            now = eplb_rs.Plan.from_phy2log(
                TOPOLOGY,
                np.stack([p.phy2log[layer] for layer, p in enumerate(in_force)]),
                plan.expert_load,
            )
            compare(model, rank, now, exact, 5000 + number)
            continue
        x, gates, ids, _ = inputs(exact, (5000 + number) * 10 + rank)
        with torch.no_grad():
            out = model(x, gates, ids)
            expected = reference(exact, x, gates, ids, *whole_weights(exact))
        assert torch.equal(out, expected), f"pass {number}"
    return mixed


@pytest.mark.parametrize("exact", [True, False], ids=["whole numbers", "floats"])
def test_as_on_one_process(exact):
    world.run(with_many_plans, 4, exact, 12)


@pytest.mark.parametrize("exact", [True, False], ids=["whole numbers", "floats"])
def test_no_wrong_token_through_moves(exact):
    mixed = world.run(through_moves, 4, exact, 40)
    assert min(mixed) >= 3, "passes with some layers old and some new"


@pytest.mark.slow
@pytest.mark.parametrize("exact", [True, False], ids=["whole numbers", "floats"])
def test_as_on_one_process_with_200_plans(exact):
    world.run(with_many_plans, 4, exact, 200, limit_s=900)


@pytest.mark.slow
@pytest.mark.parametrize("exact", [True, False], ids=["whole numbers", "floats"])
def test_no_wrong_token_in_1000_passes(exact):
    world.run(through_moves, 4, exact, 1000, limit_s=900)


def too_many(rank, size):
    plan = random_plan(0)
    model = Model(rank, True, plan, capacity=2)
    x, gates, ids, _ = inputs(True, 70 + rank)
    try:
        model(x, gates, ids)
    except OverflowError as error:
        return str(error)
    return None


def test_overflow_is_told():
    told = world.run(too_many, 2 * 2)
    assert all("`capacity` (2)" in message for message in told), "on all ranks alike"
    assert len(set(told)) == 1


def empty_passes(rank, size):
    """Some ranks have no tokens, or none that chose an expert."""
    plan = random_plan(0)
    model = Model(rank, True, plan)
    tokens = 4 if rank == 1 else 0
    x = torch.ones(tokens, HIDDEN, requires_grad=True)
    gates = torch.ones(LAYERS, tokens, TOP_K)
    ids = torch.full((LAYERS, tokens, TOP_K), -1)
    out = model(x, gates, ids)
    out.sum().backward()
    assert torch.equal(out, x.detach())
    return out.shape


def test_ranks_without_tokens():
    assert world.run(empty_passes, 4) == [(0, 16), (4, 16), (0, 16), (0, 16)]


def load_is_recorded(rank, size):
    plan = random_plan(0)
    model = Model(rank, True, plan)
    counts = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    for seed in range(3):
        x, gates, ids, _ = inputs(True, seed * 10 + rank)
        model(x, gates, ids)
        for layer in range(LAYERS):
            chosen = ids[layer][ids[layer] >= 0]
            counts[layer] += torch.bincount(chosen, minlength=EXPERTS)
    for layer in range(LAYERS):
        assert torch.equal(model.layers[layer].load_E, counts[layer])


def test_load_is_recorded():
    world.run(load_is_recorded, 4)
