"""Counts, machines and settings that are refused, and those of other types that are not."""

import copy
import itertools
import operator
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import eplb_rs
import numpy as np
import pytest
from eplb_rs import InvalidInputError, PlanError, Planner, Topology
from refusals import LOAD, TOPOLOGY, assert_planned, rebalance, refused

COUNTS = ("num_replicas", "num_groups", "num_nodes", "num_gpus")


class Index:
    """An integer of another library."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


class Spiteful:
    """Raises whatever it is asked."""

    def __index__(self) -> int:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __float__(self) -> float:
        raise RuntimeError("no")


@pytest.mark.parametrize("argument", COUNTS)
@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0, "not_positive"),
        (-1, "not_positive"),
        (-(10**30), "not_positive"),
        (10**30, "too_large"),
        (2**64, "too_large"),
        (10**5000, "too_large"),
        (True, "not_integer"),
        (np.True_, "not_integer"),
        (8.0, "not_integer"),
        (np.float64(8), "not_integer"),
        (float("nan"), "not_integer"),
        ("8", "not_integer"),
        (b"8", "not_integer"),
        (None, "not_integer"),
        ([8], "not_integer"),
        (np.array([8, 8]), "not_integer"),
        (8j, "not_integer"),
        (Decimal(8), "not_integer"),
        (Fraction(8), "not_integer"),
        (int, "not_integer"),
        (object(), "not_integer"),
        (Spiteful(), "not_integer"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_a_count_that_is_none(argument: str, value: Any, code: str) -> None:
    refused(lambda: rebalance(**{argument: value}), code, argument)


@pytest.mark.parametrize("number", [2**20 + 8, 2**31, 2**32, 2**53, 2**63, 2**64 - 8])
def test_sizes_beyond_any_machine(number: int) -> None:
    refused(lambda: rebalance(num_replicas=number), "too_large", "num_replicas", str(number))
    refused(lambda: Topology(1, 1, number), "too_large", "slots_per_gpu", "at most 1048576")
    with pytest.raises(InvalidInputError):
        Topology(number, number, number)
    with pytest.raises(InvalidInputError):
        rebalance(num_groups=number)
    with pytest.raises(InvalidInputError):
        rebalance(num_nodes=number, num_gpus=number)


@pytest.mark.parametrize(
    "kind", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
)
def test_counts_of_other_integer_types_work(kind: Callable[[int], object]) -> None:
    assert_planned(rebalance(LOAD, *(kind(count) for count in (8, 2, 2, 4))))
    assert_planned(rebalance(LOAD, *(Index(count) for count in (8, 2, 2, 4))))
    assert_planned(rebalance(LOAD, *(np.array(count) for count in (8, 2, 2, 4))))


def test_counts_that_are_tensors_work() -> None:
    torch = pytest.importorskip("torch")
    assert_planned(rebalance(LOAD, *(torch.tensor(count) for count in (8, 2, 2, 4))))


@pytest.mark.parametrize(
    ("counts", "code", "argument", "parts"),
    [
        ({"num_replicas": 10}, "not_multiple", "num_replicas", ["`num_gpus` (4)", "8, 12"]),
        ({"num_replicas": 3}, "not_multiple", "num_replicas", ["`num_gpus` (4)", "nearest: 4"]),
        ({"num_nodes": 3}, "not_multiple", "num_gpus", ["(4)", "`num_nodes` (3)", "3, 6"]),
        ({"num_nodes": 8}, "not_multiple", "num_gpus", ["`num_nodes` (8)", "nearest: 8"]),
        (
            {"num_replicas": 2, "num_gpus": 2},
            "too_small",
            "num_replicas",
            ["(2)", "number of experts (4)", "4"],
        ),
        ({"num_groups": 3}, "not_divisor", "num_groups", ["(3)", "experts (4)", "nearest: 2, 4"]),
        ({"num_groups": 8}, "not_divisor", "num_groups", ["(8)", "experts (4)", "nearest: 4"]),
    ],
)
def test_counts_that_do_not_fit(
    counts: dict[str, int], code: str, argument: str, parts: list[str]
) -> None:
    refused(lambda: rebalance(**counts), code, argument, *parts)


def test_too_few_slots_names_a_number_that_would_do() -> None:
    load = np.ones((1, 13))
    error = refused(
        lambda: eplb_rs.rebalance_experts(load, 8, 1, 1, 4), "too_small", "num_replicas"
    )
    assert "16" in error.hint
    eplb_rs.rebalance_experts(load, 16, 1, 1, 4)


@pytest.mark.parametrize("argument", ["num_nodes", "gpus_per_node", "slots_per_gpu"])
@pytest.mark.parametrize(
    ("value", "code"),
    [(0, "not_positive"), (-3, "not_positive"), (1.5, "not_integer"), (10**30, "too_large")],
)
def test_topologies_refuse_what_is_no_count(argument: str, value: Any, code: str) -> None:
    counts = {"num_nodes": 1, "gpus_per_node": 1, "slots_per_gpu": 1, argument: value}
    refused(lambda: Topology(**counts), code, argument)


@pytest.mark.parametrize(
    ("argument", "value", "code"),
    [
        ("dead", [-1], "negative"),
        ("dead", [8], "out_of_range"),
        ("dead", 3, "wrong_type"),
        ("dead", "3", "not_integer"),
        ("dead", [1.0], "not_integer"),
        ("dead", [False, True] * 4, "not_integer"),  # a mask is no list of numbers
        ("dead", range(8), "too_small"),
        ("slots", [2] * 7, "wrong_shape"),
        ("slots", [2] * 7 + [-1], "not_positive"),
        ("slots", [2.0] * 8, "not_integer"),
        ("slots", [2**62] * 8, "too_large"),
        ("slots", itertools.repeat(2), "wrong_shape"),
        ("speeds", ["fast"] * 8, "wrong_type"),
        ("speeds", 1.0, "wrong_type"),
        ("speeds", [1.0] * 7 + [np.nan], "out_of_range"),
        ("speeds", [1.0] * 7 + [2000.0], "out_of_range"),
    ],
)
def test_topologies_refuse_what_does_not_describe_gpus(
    argument: str, value: Any, code: str
) -> None:
    change = getattr(Topology(2, 4, 2), f"with_{argument}")
    error = refused(lambda: change(value), code, argument)
    assert len(str(error)) < 200
    if not isinstance(value, itertools.repeat):
        refused(lambda: Topology(2, 4, 2, **{argument: value}), code, argument)


def test_gpus_may_be_listed_in_any_way() -> None:
    for dead in ([1, 3], (3, 1), {1, 3}, np.array([3, 1, 3]), range(1, 4, 2)):
        topology = TOPOLOGY.with_dead(dead)  # type: ignore[arg-type]
        assert topology.dead == [1, 3]
    assert topology.with_dead([]) == TOPOLOGY
    assert TOPOLOGY.with_slots(np.full(4, 2)) == TOPOLOGY  # type: ignore[arg-type]


def test_sizes_that_no_table_can_be_made_for() -> None:
    topology = Topology.from_totals(num_replicas=2**20, num_nodes=1, num_gpus=2**20)
    load = np.ones((1, 10**6), dtype=np.float32)
    refused(lambda: Planner(topology).plan(load), "too_large", "topology", "1000000", "1048576")
    uneven = Topology(1, 2**10, 1).with_slots([2**20 - 2**10 + 1] + [1] * (2**10 - 1))
    refused(lambda: Planner(uneven).plan([[1, 2]]), "too_large", "topology")


@pytest.mark.parametrize(
    ("arguments", "code", "argument"),
    [
        ({"topology": (2, 2, 2)}, "wrong_type", "topology"),
        ({"topology": None}, "wrong_type", "topology"),
        ({"num_groups": 0}, "not_positive", "num_groups"),
        ({"num_groups": "2"}, "not_integer", "num_groups"),
        ({"threads": 0}, "not_positive", "threads"),
        ({"threads": 257}, "too_large", "threads"),
        ({"threads": 2**40}, "too_large", "threads"),
        ({"threads": 1.0}, "not_integer", "threads"),
        ({"policy": "greedy"}, "unknown", "policy"),
        ({"policy": "DeepSeek"}, "unknown", "policy"),
        ({"policy": ""}, "unknown", "policy"),
        ({"policy": "\ud800"}, "unknown", "policy"),
        ({"policy": "deepseek\0"}, "unknown", "policy"),
        ({"policy": None}, "wrong_type", "policy"),
        ({"policy": 1}, "wrong_type", "policy"),
        ({"policy": b"deepseek"}, "wrong_type", "policy"),
        ({"release_gil": "no"}, "wrong_type", "release_gil"),
        ({"release_gil": np.array([1, 2])}, "wrong_type", "release_gil"),
    ],
)
def test_planners_refuse(arguments: dict[str, Any], code: str, argument: str) -> None:
    refused(lambda: Planner(**{"topology": TOPOLOGY, **arguments}), code, argument)


def test_an_unknown_policy_is_told_the_known() -> None:
    refused(
        lambda: Planner(TOPOLOGY, policy="greedy"),  # type: ignore[arg-type]
        "unknown",
        "policy",
        "greedy",
        "deepseek",
        "trivial",
    )


def test_errors_say_what_they_are() -> None:
    error = refused(lambda: rebalance(num_replicas=10), "not_multiple", "num_replicas")
    assert isinstance(error, ValueError)
    assert isinstance(error, PlanError)
    assert (error.got, error.expected) == ("10", "a multiple of `num_gpus` (4)")
    assert error.hint == "nearest: 8, 12"
    again = copy.deepcopy(error)
    parts = operator.attrgetter("code", "argument", "got", "expected", "hint")
    assert type(again) is type(error)
    assert parts(again) == parts(error)


def test_a_wrong_number_of_arguments_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        eplb_rs.rebalance_experts(LOAD, 8)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        Topology(1)  # type: ignore[call-arg]
