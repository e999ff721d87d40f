"""Loads that are refused, by their values or their form, and those that are not."""

import copy
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eplb_rs import InvalidInputError, Planner
from refusals import LOAD, TOPOLOGY, WANTED, RaisingArray, assert_planned, rebalance, refused

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
        (np.ones((1,) * 32), "wrong_shape", ["32 dimensions"]),
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
