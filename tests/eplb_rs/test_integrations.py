"""What the plug-ins do where no engine is installed, and the files that engines read."""

import json
import logging

import eplb_rs
import numpy as np
import pytest
from eplb_rs.integrations import sglang, vllm
from eplb_rs.integrations.offline import write_map
from eplb_rs.integrations.planning import EnginePlanner
from eplb_rs.integrations.settings import VARIABLES, EngineSettings
from eplb_rs.integrations.tensorrt_llm import write_config
from eplb_rs.integrations.vllm_ascend import AscendPolicy
from hypothesis import given
from hypothesis import strategies as st


def test_nothing_is_chosen_by_default(monkeypatch):
    monkeypatch.delenv("EPLB_RS_POLICY", raising=False)
    assert EngineSettings.from_environment() is None
    vllm.register()
    sglang.register()
    assert not vllm.is_installed()
    assert not sglang.is_installed()


@pytest.mark.parametrize("plugin", [vllm, sglang])
def test_loud_without_the_engine(monkeypatch, caplog, plugin):
    monkeypatch.setenv("EPLB_RS_POLICY", "balanced")
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    monkeypatch.setitem(__import__("sys").modules, "sglang", None)
    with pytest.raises(RuntimeError, match="EPLB_RS_POLICY"):
        plugin.register()
    assert "asked for by EPLB_RS_POLICY" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("EPLB_RS_POLICY", "best", "unknown"),
        ("EPLB_RS_GROUP_RULE", "loose", "unknown"),
        ("EPLB_RS_MAX_MOVES", "1.5", "out_of_range"),
        ("EPLB_RS_MAX_MOVES", "few", "out_of_range"),
        ("EPLB_RS_MAX_MOVES", "nan", "out_of_range"),
        ("EPLB_RS_ITERATIONS", "0", "out_of_range"),
        ("EPLB_RS_ITERATIONS", "inf", "out_of_range"),
        ("EPLB_RS_ITERATIONS", "1e30", "out_of_range"),
        ("EPLB_RS_SHARES", "2.5", "out_of_range"),
        ("EPLB_RS_SHARES", "5000", "out_of_range"),
        ("EPLB_RS_MAXMOVES", "0.5", "unknown"),
    ],
)
def test_variables_are_checked(name, value, code):
    with pytest.raises(eplb_rs.InvalidInputError) as caught:
        EngineSettings.from_environment({"EPLB_RS_POLICY": "balanced"} | {name: value})
    assert caught.value.code == code
    assert name in str(caught.value)


def test_variables_without_the_one_that_chooses(caplog):
    assert EngineSettings.from_environment({"EPLB_RS_MAX_MOVES": "few"}) is None
    assert "EPLB_RS_MAX_MOVES: without EPLB_RS_POLICY of no effect" in caplog.text


def test_settings_of_the_environment():
    settings = EngineSettings.from_environment(
        {
            "EPLB_RS_POLICY": "balanced",
            "EPLB_RS_GROUP_RULE": "free",
            "EPLB_RS_MAX_MOVES": "0.25",
            "EPLB_RS_ITERATIONS": "50",
            "EPLB_RS_SHARES": "8",
        }
    )
    assert settings == EngineSettings("balanced", 0.25, "free", 50, 8)


def test_empty_variables_are_unset_ones():
    empty = dict.fromkeys(VARIABLES, "")
    assert EngineSettings.from_environment(empty) is None
    chosen = empty | {"EPLB_RS_POLICY": "deepseek"}
    assert EngineSettings.from_environment(chosen) == EngineSettings("deepseek")


@pytest.mark.parametrize("name", ["EPLB_RS_MAX_MOVES", "EPLB_RS_ITERATIONS"])
def test_a_limit_that_would_not_be_kept_is_refused(name):
    with pytest.raises(eplb_rs.InvalidInputError, match=name) as caught:
        EngineSettings.from_environment({"EPLB_RS_POLICY": "deepseek", name: "1"})
    assert caught.value.code == "inconsistent"


LAYERS, EXPERTS, RANKS, SLOTS = 4, 32, 8, 5
ENGINE = {"num_replicas": RANKS * SLOTS, "num_groups": 4, "num_nodes": 2, "num_ranks": RANKS}
TRIVIAL = np.tile(np.arange(RANKS * SLOTS) % EXPERTS, (LAYERS, 1))


def engine_planner(**settings):
    return EnginePlanner(EngineSettings(**settings), logging.getLogger("engine"))


def random_load(seed=0):
    return np.random.default_rng(seed).lognormal(0, 1, (LAYERS, EXPERTS))


def by_rank(placement):
    return np.reshape(placement, (LAYERS, RANKS, SLOTS))


def arrivals(before, after):
    """Slots whose expert was not on their rank."""
    stays = (by_rank(after)[..., :, None] == by_rank(before)[..., None, :]).any(axis=-1)
    return int((~stays).sum())


def keeps_groups(placement):
    node = np.arange(RANKS * SLOTS) // (RANKS * SLOTS // 2)
    group = np.asarray(placement) // (EXPERTS // 4)
    return all(len(set(node[row == g])) == 1 for row in group for g in range(4))


def test_a_placement_that_breaks_the_rule_for_groups_is_replaced(caplog):
    """As the one that engines start with, whatever the limit; once it is kept, the limit counts."""
    planner = engine_planner(max_moves=0.1)
    first = planner.plan(random_load(0), **ENGINE, previous=TRIVIAL)
    assert not keeps_groups(TRIVIAL)
    assert keeps_groups(first.phy2log)
    later = planner.plan(random_load(1), **ENGINE, previous=first.phy2log)
    assert keeps_groups(later.phy2log)
    assert 0 < arrivals(first.phy2log, later.phy2log) <= 0.1 * first.phy2log.size
    planner.plan(random_load(2), **ENGINE, previous=TRIVIAL)
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1, "once is enough"
    free = engine_planner(max_moves=0.1, group_rule="free")
    moved = free.plan(random_load(0), **ENGINE, previous=TRIVIAL)
    assert 0 < arrivals(TRIVIAL, moved.phy2log) <= 0.1 * first.phy2log.size


@pytest.mark.parametrize("policy", ["balanced", "deepseek"])
def test_groups_are_free_under_either_policy(policy):
    strict = engine_planner(policy=policy).plan(random_load(0), **ENGINE)
    free = engine_planner(policy=policy, group_rule="free").plan(random_load(0), **ENGINE)
    assert keeps_groups(strict.phy2log)
    assert not keeps_groups(free.phy2log)
    assert free.balance > strict.balance


def test_without_a_limit_it_is_nearly_as_even_as_from_scratch():
    planner = engine_planner(group_rule="free")
    placement = planner.plan(random_load(0), **ENGINE).phy2log
    for seed in range(1, 6):
        plan = planner.plan(random_load(seed), **ENGINE, previous=placement)
        scratch = planner.plan(random_load(seed), **ENGINE)
        assert plan.balance >= scratch.balance / 1.05
        placement = plan.phy2log


@given(st.integers(0, 2**31), st.booleans(), st.sampled_from(["strict", "free"]))
def test_experts_that_stay_keep_their_slots(seed, from_scratch, rule):
    """Also where the plan is made from scratch: half of the load has moved elsewhere."""
    planner = engine_planner(group_rule=rule)
    before = planner.plan(random_load(seed), **ENGINE).phy2log
    load = random_load(seed)[:, ::-1] if from_scratch else random_load(seed) * 1.5
    after = planner.plan(load.copy(), **ENGINE, previous=before).phy2log
    old, new = by_rank(before), by_rank(after)
    stays = (old[..., :, None] == new[..., None, :]).any(axis=-1)
    np.testing.assert_array_equal(new[stays], old[stays])
    for row in after:
        assert set(row.tolist()) == set(range(EXPERTS))


def test_ranks_that_join_are_filled():
    small = {"num_replicas": 7 * SLOTS, "num_groups": 1, "num_nodes": 1, "num_ranks": 7}
    planner = engine_planner(max_moves=0.0)
    before = planner.plan(random_load(), **small).phy2log
    joined = np.concatenate([before, np.full((LAYERS, SLOTS), -1)], axis=1)
    engine = ENGINE | {"num_groups": 1, "num_nodes": 1}
    plan = planner.plan(random_load(), **engine, previous=joined)
    np.testing.assert_array_equal(plan.phy2log[:, : 7 * SLOTS], before)
    assert (plan.phy2log >= 0).all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda held: held[:, :-SLOTS],  # fewer ranks than now
        lambda held: held[:-1],  # another number of layers
        lambda held: np.where(held == 3, 4, held),  # an expert without a slot
        lambda held: np.where(np.arange(held.shape[1]) == 2, -1, held),  # one empty slot
        lambda held: np.where(held == 3, EXPERTS, held),  # an expert that there is not
        lambda held: np.full_like(held, -1),
    ],
)
def test_what_cannot_be_built_upon_is_left_alone(spoil):
    planner = engine_planner(group_rule="free")
    plan = planner.plan(random_load(), **ENGINE, previous=spoil(TRIVIAL))
    assert plan == planner.plan(random_load(), **ENGINE)


def test_every_process_comes_to_the_same_plan():
    plans = []
    for _ in range(2):
        planner, placement = engine_planner(max_moves=0.2), TRIVIAL
        for seed in range(4):
            placement = planner.plan(random_load(seed), **ENGINE, previous=placement).phy2log
            plans.append(placement.tobytes())
    assert plans[:4] == plans[4:]


def test_no_load_moves_nothing():
    planner = engine_planner(group_rule="free")
    placement = planner.plan(random_load(), **ENGINE).phy2log
    idle = planner.plan(np.zeros((LAYERS, EXPERTS)), **ENGINE, previous=placement)
    np.testing.assert_array_equal(idle.phy2log, placement)


def test_a_refusal_falls_back_and_is_logged_once(caplog):
    planner = engine_planner()
    bad = random_load()
    bad[1, 2] = np.nan
    for _ in range(3):
        made = planner.or_theirs(lambda: planner.plan(bad, **ENGINE), lambda: "theirs")
        assert made == "theirs"
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "the engine's own policy" in errors[0].getMessage()
    assert "layer 1" in caplog.text


def test_other_faults_are_not_hidden():
    """One rank alone might have them, and would plan differently from the others."""

    def out_of_memory():
        raise MemoryError

    with pytest.raises(MemoryError):
        engine_planner().or_theirs(out_of_memory, lambda: "theirs")


def test_each_plan_has_a_line_in_the_log(caplog):
    caplog.set_level(logging.INFO)
    planner = engine_planner(group_rule="free")
    first = planner.plan(random_load(0), **ENGINE)
    second = planner.plan(random_load(1), **ENGINE, previous=first.phy2log)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        f"balance {first.balance:.4f}",
        f"balance {first.with_load(random_load(1)).balance:.4f} -> {second.balance:.4f}, "
        f"{arrivals(first.phy2log, second.phy2log)} experts move",
    ]


def test_ascend_policy():
    rng = np.random.default_rng(0)
    layers, ranks, slots, experts = 3, 8, 5, 32
    table = np.stack([np.r_[rng.permutation(experts), rng.permutation(experts)[:8]]] * layers)
    for row in table:  # no expert twice on an NPU
        by_rank = row.reshape(ranks, slots)
        for rank in range(ranks):
            while len(set(by_rank[rank])) < slots:
                row[experts:] = rng.permutation(experts)[:8]
    table = table.reshape(layers, ranks, slots)
    work = rng.lognormal(0, 1, table.shape)
    changed, priority, new = AscendPolicy().rebalance_experts(table, work)
    assert changed == 1
    assert sorted(priority) == [0, 1, 2]
    assert new.shape == table.shape
    for layer in range(layers):
        assert set(new[layer].ravel()) == set(range(experts))
        for old_row, new_row in zip(table[layer], new[layer], strict=True):
            assert len(set(new_row)) == slots
            for slot, expert in enumerate(old_row):
                if expert in new_row:
                    assert new_row[slot] == expert, "an expert that stays keeps its slot"
    load = np.zeros((layers, experts))
    for layer in range(layers):
        np.add.at(load[layer], table[layer].ravel(), work[layer].ravel())
    same = AscendPolicy().rebalance_experts(new, work_of(new, load))
    assert same[0] in (0, 1)


def work_of(table, load):
    counts = np.stack([np.bincount(layer.ravel()) for layer in table])
    flat = table.reshape(len(table), -1)
    return np.take_along_axis(load / counts, flat, axis=1).reshape(table.shape)


def ascend_table(seed=0):
    rng = np.random.default_rng(seed)
    table = np.stack([rng.permutation(EXPERTS) for _ in range(LAYERS)]).reshape(LAYERS, RANKS, -1)
    spare = (table[:, :, :1] + 0)[:, ::-1]  # that of another NPU
    return np.concatenate([table, spare], axis=2)


@pytest.mark.parametrize("max_moves", [None, 0.05, 0.5])
def test_ascend_never_holds_an_expert_twice(max_moves):
    policy = AscendPolicy(object(), settings=EngineSettings(max_moves=max_moves))
    table = ascend_table()
    for seed in range(5):
        work = np.random.default_rng(seed).lognormal(0, 1, table.shape)
        _, _, new = policy.rebalance_experts(table, work)
        assert all(len(set(npu)) == SLOTS for layer in new.tolist() for npu in layer)
        stays = (table[..., :, None] == new[..., None, :]).any(axis=-1)
        np.testing.assert_array_equal(new[stays], table[stays])
        table = new


def test_ascend_goes_on_where_no_plan_can_be(caplog):
    table = np.array([[[0, 1, 0], [1, 0, 1]]])  # three slots, two experts
    changed, priority, new = AscendPolicy().rebalance_experts(table, np.ones(table.shape))
    assert (changed, priority.tolist(), new.tolist()) == (0, [0], table.tolist())
    assert "experts twice on an NPU" in caplog.text
    with pytest.raises(eplb_rs.InvalidInputError, match="same shape"):
        AscendPolicy().rebalance_experts(table, np.ones((1, 2)))


def test_ascend_leaves_tables_with_empty_slots_alone(caplog):
    """Planned from scratch, experts that stay on their NPU would change slots."""
    table = np.array([[[0, 1, -1], [3, 2, 1]]])
    changed, _, new = AscendPolicy().rebalance_experts(table, np.ones(table.shape))
    assert (changed, new.tolist()) == (0, table.tolist())
    assert "an expert in every slot" in caplog.text


def a_plan():
    load = np.random.default_rng(0).lognormal(0, 1, (2, 6))
    return eplb_rs.Planner(eplb_rs.Topology(1, 4, 2)).plan(load, layer_ids=(1, 3))


def test_sglang_map(tmp_path):
    plan = a_plan()
    write_map(plan, tmp_path / "map.json")
    table = json.loads((tmp_path / "map.json").read_text())["physical_to_logical_map"]
    assert len(table) == 4
    assert table[1] == plan.phy2log[0].tolist()
    assert table[3] == plan.phy2log[1].tolist()
    assert table[0] == table[2] == [0, 1, 2, 3, 4, 5, 0, 1]


def test_tensorrt_llm_config(tmp_path):
    plan = a_plan()
    write_config(plan, tmp_path / "eplb.yaml")
    lines = (tmp_path / "eplb.yaml").read_text().splitlines()
    assert lines[:2] == ["num_slots: 8", "initial_global_assignments:"]
    assert lines[2] == f"  1: {plan.phy2log[0].tolist()}"
    assert lines[3] == f"  3: {plan.phy2log[1].tolist()}"
    assert lines[4] == "layer_updates_per_iter: 0"


def test_maps_of_layers_that_there_are(tmp_path):
    write_map(a_plan(), tmp_path / "map.json", num_layers=6)
    assert len(json.loads((tmp_path / "map.json").read_text())["physical_to_logical_map"]) == 6
    with pytest.raises(eplb_rs.InvalidInputError, match="at least 4"):
        write_map(a_plan(), tmp_path / "none.json", num_layers=3)
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize("write", [write_map, write_config])
def test_no_map_of_dead_ranks(tmp_path, write):
    topology = eplb_rs.Topology(1, 4, 2).with_dead([2])
    plan = eplb_rs.Planner(topology).plan(np.ones((1, 6)))
    with pytest.raises(eplb_rs.InvalidInputError, match=r"ranks \[2\] are dead"):
        write(plan, tmp_path / "map")
    assert not (tmp_path / "map").exists()
