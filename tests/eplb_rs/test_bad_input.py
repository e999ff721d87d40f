"""Bad input is refused with a typed error that names the argument, and nothing is changed by it."""

import copy
import itertools
import json
import operator
import pickle
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import eplb_rs
import numpy as np
import numpy.typing as npt
import pytest
from eplb_rs import InvalidInputError, Plan, PlanBuffers, PlanError, Planner, Topology

LOAD = np.arange(1.0, 9.0, dtype=np.float32).reshape(2, 4)
TOPOLOGY = Topology(2, 2, 2)


def rebalance(
    weight: Any = LOAD,
    num_replicas: Any = 8,
    num_groups: Any = 2,
    num_nodes: Any = 2,
    num_gpus: Any = 4,
) -> Any:
    return eplb_rs.rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus)


WANTED = rebalance()


def assert_planned(got: Any) -> None:
    for one, other in zip(got, WANTED, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def refused(call: Callable[[], object], code: str, argument: str, *parts: str) -> PlanError:
    """The refusal of a call, which has to have the code, argument and parts of a message."""
    with pytest.raises(InvalidInputError) as caught:
        call()
    error = caught.value
    assert (error.code, error.argument) == (code, argument), str(error)
    message = str(error)
    assert message.startswith(f"`{argument}` ({error.got}) must be {error.expected}")
    assert message.endswith(error.hint)
    for part in parts:
        assert part in message
    assert len(message) < 1000, "a message is to be read"
    assert str(pickle.loads(pickle.dumps(error))) == message
    return error


# Numbers

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


# The values of loads


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble])
@pytest.mark.parametrize(
    ("value", "code", "shown"),
    [
        (np.nan, "not_finite", "NaN at layer 1, expert 2"),
        (np.inf, "not_finite", "inf at layer 1, expert 2"),
        (-np.inf, "not_finite", "-inf at layer 1, expert 2"),
        (-1.0, "negative", "-1 at layer 1, expert 2"),
    ],
)
def test_values_that_are_no_load(kind: Any, value: float, code: str, shown: str) -> None:
    load = LOAD.astype(kind)
    load[1, 2] = value
    before = load.copy()
    refused(lambda: rebalance(load), code, "weight", shown)
    refused(lambda: Planner(TOPOLOGY).plan(load), code, "load", shown)
    np.testing.assert_array_equal(load, before)


def test_negative_integers() -> None:
    load = LOAD.astype(np.int64)
    load[0, 1] = -5
    refused(lambda: rebalance(load), "negative", "weight", "-5 at layer 0, expert 1")
    refused(lambda: rebalance(load.tolist()), "negative", "weight", "-5 at layer 0, expert 1")


@pytest.mark.parametrize("value", [1e39, 1e300, np.finfo(np.longdouble).max])
def test_values_beyond_float32(value: Any) -> None:
    load = LOAD.astype(np.longdouble)
    load[1, 3] = value
    refused(lambda: rebalance(load), "not_finite", "weight", "layer 1, expert 3")


def test_sums_beyond_float32() -> None:
    load = np.full((2, 4), 1e38, dtype=np.float32)
    refused(lambda: rebalance(load), "too_large", "weight", "layer 0", "scale the loads down")
    rebalance(load / 8)


def test_the_settings_of_numpy_change_nothing() -> None:
    load = LOAD.astype(np.float64)
    with np.errstate(all="raise"):
        assert_planned(rebalance(load))
        load[0, 0] = 1e-300
        rebalance(load)
        load[0, 0] = 1e300
        refused(lambda: rebalance(load), "not_finite", "weight")
        assert Planner(TOPOLOGY).plan(np.zeros((2, 4))).balance == 1.0


# The form of loads


@pytest.mark.parametrize(
    ("load", "code", "parts"),
    [
        (5, "wrong_shape", ["0 dimensions"]),
        (np.float32(5), "wrong_shape", ["0 dimensions"]),
        ([1, 2, 3, 4], "wrong_shape", ["1 dimensions", "load[None, :]"]),
        (np.ones((3, 2, 4)), "wrong_shape", ["3 dimensions", "load.sum(0)"]),
        (np.ones((1,) * 64), "wrong_shape", ["64 dimensions"]),
        (np.ones((0, 4)), "empty", ["(0, 4)"]),
        (np.ones((4, 0)), "empty", ["(4, 0)"]),
        ([[]], "empty", ["(1, 0)"]),
        ([], "wrong_shape", ["1 dimensions"]),
        ([[1, 2], [3]], "ragged", []),
        ([[1, 2], 3], "ragged", []),
        ([[1, [2]], [3, 4]], "ragged", []),
        (np.array([[1, 2], [3, 4]], dtype=object), "wrong_dtype", ["dtype object"]),
        ([[2**64, 1]], "wrong_dtype", ["64 bits"]),
        ([[None, 1]], "wrong_dtype", ["dtype object"]),
        ([[Decimal(1), Decimal(2)]], "wrong_dtype", ["dtype object"]),
        ([["1", "2"]], "wrong_dtype", ["<U1"]),
        ([[b"1", b"2"]], "wrong_dtype", ["S1"]),
        ([[True, False]], "wrong_dtype", ["dtype bool"]),
        ([[1j, 2]], "wrong_dtype", ["complex"]),
        (np.ones((2, 4), dtype="M8[s]"), "wrong_dtype", ["datetime64"]),
        (np.ones((2, 4), dtype="m8[s]"), "wrong_dtype", ["timedelta64"]),
        (np.ones((2, 4), dtype="V4"), "wrong_dtype", ["V4"]),
        (np.ones((2, 4), dtype=[("a", "f4")]), "wrong_dtype", ["'a'"]),
        (np.ones((2, 4), dtype="S3"), "wrong_dtype", ["S3"]),
        ("[[1, 2]]", "wrong_type", ["str"]),
        (b"[[1, 2]]", "wrong_type", ["bytes"]),
        (None, "wrong_type", ["NoneType"]),
        ({"a": 1}, "wrong_type", ["dict"]),
        ({1, 2}, "wrong_type", ["set"]),
        (object(), "wrong_type", ["object"]),
        ((row for row in [[1, 2]]), "wrong_type", ["generator"]),
        (np.ndarray, "wrong_type", ["type"]),
        (np.ma.masked_greater(LOAD, 3), "masked", ["load.filled(0)"]),
        (np.broadcast_to(np.float32(1), (4, 0)), "empty", []),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_forms_that_are_no_load(load: Any, code: str, parts: list[str]) -> None:
    refused(lambda: rebalance(load), code, "weight", *parts)
    refused(lambda: Planner(TOPOLOGY).plan(load), code, "load", *parts)


class Deep(list[Any]):
    """A list that holds itself."""

    def __init__(self) -> None:
        super().__init__()
        self.append(self)


class RaisingArray:
    """Has NumPy's protocol, but not the values."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        raise self.error


class OddArray:
    """Has NumPy's protocol, and returns what it was made with."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.value


@pytest.mark.parametrize(
    "load",
    [
        Deep(),
        RaisingArray(RuntimeError("gone")),
        RaisingArray(RuntimeError()),
        RaisingArray(MemoryError()),
        RaisingArray(KeyError("x")),
        OddArray("text"),
        OddArray(None),
        OddArray(LOAD.astype(object)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_that_are_no_array(load: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        rebalance(load)
    assert caught.value.argument == "weight"


class Subclass(np.ndarray[Any, np.dtype[Any]]):
    """An array whose operators do not do what an array's do."""

    def __getitem__(self, key: Any) -> Any:
        raise RuntimeError("no")

    def __array_ufunc__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no")

    def copy(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no")


def forms() -> Iterator[tuple[str, Any]]:
    """The same load in other clothes."""
    for kind in "bBhHiIlLqQefdg":
        yield f"dtype {kind}", LOAD.astype(kind)
        yield f"dtype {kind}, big-endian", LOAD.astype(np.dtype(kind).newbyteorder(">"))
    yield "Fortran order", np.asfortranarray(LOAD)
    yield "transposed", np.ascontiguousarray(LOAD.T).T
    yield "every other", np.repeat(np.repeat(LOAD, 2, axis=0), 3, axis=1)[::2, ::3]
    yield "reversed", np.ascontiguousarray(LOAD[::-1, ::-1])[::-1, ::-1]
    frozen = LOAD.copy()
    frozen.flags.writeable = False
    yield "read-only", frozen
    yield "subclass", LOAD.copy().view(Subclass)
    yield "no mask", np.ma.masked_array(LOAD)
    yield "empty mask", np.ma.masked_array(LOAD, mask=np.zeros(LOAD.shape, dtype=bool))
    yield "protocol", OddArray(LOAD)
    yield "memoryview", LOAD.copy().data
    yield "lists", LOAD.tolist()
    yield "tuples", tuple(map(tuple, LOAD.tolist()))
    yield "list of arrays", list(LOAD)
    yield "list of numbers", [[np.float32(value) for value in row] for row in LOAD]
    unaligned = np.zeros(LOAD.nbytes + 1, dtype=np.uint8)[1:].view(np.float32).reshape(LOAD.shape)
    unaligned[:] = LOAD
    assert not unaligned.flags.aligned
    yield "unaligned", unaligned
    record = np.zeros(LOAD.shape, dtype=[("pad", "u1"), ("load", "<f4")])
    record["load"] = LOAD
    yield "field of a record", record["load"]


@pytest.mark.parametrize("form", [pytest.param(value, id=name) for name, value in forms()])
def test_forms_that_work(form: Any) -> None:
    before = copy.deepcopy(form) if not isinstance(form, memoryview) else form.tobytes()
    assert_planned(rebalance(form))
    plan = Planner(TOPOLOGY, 2, "deepseek").plan(form)
    assert_planned((plan.phy2log, plan.log2phy, plan.logcnt))
    planner = Planner(TOPOLOGY, 2, "deepseek", release_gil=True)
    out = planner.allocate(2, 4)
    planner.plan_into(form, out)
    np.testing.assert_array_equal(out.phy2log, WANTED[0])
    if isinstance(form, np.ndarray) and not isinstance(form, Subclass):
        np.testing.assert_array_equal(form, before)


def test_a_matrix_works() -> None:
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix(LOAD)
    assert_planned(rebalance(matrix))


def test_a_mapped_file_works(tmp_path: Path) -> None:
    LOAD.tofile(tmp_path / "load")
    assert_planned(rebalance(np.memmap(tmp_path / "load", np.float32, "r", shape=LOAD.shape)))


@pytest.mark.parametrize("axes", [(0, 1), (0,), (1,)])
def test_views_of_stride_zero_work(axes: tuple[int, ...]) -> None:
    source = LOAD
    for axis in axes:
        source = source.take([0], axis=axis)
    view = np.broadcast_to(source, LOAD.shape)
    for one, other in zip(rebalance(view), rebalance(view.copy()), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_frames_and_others_with_a_buffer_work() -> None:
    import array

    flat = array.array("f", LOAD.ravel().tolist())
    assert_planned(rebalance(memoryview(flat).cast("B").cast("f", LOAD.shape)))
    refused(lambda: rebalance(flat), "wrong_shape", "weight", "1 dimensions")


# Tensors


def tensor_forms() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """The same load as tensors; each is made of torch, when it is needed."""
    names = ["uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32"]
    names += ["float64", "uint16", "uint32", "uint64"]
    names += ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
    for name in names:
        yield name, partial(tensor_of, name)
    yield "requires grad", lambda t: tensor(t, LOAD).requires_grad_()
    yield "result with grad", lambda t: tensor(t, LOAD).requires_grad_() * 1
    yield "parameter", lambda t: t.nn.Parameter(tensor(t, LOAD))
    yield "buffer", lambda t: t.nn.Buffer(tensor(t, LOAD))
    yield "transposed", lambda t: tensor(t, LOAD).T.contiguous().T
    yield "strided", lambda t: tensor(t, np.repeat(LOAD, 3, axis=1))[:, ::3]
    yield (
        "channels last",
        lambda t: tensor(t, LOAD[None, None]).contiguous(memory_format=t.channels_last)[0, 0],
    )
    yield "negative view", lambda t: t._neg_view(tensor(t, -LOAD))
    yield "real part", lambda t: t.complex(tensor(t, LOAD), tensor(t, LOAD * 2)).real
    yield (
        "imaginary part of a conjugate",
        lambda t: t.complex(tensor(t, LOAD), tensor(t, -LOAD)).conj().imag,
    )
    yield "sparse", lambda t: tensor(t, LOAD).to_sparse()
    yield "uncoalesced", uncoalesced
    yield "sparse rows", lambda t: tensor(t, LOAD).to_sparse_csr()
    yield (
        "subclass",
        lambda t: tensor(t, LOAD).as_subclass(type("Named", (t.Tensor,), {"note": "mine"})),
    )
    yield "inference", inference
    yield "view", lambda t: tensor(t, LOAD.ravel()).view(2, 4)


def tensor(torch: Any, array: npt.NDArray[Any]) -> Any:
    return torch.from_numpy(array.copy())


def tensor_of(dtype: str, torch: Any) -> Any:
    return tensor(torch, LOAD).to(getattr(torch, dtype))


def uncoalesced(torch: Any) -> Any:
    rows, columns = np.nonzero(np.ones_like(LOAD))
    indices = torch.tensor(np.array([[*rows, *rows], [*columns, *columns]]))
    halves = torch.tensor(np.array([*LOAD.ravel(), *LOAD.ravel()]) / 2)
    return torch.sparse_coo_tensor(indices, halves, LOAD.shape, check_invariants=True)


def inference(torch: Any) -> Any:
    with torch.inference_mode():
        return tensor(torch, LOAD) * 1


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in tensor_forms()])
def test_tensors_that_work(make: Callable[[Any], Any]) -> None:
    torch = pytest.importorskip("torch")
    form = make(torch)
    answer = rebalance(form)
    for part in answer:
        assert type(part) is torch.Tensor
        assert (part.dtype, part.device.type) == (torch.int64, "cpu")
        assert not part.requires_grad
    assert_planned(tuple(part.numpy() for part in answer))
    plan = Planner(TOPOLOGY, 2, "deepseek").plan(form)
    assert_planned((plan.phy2log, plan.log2phy, plan.logcnt))


def bad_tensors() -> Iterator[tuple[str, str, Callable[[Any], Any]]]:
    yield "meta", "unsupported_tensor", lambda t: t.ones(2, 4, device="meta")
    yield "bool", "wrong_dtype", lambda t: t.ones(2, 4, dtype=t.bool)
    yield "complex", "wrong_dtype", lambda t: t.ones(2, 4, dtype=t.complex64)
    yield "conjugate", "wrong_dtype", lambda t: t.ones(2, 4, dtype=t.complex64).conj()
    yield "scalar", "wrong_shape", lambda t: t.tensor(1.0)
    yield "one layer", "wrong_shape", lambda t: t.ones(4)
    yield "windows", "wrong_shape", lambda t: t.ones(3, 2, 4)
    yield "empty", "empty", lambda t: t.ones(0, 4)
    yield "nested", "unsupported_tensor", nested
    yield "fake", "unsupported_tensor", fake
    yield "raising", "unsupported_tensor", raising
    yield "negative", "negative", lambda t: -t.ones(2, 4)
    yield "NaN", "not_finite", lambda t: t.full((2, 4), t.nan)
    yield "beyond float32", "not_finite", lambda t: t.full((2, 4), 1e300, dtype=t.float64)
    yield "bfloat16 infinity", "not_finite", lambda t: t.full((2, 4), t.inf, dtype=t.bfloat16)


def nested(torch: Any) -> Any:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def fake(torch: Any) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(2, 4)


def raising(torch: Any) -> Any:
    def torch_function(*_: Any) -> Any:
        raise RuntimeError

    kind = type("Raising", (torch.Tensor,), {"__torch_function__": classmethod(torch_function)})
    return torch.Tensor._make_subclass(kind, torch.ones(2, 4))


@pytest.mark.parametrize(
    ("code", "make"), [pytest.param(code, make, id=name) for name, code, make in bad_tensors()]
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_no_load(code: str, make: Callable[[Any], Any]) -> None:
    torch = pytest.importorskip("torch")
    form = make(torch)
    refused(lambda: rebalance(form), code, "weight")
    refused(lambda: Planner(TOPOLOGY).plan(form), code, "load")


def test_a_list_of_tensors_works() -> None:
    torch = pytest.importorskip("torch")
    assert_planned(rebalance([tensor(torch, row) for row in LOAD]))


# Buffers


def buffers(**changes: Any) -> PlanBuffers:
    sound = {
        "phy2log": np.full((2, 8), -7),
        "log2phy": np.full((2, 4, 5), -7),
        "logcnt": np.full((2, 4), -7),
    }
    return PlanBuffers(**{**sound, **changes})


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.flags.writeable = False
    return array


SHARED = np.full(64, -7)


def bad_buffers() -> Iterator[tuple[str, Any, str]]:
    yield "phy2log", np.full((2, 8), -7, dtype=np.int32), "wrong_dtype"
    yield "phy2log", np.full((2, 8), -7).view(np.uint64), "wrong_dtype"
    yield "phy2log", np.full((2, 8), -7.0), "wrong_dtype"
    yield "phy2log", np.full((2, 8), -7, dtype=">i8"), "wrong_dtype"
    yield "phy2log", np.full((2, 8), -7, dtype=object), "wrong_dtype"
    yield "phy2log", [[0] * 8] * 2, "wrong_type"
    yield "phy2log", None, "wrong_type"
    yield "phy2log", np.full((2, 7), -7), "wrong_shape"
    yield "phy2log", np.full((3, 8), -7), "wrong_shape"
    yield "phy2log", np.full((8, 2), -7), "wrong_shape"
    yield "phy2log", np.full(16, -7), "wrong_shape"
    yield "phy2log", np.full((2, 8, 1), -7), "wrong_shape"
    yield "phy2log", np.full((0, 8), -7), "wrong_shape"
    yield "phy2log", read_only(np.full((2, 8), -7)), "read_only"
    yield "phy2log", np.full((8, 2), -7).T, "not_contiguous"
    yield "phy2log", np.full((2, 16), -7)[:, ::2], "not_contiguous"
    yield "phy2log", np.full((2, 8), -7)[::-1], "not_contiguous"
    yield "phy2log", np.broadcast_to(-7, (2, 8)), "not_contiguous"
    yield "log2phy", np.full((2, 4, 1), -7), "too_small"
    yield "log2phy", np.full((2, 4, 0), -7), "too_small"
    yield "log2phy", np.full((4, 2, 5), -7), "wrong_shape"
    yield "log2phy", np.full((2, 5, 4), -7), "wrong_shape"
    yield "log2phy", np.full((2, 20), -7), "wrong_shape"
    yield "log2phy", np.full((2, 4, 5), -7, dtype=np.int32), "wrong_dtype"
    yield "log2phy", np.full((2, 4, 10), -7)[:, :, ::2], "not_contiguous"
    yield "log2phy", read_only(np.full((2, 4, 5), -7)), "read_only"
    yield "logcnt", np.full((2, 5), -7), "wrong_shape"
    yield "logcnt", np.full((4, 2), -7), "wrong_shape"
    yield "logcnt", np.full((2, 4), -7, dtype=np.int16), "wrong_dtype"
    yield "logcnt", np.full((4, 2), -7).T, "not_contiguous"
    yield "logcnt", None, "wrong_type"


@pytest.mark.parametrize(("name", "buffer", "code"), list(bad_buffers()))
@pytest.mark.parametrize("release_gil", [False, True])
def test_buffers_that_do_not_fit(name: str, buffer: Any, code: str, release_gil: bool) -> None:
    planner = Planner(TOPOLOGY, 2, "deepseek", release_gil=release_gil)
    out = buffers(**{name: buffer})
    error = refused(lambda: planner.plan_into(LOAD, out), code, name)
    if isinstance(buffer, np.ndarray) and code == "wrong_dtype":
        assert str(buffer.dtype) in error.got
    if isinstance(buffer, np.ndarray) and code == "wrong_shape":
        assert str(buffer.shape) in error.got
    for one in (out.phy2log, out.log2phy, out.logcnt):
        if isinstance(one, np.ndarray):
            untouched = -7 if one.dtype.kind != "u" else 2**64 - 7
            assert (one == untouched).all(), "a buffer was written to"
    planner.plan_into(LOAD, sound := buffers())
    np.testing.assert_array_equal(sound.phy2log, WANTED[0])


@pytest.mark.parametrize(
    "out",
    [
        buffers(phy2log=SHARED[:16].reshape(2, 8), logcnt=SHARED[:8].reshape(2, 4)),
        buffers(phy2log=SHARED[:16].reshape(2, 8), logcnt=SHARED[8:16].reshape(2, 4)),
        buffers(phy2log=SHARED[:16].reshape(2, 8), log2phy=SHARED[15:55].reshape(2, 4, 5)),
        buffers(log2phy=SHARED[:40].reshape(2, 4, 5), logcnt=SHARED[39:47].reshape(2, 4)),
    ],
)
def test_buffers_that_share_memory(out: PlanBuffers) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Planner(TOPOLOGY, 2).plan_into(LOAD, out)
    assert caught.value.code == "in_use"
    for one in (out.phy2log, out.log2phy, out.logcnt):
        assert one is not None
        assert (one == -7).all()


def test_neighbours_in_one_allocation_work() -> None:
    block = np.full(64, -7)
    out = PlanBuffers(
        phy2log=block[:16].reshape(2, 8),
        log2phy=block[16:56].reshape(2, 4, 5),
        logcnt=block[56:].reshape(2, 4),
    )
    Planner(TOPOLOGY, 2, "deepseek").plan_into(LOAD, out)
    np.testing.assert_array_equal(out.phy2log, WANTED[0])
    np.testing.assert_array_equal(out.logcnt, WANTED[2])


def test_a_load_in_the_memory_of_a_buffer_is_refused() -> None:
    phy2log = np.zeros((2, 8), dtype=np.int64)
    load = phy2log.view(np.float32).reshape(-1)[:8].reshape(2, 4)
    load[:] = LOAD
    refused(
        lambda: Planner(TOPOLOGY, 2).plan_into(load, buffers(phy2log=phy2log)), "in_use", "phy2log"
    )
    np.testing.assert_array_equal(load, LOAD)


@pytest.mark.parametrize("load", [np.full((2, 4), np.nan), -LOAD, LOAD[:, :3], LOAD[:1], [[1], []]])
def test_a_refused_load_leaves_the_buffers_alone(load: Any) -> None:
    for release_gil in (False, True):
        out = buffers()
        with pytest.raises(InvalidInputError):
            Planner(TOPOLOGY, 2, release_gil=release_gil).plan_into(load, out)
        for one in (out.phy2log, out.log2phy, out.logcnt):
            assert one is not None
            assert (one == -7).all()


@pytest.mark.parametrize("out", [None, (1, 2, 3), {}, "out"])
def test_what_holds_no_buffers(out: Any) -> None:
    refused(lambda: Planner(TOPOLOGY, 2).plan_into(LOAD, out), "wrong_type", "out", "allocate")


@pytest.mark.parametrize(
    ("sizes", "code", "argument"),
    [
        ((0, 4), "not_positive", "num_layers"),
        ((-1, 4), "not_positive", "num_layers"),
        ((2, 0), "not_positive", "num_experts"),
        ((2.0, 4), "not_integer", "num_layers"),
        (("2", 4), "not_integer", "num_layers"),
        ((2, None), "not_integer", "num_experts"),
        ((2, 4, -1), "negative", "max_replicas"),
        ((2, 4, 1.5), "not_integer", "max_replicas"),
        ((2, 9), "too_large", "num_experts"),
        ((10**9, 4), "too_large", "num_layers"),
        ((10**30, 4), "too_large", "num_layers"),
    ],
)
def test_buffers_of_no_size(sizes: tuple[Any, ...], code: str, argument: str) -> None:
    refused(lambda: Planner(TOPOLOGY).allocate(*sizes), code, argument)


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


# Errors


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
