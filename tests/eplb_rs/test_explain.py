"""`explain`: what binds in each layer, and what would help."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import eplb_rs
import numpy as np
import pytest
from eplb_rs import InvalidInputError, Planner, Topology, cli, explain
from eplb_rs.explanation import BINDINGS
from eplb_rs.loads import read_loads
from recordings import DEEPSEEK_R1

if TYPE_CHECKING:
    from pathlib import Path


def only(topology: Topology, load: list[float], groups: int = 1) -> eplb_rs.Explanation:
    return explain(Planner(topology, groups, "balanced").plan([load]))


def test_each_constraint_is_named() -> None:
    even = only(Topology(1, 4, 2), [1.0] * 8)
    assert (even.layers[0].binding, even.mends, even.gap) == ("nothing", (), 0.0)

    hot = only(Topology(1, 4, 2), [90, 1, 1, 1, 1, 1])
    layer = hot.layers[0]
    assert (layer.binding, layer.expert, layer.copies) == ("hot_expert", 0, 3)
    # Four copies of 22.5 are below the mean of 23.75: one slot is missing.
    assert layer.slots_missing == 1
    assert "one more slot" in hot.mends[0].change
    assert hot.mends[0].balance > hot.balance

    few = only(Topology(1, 4, 2), [6, 6, 6, 6, 6, 1, 1, 1])
    assert few.layers[0].binding == "few_slots"
    assert few.layers[0].bound > few.layers[0].mean

    groups = only(Topology(2, 1, 4), [9, 9, 9, 9, 1, 1, 1, 1], 2)
    assert groups.layers[0].binding == "groups"
    assert any("free" in mend.change for mend in groups.mends)

    slow = only(Topology(1, 2, 4, slots=[1, 7], speeds=[9, 1]), [1.0] * 8)
    assert slow.layers[0].binding == "slow_rank"
    assert any("equal speed" in mend.change for mend in slow.mends)


def test_a_poor_plan_is_the_fault_of_the_search() -> None:
    load = np.random.default_rng(0).lognormal(0, 1, (3, 64)) * 1000
    plan = Planner(Topology(1, 8, 9), policy="trivial").plan(load)
    explanation = explain(plan)
    assert {layer.binding for layer in explanation.layers} == {"search"}
    assert explanation.mends[0].change.startswith("the balanced policy")
    assert explanation.mends[0].balance > explanation.balance
    assert explain(plan, mend=False).mends == ()


def test_figures_are_plain_and_add_up() -> None:
    load = read_loads(DEEPSEEK_R1).total
    plan = Planner(Topology(4, 8, 9), 8, "balanced").plan(load, layer_ids=range(3, 61))
    explanation = explain(plan)
    figures = json.loads(json.dumps(explanation.figures(), allow_nan=False))
    assert (figures["format"], figures["version"]) == ("eplb-rs explanation", 1)
    assert [layer["layer"] for layer in figures["layers"]] == list(range(3, 61))
    assert {layer["binding"] for layer in figures["layers"]} <= set(BINDINGS)
    assert sum(layer["binding"] == "groups" for layer in figures["layers"]) >= 40
    assert explanation.balance <= explanation.best_balance
    assert explanation.best_balance == pytest.approx(0.7996, abs=1e-4)
    free = next(mend for mend in explanation.mends if "free" in mend.change)
    assert free.balance >= 0.999
    text = explanation.text(top=2)
    assert "groups of experts have to stay" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_command_prints_text_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    Planner(Topology(1, 4, 2), policy="balanced").plan([[90, 1, 1, 1, 1, 1]]).save(path)
    assert cli.main(["explain", str(path)]) == 0
    text = capsys.readouterr().out
    assert "expert 0, 3 copies; 1 slot is missing" in text
    assert "what would help" in text
    assert cli.main(["explain", str(path), "--json", "--no-mends"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["layers"][0]["binding"], figures["mends"]) == ("hot_expert", [])
    assert cli.main(["explain", str(tmp_path / "none.json")]) == 2
    assert "PLAN" in capsys.readouterr().err


def test_what_cannot_be_explained_is_refused() -> None:
    plan = Planner(Topology(1, 2, 2)).plan([[1, 2]])
    for call, argument in (
        (lambda: explain("plan"), "plan"),  # type: ignore[arg-type]
        (lambda: explain(plan, tolerance=1.5), "tolerance"),
        (lambda: explain(plan, tolerance="low"), "tolerance"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidInputError) as caught:
            call()
        assert caught.value.argument == argument


def test_layers_without_load_are_even() -> None:
    explanation = explain(Planner(Topology(1, 2, 2), policy="balanced").plan([[0.0, 0.0, 0.0]]))
    assert (explanation.balance, explanation.best_balance, explanation.gap) == (1.0, 1.0, 0.0)
    assert explanation.layers[0].binding == "nothing"
