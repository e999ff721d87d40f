"""What is refused as a plan: placements from elsewhere, and text."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eplb_rs import InvalidInputError, Plan, Planner, Topology
from refusals import LOAD, TOPOLOGY, RaisingArray, refused

# Plans of placements from elsewhere

PHY2LOG = [[0, 1, 2, 3, 0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("arguments", "code", "argument"),
    [
        ({"topology": (2, 2, 2)}, "wrong_type", "topology"),
        ({"topology": None}, "wrong_type", "topology"),
        ({"phy2log": [[0, 1, 2, 3, 0, 1, 2, 4]] * 2}, "out_of_range", "phy2log"),
        ({"phy2log": [[0, 1, 2, 3, 0, 1, 2, -1]] * 2}, "out_of_range", "phy2log"),
        ({"phy2log": [[0, 1, 2, 3, 0, 1, 2, 2**62]] * 2}, "out_of_range", "phy2log"),
        ({"phy2log": np.full((2, 8), 2**64 - 1, dtype=np.uint64)}, "out_of_range", "phy2log"),
        ({"phy2log": [[0, 1, 2, 2, 0, 1, 2, 2]] * 2}, "too_small", "logcnt"),
        ({"phy2log": PHY2LOG[:1]}, "wrong_shape", "phy2log"),
        ({"phy2log": PHY2LOG[0]}, "wrong_shape", "phy2log"),
        ({"phy2log": [[0, 1], [2]]}, "ragged", "phy2log"),
        ({"phy2log": np.array(PHY2LOG, dtype=float)}, "wrong_dtype", "phy2log"),
        ({"phy2log": "0123"}, "wrong_dtype", "phy2log"),
        ({"phy2log": None}, "wrong_dtype", "phy2log"),
        ({"phy2log": RaisingArray(RuntimeError())}, "wrong_type", "phy2log"),
        ({"phy2log": np.ma.masked_equal(PHY2LOG, 0)}, "masked", "phy2log"),
        ({"load": -LOAD}, "negative", "load"),
        ({"load": LOAD[0]}, "wrong_shape", "load"),
        ({"load": LOAD[:, :3]}, "out_of_range", "phy2log"),
        ({"num_groups": 0}, "not_positive", "num_groups"),
        ({"num_groups": "1"}, "not_integer", "num_groups"),
        ({"num_groups": 3}, "not_divisor", "num_groups"),
        ({"policy": 3}, "wrong_type", "policy"),
        ({"layer_ids": [1]}, "wrong_shape", "layer_ids"),
        ({"layer_ids": [1, 2, 3]}, "wrong_shape", "layer_ids"),
        ({"layer_ids": [1.5, 2]}, "not_integer", "layer_ids"),
        ({"layer_ids": [float("inf"), 2]}, "not_integer", "layer_ids"),
        ({"layer_ids": "12"}, "not_integer", "layer_ids"),
        ({"layer_ids": 7}, "wrong_type", "layer_ids"),
        ({"layer_ids": [1, None]}, "not_integer", "layer_ids"),
        ({"layer_ids": [-1, 2]}, "negative", "layer_ids"),
        ({"layer_ids": [2, 2]}, "repeated", "layer_ids"),
    ],
)
def test_placements_that_are_none(arguments: dict[str, Any], code: str, argument: str) -> None:
    sound = {"topology": TOPOLOGY, "phy2log": PHY2LOG, "load": LOAD}
    Plan.from_phy2log(**sound)  # type: ignore[arg-type]
    refused(lambda: Plan.from_phy2log(**{**sound, **arguments}), code, argument)


def test_layer_ids_of_planned_plans_are_checked_too() -> None:
    planner = Planner(TOPOLOGY)
    assert planner.plan(LOAD, layer_ids=np.array([3, 9])).layer_ids == (3, 9)  # type: ignore[arg-type]
    assert planner.plan(LOAD, layer_ids=range(5, 7)).layer_ids == (5, 6)
    refused(lambda: planner.plan(LOAD, layer_ids=[1]), "wrong_shape", "layer_ids", "2")


def test_a_placement_in_a_tensor_works() -> None:
    torch = pytest.importorskip("torch")
    plan = Plan.from_phy2log(TOPOLOGY, torch.tensor(PHY2LOG), torch.tensor(LOAD))
    assert plan.phy2log.tolist() == PHY2LOG


@pytest.mark.parametrize(
    ("load", "code"),
    [(LOAD[:1], "wrong_shape"), (LOAD[:, :3], "wrong_shape"), (-LOAD, "negative"), ("x", None)],
)
def test_another_load_that_does_not_fit(load: Any, code: str | None) -> None:
    plan = Planner(TOPOLOGY).plan(LOAD)
    refused(lambda: plan.with_load(load), code or "wrong_type", "load")


# Plans from text


def changed(**fields: Any) -> str:
    sound = json.loads(Planner(TOPOLOGY, 2).plan(LOAD).to_json())
    for name, value in fields.items():
        if value is ...:
            del sound[name]
        else:
            sound[name] = value
    return json.dumps(sound)


SLOTS = json.loads(changed())["log2phy"]


@pytest.mark.parametrize(
    ("text", "code", "argument"),
    [
        ("", "not_json", "plan"),
        ("{", "not_json", "plan"),
        (changed()[:-20], "not_json", "plan"),
        ("[" * 100_000, "not_json", "plan"),
        ("\0", "not_json", "plan"),
        ("1" * 10_000, "not_json", "plan"),
        ("null", "wrong_format", "plan"),
        ("[]", "wrong_format", "plan"),
        ("{}", "wrong_format", "plan"),
        ('{"format": "eplb-rs plan"}', "wrong_format", "plan"),
        (changed(format="other"), "wrong_format", "plan"),
        (changed(version=2), "wrong_format", "plan"),
        (changed(version=None), "wrong_format", "plan"),
        *(
            (changed(**{name: ...}), "wrong_format", "plan")
            for name in json.loads(changed())
            if name != "group_rule"  # older plans have none
        ),
        (changed(group_rule="loose"), "wrong_format", "plan"),
        (changed(group_rule=[]), "wrong_format", "plan"),
        (changed(topology=[2, 2, 2]), "wrong_format", "plan"),
        (changed(topology={"num_nodes": 2}), "wrong_format", "plan"),
        (
            changed(topology={"num_nodes": 0, "gpus_per_node": 1, "slots_per_gpu": 1}),
            "not_positive",
            "num_nodes",
        ),
        (
            changed(topology={"num_nodes": 10**30, "gpus_per_node": 1, "slots_per_gpu": 1}),
            "too_large",
            "num_nodes",
        ),
        (changed(phy2log=[[0]]), "wrong_shape", "phy2log"),
        (changed(phy2log=None), "wrong_dtype", "phy2log"),
        (changed(phy2log=[[3] * 8] * 2), "inconsistent", "log2phy"),
        (changed(log2phy=None), "wrong_format", "plan"),
        (changed(log2phy=[]), "wrong_shape", "log2phy"),
        (changed(log2phy=SLOTS[:1]), "wrong_shape", "log2phy"),
        (changed(log2phy=[SLOTS[0], SLOTS[1][:3]]), "wrong_shape", "log2phy"),
        (
            changed(log2phy=[[*SLOTS[0][:3], [0.5, *SLOTS[0][3][1:]]], SLOTS[1]]),
            "wrong_format",
            "plan",
        ),
        (
            changed(log2phy=[[*SLOTS[0][:3], ["1", *SLOTS[0][3][1:]]], SLOTS[1]]),
            "wrong_format",
            "plan",
        ),
        (
            changed(log2phy=[[*SLOTS[0][:3], [10**30, *SLOTS[0][3][1:]]], SLOTS[1]]),
            "wrong_format",
            "plan",
        ),
        (changed(log2phy=[[*SLOTS[0][:3], [0] * 9], SLOTS[1]]), "inconsistent", "log2phy"),
        (changed(log2phy=[[*SLOTS[0][:3], []], SLOTS[1]]), "inconsistent", "log2phy"),
        (changed(expert_load=[[1, 2, 3, float("nan")]] * 2), "not_finite", "expert_load"),
        (changed(expert_load=[[1, 2, 3, -1]] * 2), "negative", "expert_load"),
        (changed(expert_load=[[1, 2, 3]] * 2), "wrong_shape", "log2phy"),
        (changed(expert_load="many"), "wrong_type", "expert_load"),
        (changed(num_groups=0), "not_positive", "num_groups"),
        (changed(num_groups="2"), "not_integer", "num_groups"),
        (changed(num_groups=2.5), "not_integer", "num_groups"),
        (changed(policy=None), "wrong_type", "policy"),
        (changed(layer_ids=[0]), "wrong_shape", "layer_ids"),
        (changed(layer_ids=[0, float("inf")]), "not_integer", "layer_ids"),
        (None, "wrong_type", "text"),
        (17, "wrong_type", "text"),
    ],
)
def test_text_that_is_no_plan(text: Any, code: str, argument: str) -> None:
    refused(lambda: Plan.from_json(text), code, argument)


def test_a_short_text_cannot_ask_for_much_memory() -> None:
    """One long row would make all others as long."""
    num_experts = 60_000
    rows = [[0] * num_experts, *([0] for _ in range(num_experts - 1))]
    text = changed(log2phy=[rows], expert_load=[[1] * num_experts])
    with pytest.raises(InvalidInputError):
        Plan.from_json(text)


def test_time_and_messages_stay_short_where_an_expert_has_very_many_replicas() -> None:
    num_slots = 2**18
    plan = Planner(Topology(1, 1, num_slots)).plan([[4, 3, 2, 1]])
    start = time.monotonic()
    assert plan.duplicates == num_slots - 4
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    fields = json.loads(text)
    fields["log2phy"][0][0][-1] = fields["log2phy"][0][0][0]
    refused(lambda: Plan.from_json(json.dumps(fields)), "inconsistent", "log2phy")
    assert time.monotonic() - start < 10, "it takes a second; quadratic time would be a minute"


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    missing = tmp_path / "missing.json"
    refused(lambda: Plan.load(missing), "missing_file", "plan", "missing.json")
    refused(lambda: Plan.load(tmp_path), "unreadable_file", "plan")
    (tmp_path / "binary").write_bytes(b"\x80\x81")
    refused(lambda: Plan.load(tmp_path / "binary"), "unreadable_file", "plan")
    (tmp_path / "empty").write_bytes(b"")
    refused(lambda: Plan.load(tmp_path / "empty"), "not_json", "plan")
    refused(lambda: Plan.load("a\0b"), "unreadable_file", "plan", "'a\\x00b'")
    refused(lambda: Plan.load(None), "wrong_type", "path")  # type: ignore[arg-type]


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    plan = Planner(TOPOLOGY).plan(np.ones((1, 8)))
    for path in (tmp_path, tmp_path / "none" / "plan.json", "a\0b"):
        refused(lambda path=path: plan.save(path), "unwritable_file", "path")  # type: ignore[misc]
    refused(lambda: plan.save(None), "wrong_type", "path")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
