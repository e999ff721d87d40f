"""The loop: it follows a drifting load without a wrong token, and ends the same way on all."""

import dataclasses
import logging
import math
import os
import pickle
import signal
import time

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
    MoveCost,
    MoveError,
    PrometheusCollector,
    Rebalancer,
    RebalancerMetrics,
    RebalancerSettings,
    RebalancerState,
    Recorded,
    StoreLostError,
    TopK,
    sum_replica_gradients,
    with_optimizer_state,
)
from eplb_rs.scenarios import Outlook  # noqa: E402
from moe_model import (  # noqa: E402
    EXPERTS,
    HIDDEN,
    LAYERS,
    SLOTS,
    TOP_K,
    TOPOLOGY,
    Chosen,
    Model,
    draw,
    random_plan,
    reference,
    whole_weights,
)

PLANNER = eplb_rs.Planner(TOPOLOGY)
QUICK = {"window_passes": 4, "interval_passes": 8, "estimator": "last", "limit_s": 60.0}


def popularity(phase):
    """`[L, E]`: tokens a pass that each rank has for each expert.

    Whole dozens, so that up to four replicas share them evenly, to the token.
    """
    dozens = np.array([5, 4, 3, 2, 2, 2, 1, 1, 1, 1, 1, 1])
    rng = np.random.default_rng(phase)
    return np.stack([12 * rng.permutation(dozens) for _ in range(LAYERS)])


def tokens(rank, number, phase):
    """What a rank has in a pass, as :func:`moe_model.inputs` gives it, of that popularity."""
    generator = torch.Generator().manual_seed(number * 10 + rank)
    counts = popularity(phase)
    count = int(counts[0].sum()) // TOP_K
    x = draw(generator, True, count, HIDDEN)
    gates = 2.0 ** torch.randint(0, 2, (LAYERS, count, TOP_K), generator=generator)
    # Sorted by expert and dealt out, a token's experts differ.
    ids = [torch.arange(EXPERTS).repeat_interleave(torch.from_numpy(row)) for row in counts]
    ids = torch.stack([row.view(TOP_K, count).T for row in ids])
    order = torch.randperm(count, generator=generator)
    return x, gates, ids[:, order]


def serve(model, rank, number, phase, *, checked=True):
    x, gates, ids = tokens(rank, number, phase)
    with torch.no_grad():
        out = model(x, gates, ids)
    if checked:
        wanted = reference(True, x, gates, ids, *whole_weights(True))
        assert torch.equal(out, wanted), f"pass {number}"


def looped(rank, plan, passes, *, planner=PLANNER, checked=False, state=None, **settings):
    """A loop over passes, given by phase, and the metrics after each window."""
    model = Model(rank, True, plan)
    loop = Rebalancer(
        planner,
        model.layers,
        model.weights,
        plan,
        settings=RebalancerSettings(**QUICK | settings),
        state=state,
    )
    windows = []
    for number, phase in enumerate(passes):
        serve(model, rank, number, phase, checked=checked)
        before = loop.metrics().windows
        loop.step()
        if loop.metrics().windows > before:
            windows.append(loop.metrics())
    return loop, model, windows


def with_a_drifting_load(rank, size):
    loop, model, windows = looped(rank, random_plan(3), [1] * 24 + [2] * 30, checked=True)
    for layer in range(LAYERS):
        held = model.weights[layer]["gate_up.weight"]
        slots = loop.plan.phy2log[layer, rank * SLOTS : (rank + 1) * SLOTS]
        assert torch.equal(held, whole_weights(True)[0][layer][torch.from_numpy(slots.copy())])
    assert loop.plan.logcnt.max() <= 4, "so that a dozen tokens are shared evenly"
    return loop.plan.phy2log.tolist(), [dataclasses.asdict(one) for one in windows]


TIMES = {"received_bytes", "plan_seconds", "move_seconds", "stall_seconds", "plan_passes"}
TIMES |= {"stall_seconds_last", "stall_seconds_max"}


def test_the_balance_follows_a_drifting_load(told):
    told = told["with_a_drifting_load"]
    plan, windows = told[0]
    for other_plan, others in told[1:]:
        assert other_plan == plan
        for one, other in zip(windows, others, strict=True):
            assert {k: v for k, v in one.items() if k not in TIMES} == pytest.approx(
                {k: v for k, v in other.items() if k not in TIMES}, nan_ok=True
            )
    measured = [one["balance_measured"] for one in windows]
    predicted = [one["balance_predicted"] for one in windows]
    # Windows of 4 passes: two before the first plan, the sixth after it, seven of another load.
    for before, settled in ((1, 5), (6, 12)):
        assert measured[settled] > 0.9
        assert measured[settled] == pytest.approx(predicted[settled - 1], abs=1e-12)
        assert measured[settled] > measured[before] + 0.05
    last = windows[-1]
    assert last["plans_adopted"] >= 2
    assert last["shifts"] == 1
    assert last["moves"] > 0
    expert_bytes = 4 * sum(part[0, 0].numel() for part in whole_weights(True))
    assert last["moved_bytes"] == last["moves"] * expert_bytes
    assert sum(one[1][-1]["received_bytes"] for one in told) == last["moved_bytes"]


WAYS = [
    {"plan_on": "all", "background": False, "mode": "step"},
    {"plan_on": "all", "background": True, "mode": "synchronous"},
    {"plan_on": "rank 0", "background": False, "mode": "layer"},
    {"plan_on": "rank 0", "background": True, "mode": "step"},
]


def in_all_ways(rank, size):
    """Until the first plan is in force."""
    found = []
    for way in WAYS:
        loop, _, _ = looped(rank, random_plan(3), [1] * 24, **way)
        assert loop.metrics().plans_adopted == 1
        found.append(loop.plan.phy2log.tolist())
    return found


def test_all_ways_of_planning_give_the_same_placement(told):
    ways = told["in_all_ways"]
    assert all(one == ways[0][0] for on_rank in ways for one in on_rank)


class Failing(eplb_rs.Planner):
    """Fails on some ranks, or plans something else there."""

    __slots__ = ()

    def plan(self, load, **options):
        if dist.get_rank() == 2:
            raise eplb_rs.InfeasibleError(
                code="missing", argument="load", got="a fault", expected="none"
            )
        return super().plan(load, **options)


class Differing(eplb_rs.Planner):
    __slots__ = ()

    def plan(self, load, **options):
        return super().plan(np.asarray(load) ** (1 + dist.get_rank()), **options)


def whatever_does_not_move(rank, size):
    """Plans that are not worth it, fail, differ or need too much: nothing moves, all go on."""
    plan = random_plan(3)
    best = PLANNER.plan(popularity(1))
    dear = MoveCost(us_per_token=1e-3, intra_node_gb_s=1e-3, inter_node_gb_s=1e-3)
    cases = {
        "even enough": (best, {}),
        "too little gained": (plan, {"min_gain": 0.5}),
        "too dear": (plan, {"cost": dear, "max_moves": 6}),
        "fails on a rank": (plan, {"planner": Failing(TOPOLOGY)}),
        "differs": (plan, {"planner": Differing(TOPOLOGY)}),
        "no room": (plan, {"max_extra_bytes": 10}),
    }
    found = {}
    for name, (start, options) in cases.items():
        loop, _, _ = looped(rank, start, [1] * 14, **options)
        assert np.array_equal(loop.plan.phy2log, start.phy2log), name
        metrics = loop.metrics()
        found[name] = (metrics.plans_not_worth, metrics.plans_failed, metrics.plans_adopted)
        assert metrics.plans >= 1
    # What takes no transfer, an expert twice on a rank, is worth its nothing.
    loop, _, _ = looped(rank, plan, [1] * 20, cost=dear)
    assert loop.metrics().moves == 0
    return found


def test_what_is_not_worth_it_or_fails_does_not_move(told):
    for found in told["whatever_does_not_move"]:
        not_worth = {name for name, counts in found.items() if counts == (1, 0, 0)}
        failed = {name for name, counts in found.items() if counts == (0, 1, 0)}
        assert not_worth == {"even enough", "too little gained", "too dear"}
        assert failed == {"fails on a rank", "differs", "no room"}


def with_other_settings(rank, size):
    """Shares, scenarios, a cost that moves pay for, a limit on moves; and a restart."""
    plan = random_plan(3)
    worth = MoveCost(us_per_token=100, intra_node_gb_s=100, inter_node_gb_s=50)
    balances = {}
    for name, options in {
        "shares": {"routing": "shares", "max_moves": 3},
        "shares without moves": {"routing": "shares", "max_moves": 0},
        "scenarios": {"outlook": Outlook(copies=4), "max_moves": 12},
        "worth it": {"cost": worth},
        "few moves, nearest": {"cost": worth, "max_moves": 6, "routing": "nearest"},
    }.items():
        loop, _, windows = looped(rank, plan, [1] * 28, checked="shares" in name, **options)
        assert loop.metrics().moves <= options.get("max_moves", math.inf) * loop.metrics().plans
        balances[name] = [windows[0].balance_measured, windows[-1].balance_measured]

    # A restart goes on with the placement in force, and knows the load.
    state = RebalancerState.from_json(loop.state().to_json())
    again, _, _ = looped(rank, state.plan, [1] * 6, state=state, routing="shares")
    assert np.array_equal(again.plan.phy2log, loop.plan.phy2log)
    assert len(again.state().windows) == len(loop.state().windows) + 1
    return balances


def test_other_settings(told):
    told = told["with_other_settings"]
    for balances in told:
        assert balances == told[0]
        for name, (before, after) in balances.items():
            assert after > before + 0.01, name
    assert told[0]["shares"][1] > told[0]["shares without moves"][1]


def trained(rank, **settings):
    """Weights and the optimizer's momentum move together: as on one process, step by step."""
    plan = random_plan(3)
    model = Model(rank, False, plan)
    named = [{"gate_up.weight": one.gate_up, "down.weight": one.down} for one in model.layers]
    optimizer = torch.optim.SGD([p for one in named for p in one.values()], lr=0.02, momentum=0.9)
    whole = [one.requires_grad_() for one in whole_weights(False)]
    peer = torch.optim.SGD(whole, lr=0.02, momentum=0.9)
    loop = None
    for number in range(20):
        x, gates, ids = tokens(rank, number, 1)
        gates = gates / 4
        model(x, gates, ids).square().mean().backward()
        placed = plan if loop is None else loop.plan
        sum_replica_gradients(model.gradients(), placed)
        optimizer.step()
        model.forget()
        reference(False, x, gates, ids, *whole).square().mean().backward()
        for one in whole:
            dist.all_reduce(one.grad)
        peer.step()
        peer.zero_grad()
        if loop is None:
            held = with_optimizer_state(model.weights, optimizer, named)
            settings = RebalancerSettings(**QUICK | settings)
            loop = Rebalancer(PLANNER, model.layers, held, plan, settings=settings)
        loop.step()
    assert loop.metrics().plans_adopted >= 1
    apart, far = 0.0, 0.0
    started = whole_weights(False)
    for layer in range(LAYERS):
        here = loop.plan.phy2log[layer, rank * SLOTS : (rank + 1) * SLOTS]
        for name, now, before in zip(("gate_up", "down"), whole, started, strict=True):
            got = model.weights[layer][f"{name}.weight"]
            wanted = now.detach()[layer][torch.from_numpy(here.copy())]
            apart = max(apart, float((got - wanted).abs().max()))
            far = max(far, float((now.detach() - before)[layer].abs().max()))
    return apart, far


def training(rank, size):
    good = trained(rank, mode="layer")
    try:
        trained(rank, mode="step")
    except MoveError as error:
        return *good, str(error), error.moved, error.lost_ranks
    return good


def test_training_is_as_on_one_process(told):
    for apart, far, text, moved, lost in told["training"]:
        assert "in training, `step(whole=True)`" in text or "another rank gave up" in text
        assert moved == lost == ()
        assert far > 0.01, "weights have been trained"
        assert apart < 1e-5


class EnginesLayer:
    """What an engine has of its own: counts of experts, a map."""

    max_replicas = 4

    def __init__(self, load=1):
        self.load, self.seen = load, []

    def record(self):
        return Recorded(torch.from_numpy(self.load * popularity(1)[0]), None)

    def follow(self, plan, routing="uniform"):
        self.seen.append(plan)


def code_of(call):
    try:
        call()
    except eplb_rs.InvalidInputError as error:
        return error.code, error.argument
    return None


def refusals(rank, size):
    plan = random_plan(0)
    model = Model(rank, True, plan)
    layers, weights, settings = model.layers, model.weights, RebalancerSettings(limit_s=30)
    other = eplb_rs.Planner(eplb_rs.Topology(1, 4, 6))
    timed = eplb_rs.Planner(TOPOLOGY, time_limit_us=100)
    peers = eplb_rs.Planner(TOPOLOGY, policy="deepseek")
    strange = RebalancerState(random_plan(1), np.zeros((0, LAYERS, EXPERTS), np.float32))
    few = ExpertWeights.adopt([weights[0]])
    last = rank == size - 1

    def made(planner=PLANNER, layers=layers, weights=weights, plan=plan, **options):
        return Rebalancer(planner, layers, weights, plan, **{"settings": settings} | options)

    calls = {
        "settings": lambda: made(settings={}),
        "planner": lambda: made(planner="balanced"),
        "weights": lambda: made(weights=[weights[0]]),
        "plan": lambda: made(plan=plan.phy2log),
        "layers": lambda: made(layers=[torch.nn.Linear(1, 1)] * LAYERS),
        "too few layers": lambda: made(layers=layers[1:]),
        "too few weights": lambda: made(weights=few),
        "machines": lambda: made(planner=other),
        "time": lambda: made(planner=timed),
        "moves": lambda: made(planner=peers, settings=RebalancerSettings(max_moves=1)),
        "state": lambda: made(state=strange),
        "on one rank": lambda: made(layers=layers[1:] if last else layers),
        "memory": lambda: made(weights=Model(rank, True, plan).weights),
        "differ": lambda: made(plan=random_plan(5) if last else plan),
    }
    found = {name: code_of(call) for name, call in calls.items()}

    own = [EnginesLayer() for _ in range(LAYERS)]
    loop = made(layers=own, settings=RebalancerSettings(**QUICK, background=False))
    for _ in range(40):
        loop.step()
        dist.barrier()
    assert loop.metrics().plans_adopted == 1
    assert math.isnan(loop.metrics().balance_measured)
    assert all(np.array_equal(one.seen[-1].phy2log, loop.plan.phy2log) for one in own)
    return found


def test_what_does_not_fit_is_refused_on_all_ranks(told):
    for rank, found in enumerate(told["refusals"]):
        assert found == {
            "settings": ("wrong_type", "settings"),
            "planner": ("wrong_type", "planner"),
            "weights": ("wrong_type", "weights"),
            "plan": ("wrong_type", "plan"),
            "layers": ("wrong_type", "layers"),
            "too few layers": ("wrong_shape", "layers"),
            "too few weights": ("wrong_shape", "weights"),
            "machines": ("inconsistent", "planner"),
            "time": ("inconsistent", "planner"),
            "moves": ("inconsistent", "planner"),
            "state": ("inconsistent", "state"),
            "on one rank": ("wrong_shape", "layers") if rank == 3 else ("inconsistent", "group"),
            "memory": ("inconsistent", "weights"),
            "differ": ("inconsistent", "settings"),
        }


def idle(rank, size):
    """What is said of an engine that no token comes to."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("eplb_rs")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    model = Model(rank, True, random_plan(0))
    layers = [EnginesLayer(0) for _ in range(LAYERS)]
    loop = Rebalancer(
        PLANNER, layers, model.weights, random_plan(0), settings=RebalancerSettings(**QUICK)
    )
    for _ in range(14):
        loop.step()
        dist.barrier()
    log.removeHandler(handler)
    return lines, loop.metrics().windows, loop.metrics().plans


def test_an_idle_engine_plans_nothing(told):
    assert told["idle"] == [([], 3, 0)] * 4


TOGETHER = [
    with_a_drifting_load,
    in_all_ways,
    whatever_does_not_move,
    with_other_settings,
    training,
    refusals,
    idle,
]


@pytest.fixture(scope="module")
def told():
    """What each rank has to say of each part: one world for all of them."""
    return world.run_parts(TOGETHER, 4)


def dying(rank, size, seed):
    """A rank dies in mid-loop; the others hear of it in a pass, or in the loop."""
    rng = np.random.default_rng(seed)
    victim, when = int(rng.integers(size)), int(rng.integers(6, 30))
    plan = random_plan(seed)
    model = Model(rank, True, plan)
    settings = RebalancerSettings(
        window_passes=4, interval_passes=4, estimator="last", limit_s=5.0, grace_s=2.5
    )
    loop = Rebalancer(PLANNER, model.layers, model.weights, plan, settings=settings)
    try:
        for number in range(40):
            if rank == victim and number == when:
                if seed % 2:
                    serve(model, rank, number, number // 12, checked=False)
                begun = time.monotonic()
                os.kill(os.getpid(), signal.SIGKILL)
            begun = time.monotonic()
            try:
                serve(model, rank, number, number // 12, checked=False)
            except RuntimeError as error:
                raise loop.abort(str(error)) from error
            loop.step()
    except MoveError as failure:
        error, late = failure, time.monotonic() - begun
    else:
        raise AssertionError("nobody died")
    assert np.array_equal(error.plan.phy2log, loop.plan.phy2log)
    assert code_of(loop.step) == ("closed", "rebalancer")
    assert code_of(lambda: loop.abort("again")) == ("closed", "rebalancer")
    for layer in range(LAYERS):
        slots = loop.plan.phy2log[layer, rank * SLOTS : (rank + 1) * SLOTS].copy()
        whole = whole_weights(True)[1][layer][torch.from_numpy(slots)]
        assert torch.equal(model.weights[layer]["down.weight"], whole)
    return error.plan.phy2log.tolist(), error.lost_ranks, error.lost_experts, victim, late


def check_survivors(seeds):
    for outcome in world.run_lossy(dying, 4, [(seed,) for seed in seeds], at_once=3):
        told = [survivor for survivor in outcome if survivor is not None]
        assert len(told) == 3
        slots, lost, gone, victim, _ = told[0]
        assert lost == (victim,)
        assert all(other[:4] == (slots, lost, gone, victim) for other in told)
        assert max(late for *_, late in told) < 5.0 + 2.5 + 1.5


def test_a_rank_dies_in_mid_loop():
    check_survivors(range(3))


@pytest.mark.slow
def test_ranks_die_in_mid_loop():
    check_survivors(range(3, 23))


def going_on(rank, size, seed):
    """A rank dies; the others place what it held anew, and serve and balance on without it."""
    victim = seed % size
    plan = random_plan(seed)
    model = Model(rank, True, plan, routing="nearest")
    settings = RebalancerSettings(**QUICK | {"limit_s": 5.0}, grace_s=2.5)
    loop = Rebalancer(PLANNER, model.layers, model.weights, plan, settings=settings)
    try:
        for number in range(40):
            if rank == victim and number == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                serve(model, rank, number, 1, checked=False)
            except RuntimeError as error:
                raise loop.abort(str(error)) from error
            loop.step()
    except MoveError as failure:
        error = failure
    assert error.lost_ranks == (victim,)
    topology = TOPOLOGY.with_dead(error.lost_ranks)
    alive = [one for one in range(size) if one != victim]
    group = dist.new_group(alive, use_local_synchronization=True)
    planner = eplb_rs.Planner(topology)
    new = planner.plan(popularity(1), previous=error.plan)
    read = []

    def load(layer, expert, into):
        read.append((layer, expert))
        for whole, part in zip(whole_weights(True), into.values(), strict=True):
            part.copy_(whole[layer, expert])

    ExpertMover(model.weights, group=group, load=load, limit_s=10).apply(error.plan, new)
    for layer in model.layers:
        layer.regroup(new, group)
        assert code_of(lambda layer=layer: layer.follow(plan)) == ("wrong_shape", "group")
    loop = Rebalancer(
        planner,
        model.layers,
        model.weights,
        new,
        group=group,
        settings=settings,
    )
    for number in range(24):
        serve(model, rank, number, 2)
        loop.step()
    metrics = loop.metrics()
    # And once more: who is lost now is told by the plan's numbers, not by the smaller group's.
    if rank == alive[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    lost = loop.abort("a rank is gone").lost_ranks
    return lost, (alive[1],), metrics.plans_adopted, sorted(read), sorted(error.lost_experts)


def test_survivors_go_on():
    for outcome in world.run_lossy(going_on, 4, [(seed,) for seed in (1, 2)], at_once=2):
        told = [one for one in outcome if one is not None]
        assert len(told) == 2
        assert all(lost == victims for lost, victims, *_ in told)
        assert all(adopted >= 1 for _, _, adopted, *_ in told)
        assert all(set(read) <= set(gone) for *_, read, gone in told)


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("not_positive", {"window_passes": 0}),
        ("not_positive", {"window_passes": 3}),
        ("not_integer", {"interval_passes": 1.5}),
        ("not_multiple", {"interval_passes": 1500}),
        ("unknown", {"estimator": "oracle"}),
        ("wrong_type", {"outlook": 3}),
        ("wrong_type", {"cost": {"us_per_token": 1}}),
        ("unknown", {"routing": "closest"}),
        ("unknown", {"plan_on": ["all"]}),
        ("unknown", {"mode": None}),
        ("negative", {"max_moves": -1}),
        ("out_of_range", {"min_gain": math.nan}),
        ("not_positive", {"max_bytes_in_flight": 0}),
        ("not_positive", {"max_extra_bytes": 0}),
        ("out_of_range", {"limit_s": 0}),
        ("wrong_type", {"grace_s": "long"}),
    ],
)
def test_settings_are_checked(code, options):
    with pytest.raises(eplb_rs.InvalidInputError) as caught:
        RebalancerSettings(**options)
    assert caught.value.code == code
    assert caught.value.argument == next(iter(options))


def test_costs_are_checked():
    good = {"us_per_token": 1, "intra_node_gb_s": 1, "inter_node_gb_s": 1}
    for bad in ({"us_per_token": 0}, {"hidden": 2}, {"latency_us": -1}, {"horizon_passes": 0}):
        with pytest.raises(eplb_rs.InvalidInputError) as caught:
            MoveCost(**good | bad)
        assert caught.value.argument == next(iter(bad))


def test_a_state_is_kept_in_a_file(tmp_path):
    state = RebalancerState(random_plan(0), np.full((2, LAYERS, EXPERTS), 0.5, np.float32))
    state.save(tmp_path / "state.json")
    back = RebalancerState.load(tmp_path / "state.json")
    assert back.plan == state.plan
    np.testing.assert_array_equal(back.windows, state.windows)
    assert code_of(lambda: RebalancerState.load(tmp_path / "none")) == ("missing_file", "state")
    for text, wanted in {
        "{": ("not_json", "state"),
        "[]": ("wrong_format", "state"),
        state.to_json().replace('"windows":[', '"windows":[[1],'): ("wrong_shape", "windows"),
        state.to_json().replace('"windows":[', '"windows":[[[1]],'): ("wrong_format", "state"),
    }.items():
        assert code_of(lambda text=text: RebalancerState.from_json(text)) == wanted


def test_metrics_go_to_prometheus():
    registry = pytest.importorskip("prometheus_client").CollectorRegistry()
    metrics = RebalancerMetrics(passes=7, balance_measured=0.5)
    registry.register(PrometheusCollector(lambda: metrics, labels={"rank": "3"}))
    assert registry.get_sample_value("eplb_passes_total", {"rank": "3"}) == 7
    assert registry.get_sample_value("eplb_balance_measured", {"rank": "3"}) == 0.5
    assert registry.get_sample_value("eplb_balance_predicted", {"rank": "3"}) is None
    metrics.passes = 8
    assert registry.get_sample_value("eplb_passes_total", {"rank": "3"}) == 8


def test_failures_are_told_to_other_processes():
    plan = random_plan(0)
    made = MoveError("why", plan=plan, moved=(1,), lost_ranks=(2,), lost_experts=((0, 3),))
    lost = StoreLostError("why", (1, 2))
    for error in (made, lost):
        again = pickle.loads(pickle.dumps(error))
        assert str(again) == str(error)
        assert vars(again) == vars(error)
    assert "rank 2" in str(made)
    assert "1 experts have no replica left" in str(made)
    assert "layers [1, 2]" in str(lost)


def test_metrics_make_a_line():
    line = RebalancerMetrics(passes=7, balance_measured=0.5, moved_bytes=3_000_000).line()
    assert line.startswith("7 passes: balance 0.5000 measured, nan predicted")
    assert "0.003 GB" in line
    assert "\n" not in line


def on_a_gpu(rank, size):
    """What layers count on the device comes to the host, and nothing else."""
    group = dist.new_group(backend="nccl")
    plan = eplb_rs.Planner(eplb_rs.Topology(1, 1, 6)).plan([[4, 3, 2, 1]])
    weights = ExpertWeights.adopt(
        [
            {
                "gate_up.weight": torch.zeros(6, 16, 8, device="cuda", dtype=torch.bfloat16),
                "down.weight": torch.zeros(6, 8, 8, device="cuda", dtype=torch.bfloat16),
            }
        ]
    )
    layer = ExpertParallelMoE(Chosen(), weights[0], plan, group=group)
    loop = Rebalancer(
        eplb_rs.Planner(plan.topology),
        [layer],
        weights,
        plan,
        group=group,
        settings=RebalancerSettings(**QUICK),
    )
    x = torch.ones(5, 8, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([[0, 1], [0, 2], [0, -1], [3, 1], [0, 1]], device="cuda")
    layer.router.choice = TopK(torch.ones(5, 2, device="cuda"), ids)
    for _ in range(15):
        layer(x)
        loop.step()
    assert loop.metrics().balance_measured == 1
    assert loop.metrics().windows == 3
    return loop.state().windows.tolist()


@pytest.mark.gpu
def test_on_a_gpu():
    assert world.run(on_a_gpu, 1) == [[[[16, 12, 4, 4]]] * 3]
