"""The layer on several ranks against the same experts on one: bit for bit, through moves."""

import eplb_rs
import numpy as np
import pytest
import world

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from eplb_rs.moe import ExpertMover, sum_replica_gradients  # noqa: E402
from moe_model import (  # noqa: E402
    EXPERTS,
    HIDDEN,
    LAYERS,
    SLOTS,
    TOP_K,
    TOPOLOGY,
    Model,
    inputs,
    random_plan,
    reference,
    whole_weights,
)


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


def plans_in_whole_numbers(rank, size):
    with_many_plans(rank, size, True, 12)


def plans_in_floats(rank, size):
    with_many_plans(rank, size, False, 12)


def moves_in_whole_numbers(rank, size):
    return through_moves(rank, size, True, 40)


def moves_in_floats(rank, size):
    return through_moves(rank, size, False, 40)


TOGETHER = [
    plans_in_whole_numbers,
    plans_in_floats,
    moves_in_whole_numbers,
    moves_in_floats,
    too_many,
    empty_passes,
    load_is_recorded,
]


@pytest.fixture(scope="module")
def told():
    """What each rank has to say of each part: one world for all of them."""
    return world.run_parts(TOGETHER, 4)


@pytest.mark.parametrize("part", [plans_in_whole_numbers, plans_in_floats, load_is_recorded])
def test_as_on_one_process(told, part):
    assert told[part.__name__] == [None] * 4, "what differs is raised on the rank"


@pytest.mark.parametrize("part", [moves_in_whole_numbers, moves_in_floats])
def test_no_wrong_token_through_moves(told, part):
    assert min(told[part.__name__]) >= 3, "passes with some layers old and some new"


def test_overflow_is_told(told):
    messages = told["too_many"]
    assert all("`capacity` (2)" in message for message in messages), "on all ranks alike"
    assert len(set(messages)) == 1


def test_ranks_without_tokens(told):
    assert told["empty_passes"] == [(0, 16), (4, 16), (0, 16), (0, 16)]
