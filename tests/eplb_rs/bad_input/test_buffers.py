"""Buffers that a plan cannot be written to, and that are left as they were."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from eplb_rs import InvalidInputError, PlanBuffers, Planner
from refusals import LOAD, TOPOLOGY, WANTED, refused


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
