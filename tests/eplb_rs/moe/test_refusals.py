"""What does not fit is said; what is unusual is computed: bf16, replicas twice on a rank, dead ranks."""

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
    RoutingTable,
    TopK,
    TopKRouter,
    sum_replica_gradients,
)
from moe_model import (  # noqa: E402
    EXPERTS,
    HIDDEN,
    INTER,
    LAYERS,
    SLOTS,
    TOP_K,
    TOPOLOGY,
    Chosen,
    Model,
    inputs,
    random_plan,
    reference,
    whole_weights,
)


def code_of(call):
    try:
        call()
    except eplb_rs.PlanError as error:
        return error.code
    except Exception as error:
        return repr(error)
    return None


def placed(slots, topology=TOPOLOGY):
    return eplb_rs.Plan.from_phy2log(topology, [slots] * LAYERS, np.ones((LAYERS, EXPERTS)))


def layers_refuse(rank, size):
    plan = random_plan(0)
    good = {
        "gate_up.weight": torch.zeros(SLOTS, 2 * INTER, HIDDEN),
        "down.weight": torch.zeros(SLOTS, HIDDEN, INTER),
    }

    def made(weights=good, plan=plan, **options):
        return ExpertParallelMoE(Chosen(), weights, plan, **options)

    scale = {"gate_up.weight_scale": torch.ones(SLOTS)}
    wider = {"down.weight": torch.zeros(SLOTS, HIDDEN, INTER + 1)}
    layer = made()
    gates, ids = torch.ones(4, TOP_K), torch.zeros(4, TOP_K, dtype=torch.int64)

    def passed(x, gates=gates, ids=ids):
        layer.router.choice = TopK(gates, ids)
        return lambda: layer(x)

    x = torch.zeros(4, HIDDEN)
    more = eplb_rs.Topology(2, 2, 6)
    half = layer.begin(x, gates, ids)
    return {
        "unknown: scales": code_of(lambda: made(good | scale)),
        "unknown: a name": code_of(lambda: made({"gate_up.weight": x})),
        "wrong_dtype: int8": code_of(lambda: made({k: v.char() for k, v in good.items()})),
        "wrong_dtype: mixed": code_of(
            lambda: made(good | {"down.weight": good["down.weight"].bfloat16()})
        ),
        "wrong_shape: widths": code_of(lambda: made(good | wider)),
        "wrong_shape: slots": code_of(lambda: made({k: v[1:] for k, v in good.items()})),
        "wrong_shape: flat": code_of(lambda: made({k: v.flatten(1) for k, v in good.items()})),
        "wrong_type: plan": code_of(lambda: made(plan=plan.phy2log)),
        "wrong_shape: ranks": code_of(
            lambda: made(plan=eplb_rs.Planner(eplb_rs.Topology(1, 3, 5)).plan([[1.0] * EXPERTS]))
        ),
        "out_of_range: layer": code_of(lambda: made(layer=LAYERS)),
        "unknown: activation": code_of(lambda: made(activation="tanh")),
        "not_positive: capacity": code_of(lambda: made(capacity=0)),
        "inconsistent: kernels without a GPU": code_of(lambda: made(fused=True)),
        "not_integer: rows": code_of(lambda: made(row_multiple=1.5)),
        "out_of_range: choices": code_of(lambda: TopKRouter(HIDDEN, EXPERTS, EXPERTS + 1)),
        "wrong_shape: width": code_of(passed(torch.zeros(4, HIDDEN + 1))),
        "wrong_shape: tokens": code_of(passed(torch.zeros(5, HIDDEN))),
        "wrong_shape: gates": code_of(passed(x, gates[:, :1])),
        "wrong_shape: none": code_of(passed(x, gates[:, :0], ids[:, :0])),
        "wrong_dtype: tokens": code_of(passed(x.double())),
        "wrong_dtype: choices": code_of(passed(x, ids=gates)),
        "out_of_range: expert": code_of(passed(x, ids=ids + EXPERTS)),
        "out_of_range: below": code_of(passed(x, ids=ids - 2)),
        "wrong_shape: follow": code_of(
            lambda: layer.follow(eplb_rs.Planner(more).plan(np.ones((LAYERS, EXPERTS))))
        ),
        "wrong_shape: experts": code_of(
            lambda: layer.follow(eplb_rs.Planner(TOPOLOGY).plan(np.ones((LAYERS, EXPERTS - 1))))
        ),
        "out_of_range: follow": code_of(
            lambda: made(layer=2).follow(
                eplb_rs.Planner(TOPOLOGY).plan(np.ones((LAYERS - 1, EXPERTS)))
            )
        ),
        "wrong_shape: table": code_of(
            lambda: RoutingTable(3, 4).update(np.zeros((3, 4), int), np.ones(2, int))
        ),
        "wrong_order: experts": code_of(half.experts),
        "wrong_order: weights": code_of(half.weight_grads),
        "wrong_order: back": code_of(lambda: half.combine_backward(x)),
    }


def movers_refuse(rank, size):
    plan = random_plan(0)
    weights = ExpertWeights.adopt([{"w": torch.zeros(SLOTS, 2)}] * LAYERS)
    mover = ExpertMover(weights)
    few = ExpertMover(ExpertWeights.adopt([{"w": torch.zeros(SLOTS, 2)}]))
    tight = ExpertMover(weights, max_extra_bytes=1)
    half = eplb_rs.Planner(eplb_rs.Topology(1, 2, 10)).plan(np.ones((LAYERS, EXPERTS)))
    grads = [{"w": torch.zeros(SLOTS, 2)}] * LAYERS
    gone = eplb_rs.Planner(TOPOLOGY.with_dead([0])).plan(np.ones((LAYERS, EXPERTS)), previous=plan)
    return {
        "wrong_type: weights": code_of(lambda: ExpertMover([{}])),
        "not_positive: limit": code_of(lambda: ExpertMover(weights, grace_s=0)),
        "wrong_type: plan": code_of(lambda: mover.begin(plan, plan.phy2log)),
        "wrong_shape: plans": code_of(lambda: mover.begin(plan, half)),
        "wrong_shape: both": code_of(lambda: mover.begin(half, half)),
        "wrong_shape: layers": code_of(lambda: few.begin(plan, plan)),
        "too_large: memory": code_of(lambda: tight.begin(plan, random_plan(1))),
        "missing_expert: lost": code_of(lambda: mover.begin(plan, gone)),
        "missing_plan: idle": code_of(lambda: mover.abort("why")),
        "wrong_shape: gradients": code_of(lambda: sum_replica_gradients(grads[1:], plan)),
        "wrong_type: gradients": code_of(
            lambda: sum_replica_gradients([{"w": None}, *grads[1:]], plan)
        ),
        "wrong_shape: group": code_of(lambda: sum_replica_gradients(grads, half)),
    }


def in_half_precision(rank, size):
    """bf16 weights and tokens; the gates come in float32."""
    plan = random_plan(0)
    model = Model(rank, False, plan)
    model.layers = [
        ExpertParallelMoE(
            Chosen(),
            {name: one.bfloat16() for name, one in model.weights[layer].items()},
            plan,
            layer=layer,
        )
        for layer in range(LAYERS)
    ]
    x, gates, ids, grad = inputs(False, 73 + rank)
    assert len(x)
    half = x.bfloat16().requires_grad_()
    out = model(half, gates, ids)
    assert out.dtype == torch.bfloat16
    out.backward(grad.bfloat16())
    wanted = reference(False, x, gates, ids, *whole_weights(False))
    assert half.grad.dtype == torch.bfloat16
    apart = (out.detach().float() - wanted).abs().max() / wanted.abs().max()
    return float(apart)


def twice_on_a_rank(rank, size):
    """Experts twice, and three times, on a rank: routed, trained and moved."""
    slots = [0, 0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 0, 9, 9, 10, 11, 1, 2, 2]
    plan, other = placed(slots), random_plan(4)
    for rule in ("uniform", "nearest", plan.with_shares(np.ones((LAYERS, EXPERTS)))):
        model = Model(rank, True, plan, routing=rule)
        x, gates, ids, grad = inputs(True, 73 + rank)
        out = model(x, gates, ids)
        weights = [one.requires_grad_() for one in whole_weights(True)]
        wanted = reference(True, x, gates, ids, *weights)
        assert torch.equal(out, wanted)
        out.backward(grad)
        wanted.backward(grad)
        sum_replica_gradients(model.gradients(), plan)
        total = torch.zeros_like(weights[1]) if weights[1].grad is None else weights[1].grad
        dist.all_reduce(total)
        held = torch.tensor(slots[rank * SLOTS : (rank + 1) * SLOTS])
        for layer in range(LAYERS):
            assert torch.equal(model.gradients()[layer]["down"], total[layer][held])
    mover = ExpertMover(model.weights, checksums=True, max_bytes_in_flight=1)
    for old, new in ((plan, other), (other, plan)):
        mover.begin(old, new)
        while mover.step():
            dist.barrier()
        for layer in range(LAYERS):
            held = torch.from_numpy(new.phy2log[layer, rank * SLOTS : (rank + 1) * SLOTS].copy())
            got = model.weights[layer]["down.weight"]
            assert torch.equal(got, whole_weights(True)[1][layer][held])


def with_a_dead_rank(rank, size):
    """A rank that is declared dead holds nothing, and has tokens all the same; then it joins."""
    topology = eplb_rs.Topology(2, 2, SLOTS)
    everywhere = eplb_rs.Planner(topology).plan(np.ones((LAYERS, EXPERTS)))
    planner = eplb_rs.Planner(topology.with_dead([2]))
    plan = planner.plan(np.ones((LAYERS, EXPERTS)), previous=everywhere)
    model = Model(rank, True, everywhere)
    read = []

    def load(layer, expert, into):
        read.append((layer, expert))
        for whole, part in zip(whole_weights(True), into.values(), strict=True):
            part.copy_(whole[layer, expert])

    mover = ExpertMover(
        model.weights,
        load=load,
        on_switch=lambda layer, new: model.layers[layer].follow(new),
    )
    for old, new in ((everywhere, plan), (plan, everywhere)):
        mover.apply(old, new)
        for layer in model.layers:
            layer.follow(new)
        x, gates, ids, grad = inputs(True, 73 + rank)
        out = model(x, gates, ids)
        out.backward(grad)
        assert torch.equal(out, reference(True, x, gates, ids, *whole_weights(True)))
        sum_replica_gradients(model.gradients(), new)
        model.forget()
    return len(read)


def without_tokens(rank, size):
    """In fixed capacity, too: one rank has tokens, one tokens that choose none, two have none."""
    plan = random_plan(0)
    model = Model(rank, True, plan, capacity=40)
    tokens = 5 if rank < 2 else 0
    x, gates, ids, _ = inputs(True, 70)
    ids = ids[:, :5] if rank == 0 else torch.full((LAYERS, tokens, TOP_K), -1)
    x, gates = x[:tokens].requires_grad_(), gates[:, :tokens]
    out = model(x, gates, ids)
    out.sum().backward()
    assert torch.equal(out, reference(True, x.detach(), gates, ids, *whole_weights(True)))
    return tuple(x.grad.shape)


def quantised(rank, size):
    """Bytes that are no floats, scalars, nothing at all: whatever belongs to an expert moves."""
    plan, other = random_plan(0), random_plan(1)

    def expert(number):
        generator = torch.Generator().manual_seed(number)
        whole = torch.randint(-128, 128, (3, 8), generator=generator, dtype=torch.int8)
        return {
            "weight": whole.view(torch.float8_e4m3fn),
            "scale": torch.randn((), generator=generator).bfloat16(),
            "zero": torch.tensor(number, dtype=torch.int16),
            "sign": whole[0] > 0,
            "none": torch.zeros(0),
            "phase": torch.randn(2, generator=generator, dtype=torch.complex64),
        }

    def held(plan):
        rows = plan.phy2log[:, rank * SLOTS : (rank + 1) * SLOTS]
        return [
            {
                name: torch.stack([expert(layer * EXPERTS + one)[name] for one in row])
                for name in expert(0)
            }
            for layer, row in enumerate(rows.tolist())
        ]

    weights = ExpertWeights.adopt(held(plan))
    ExpertMover(weights, checksums=True).apply(plan, other)
    wanted = ExpertWeights.adopt(held(other))
    for layer in range(LAYERS):
        for slot in range(SLOTS):
            assert weights.checksum(layer, slot) == wanted.checksum(layer, slot)


def slices_of_one_tensor(rank, size):
    """Layers that are parts of one tensor share its count of changes, and move all the same."""
    plan, other = random_plan(0), random_plan(1)

    def held(plan):
        slots = plan.phy2log[:, rank * SLOTS : (rank + 1) * SLOTS]
        return torch.from_numpy(slots + EXPERTS * np.arange(LAYERS)[:, None])

    whole = held(plan)[..., None] * torch.ones(3, dtype=torch.int64)
    weights = ExpertWeights.adopt([{"weight": layer} for layer in whole])
    mover = ExpertMover(weights)
    mover.apply(plan, other)
    assert torch.equal(whole[..., 0], held(other))
    mover.begin(other, plan)
    while mover.step():
        dist.barrier()
    assert torch.equal(whole[..., 2], held(plan))


TOGETHER = [
    layers_refuse,
    movers_refuse,
    in_half_precision,
    twice_on_a_rank,
    with_a_dead_rank,
    without_tokens,
    quantised,
    slices_of_one_tensor,
]


@pytest.fixture(scope="module")
def told():
    """What each rank has to say of each part: one world for all of them."""
    return world.run_parts(TOGETHER, 4)


@pytest.mark.parametrize("part", [layers_refuse, movers_refuse])
def test_what_does_not_fit_is_refused(told, part):
    for found in told[part.__name__]:
        assert {name: code for name, code in found.items() if code != name.partition(":")[0]} == {}


def test_half_precision(told):
    assert max(told["in_half_precision"]) < 0.05


def test_ranks_without_tokens_in_fixed_capacity(told):
    assert told["without_tokens"] == [(5, HIDDEN), (5, HIDDEN), (0, HIDDEN), (0, HIDDEN)]


def test_dead_ranks_and_lost_experts(told):
    read = told["with_a_dead_rank"]
    assert sum(read) > 0, "experts that only the dead rank held"
    assert read[2] == 0


@pytest.mark.parametrize("part", [twice_on_a_rank, quantised, slices_of_one_tensor])
def test_unusual_experts(told, part):
    assert told[part.__name__] == [None] * 4
