"""What the plug-ins do where no engine is installed, and the files that engines read."""

import json

import eplb_rs
import numpy as np
import pytest
from eplb_rs.integrations import sglang, vllm
from eplb_rs.integrations.files import write_sglang_map, write_tensorrt_llm_config
from eplb_rs.integrations.settings import EngineSettings
from eplb_rs.integrations.vllm_ascend import AscendPolicy


def test_nothing_is_chosen_by_default(monkeypatch):
    monkeypatch.delenv("EPLB_RS_POLICY", raising=False)
    assert EngineSettings.from_environment() is None
    vllm.register()
    sglang.register()
    assert not vllm.is_installed()
    assert not sglang.is_installed()


@pytest.mark.parametrize("plugin", [vllm, sglang])
def test_loud_without_the_engine(monkeypatch, plugin):
    pytest.importorskip("numpy")
    monkeypatch.setenv("EPLB_RS_POLICY", "balanced")
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    monkeypatch.setitem(__import__("sys").modules, "sglang", None)
    with pytest.raises(RuntimeError, match="EPLB_RS_POLICY"):
        plugin.register()


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
        ("EPLB_RS_SHARES", "2.5", "out_of_range"),
    ],
)
def test_variables_are_checked(name, value, code):
    with pytest.raises(eplb_rs.InvalidInputError) as caught:
        EngineSettings.from_environment({"EPLB_RS_POLICY": "balanced"} | {name: value})
    assert caught.value.code == code
    assert caught.value.argument == name


def test_settings_of_the_environment():
    settings = EngineSettings.from_environment(
        {
            "EPLB_RS_POLICY": "deepseek",
            "EPLB_RS_GROUP_RULE": "free",
            "EPLB_RS_MAX_MOVES": "0.25",
            "EPLB_RS_ITERATIONS": "50",
            "EPLB_RS_SHARES": "8",
        }
    )
    assert settings == EngineSettings("deepseek", 0.25, "free", 50, 8)


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


def a_plan():
    load = np.random.default_rng(0).lognormal(0, 1, (2, 6))
    return eplb_rs.Planner(eplb_rs.Topology(1, 4, 2)).plan(load, layer_ids=(1, 3))


def test_sglang_map(tmp_path):
    plan = a_plan()
    write_sglang_map(plan, tmp_path / "map.json")
    table = json.loads((tmp_path / "map.json").read_text())["physical_to_logical_map"]
    assert len(table) == 4
    assert table[1] == plan.phy2log[0].tolist()
    assert table[3] == plan.phy2log[1].tolist()
    assert table[0] == table[2] == [0, 1, 2, 3, 4, 5, 0, 1]


def test_tensorrt_llm_config(tmp_path):
    plan = a_plan()
    write_tensorrt_llm_config(plan, tmp_path / "eplb.yaml")
    lines = (tmp_path / "eplb.yaml").read_text().splitlines()
    assert lines[:2] == ["num_slots: 8", "initial_global_assignments:"]
    assert lines[2] == f"  1: {plan.phy2log[0].tolist()}"
    assert lines[3] == f"  3: {plan.phy2log[1].tolist()}"
    assert lines[4] == "layer_updates_per_iter: 0"
