"""Planning into buffers allocates nothing once warm, as far as Python and NumPy can see."""

import gc
import sys
import tracemalloc

import numpy as np
import pytest
from eplb_rs import Planner, Topology

TURNS = 200


@pytest.mark.parametrize("release_gil", [None, False, True])
@pytest.mark.parametrize("with_log2phy", [True, False])
def test_planning_into_buffers_allocates_nothing_once_warm(
    release_gil: bool | None, with_log2phy: bool
) -> None:
    planner = Planner(Topology(4, 8, 9), 8, release_gil=release_gil)
    load = np.random.default_rng(0).lognormal(4.0, 1.0, (58, 256)).astype(np.float32)
    out = planner.allocate(58, 256, max_replicas=33 if with_log2phy else 0)
    turns = range(TURNS)
    gc.collect()
    gc.disable()
    tracemalloc.start()  # NumPy tells it of its arrays
    try:
        for _ in turns:  # warm: also what tracing itself keeps
            planner.plan_into(load, out)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        blocks = sys.getallocatedblocks()
        for _ in turns:
            planner.plan_into(load, out)
        blocks = sys.getallocatedblocks() - blocks
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    # What lives for the length of a call: its frame and arguments, but no array.
    assert peak - before < 4096
    assert after - before < 256
    assert abs(blocks) < TURNS / 10


def test_other_dtypes_are_converted_and_the_copy_is_let_go() -> None:
    planner = Planner(Topology(4, 8, 9), 8)
    load = np.random.default_rng(0).integers(0, 1000, (58, 256))
    out = planner.allocate(58, 256)
    planner.plan_into(load, out)
    tracemalloc.start()
    try:
        planner.plan_into(load, out)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(50):
            planner.plan_into(load, out)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = load.size * 4
    assert size <= peak - before < 2 * size, "tracing sees arrays, and there is one at a time"
    assert after - before < size, "what stays is not one for each call"


def test_the_memory_of_the_process_stays_as_it_is() -> None:
    resource = pytest.importorskip("resource")
    planner = Planner(Topology(4, 8, 9), 8, threads=2, release_gil=True)
    load = np.random.default_rng(0).lognormal(4.0, 1.0, (58, 256)).astype(np.float32)
    out = planner.allocate(58, 256)
    for _ in range(100):
        planner.plan_into(load, out)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        planner.plan_into(load, out)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kib = 1 if sys.platform != "darwin" else 1024
    assert (after - before) / kib < 1024
