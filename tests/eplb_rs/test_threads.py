"""A planner may be used from many threads at once, whether or not it lets go of the interpreter."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import eplb_rs
import numpy as np
import numpy.typing as npt
import pytest
from eplb_rs import InvalidInputError, PlanBuffers, Planner, Topology

TOPOLOGY = Topology(4, 8, 9)
HAS_GIL: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
RELEASE = pytest.mark.parametrize("release_gil", [None, False, True])


def load(seed: int, num_layers: int = 12, num_experts: int = 256) -> npt.NDArray[np.float32]:
    random = np.random.default_rng(seed)
    return random.lognormal(4.0, 1.0, (num_layers, num_experts)).astype(np.float32)


def each(count: int, work: Callable[[int], None]) -> None:
    """Runs ``work(i)`` on ``count`` threads that start together; what one raises is raised."""
    start = threading.Barrier(count)

    def begin(index: int) -> None:
        start.wait()
        work(index)

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(begin, index) for index in range(count)]:
            future.result(timeout=60)


@RELEASE
@pytest.mark.parametrize("threads", [1, 3])
def test_one_planner_serves_many_threads(release_gil: bool | None, threads: int) -> None:
    planner = Planner(TOPOLOGY, 8, threads=threads, release_gil=release_gil)
    loads = [load(seed, num_layers=1 + seed) for seed in range(8)]
    wanted = [Planner(TOPOLOGY, 8).plan(one) for one in loads]

    def work(index: int) -> None:
        for turn in range(20):
            seed = (index + turn) % len(loads)
            assert planner.plan(loads[seed]) == wanted[seed]

    each(8, work)


@RELEASE
def test_each_thread_fills_its_own_buffers(release_gil: bool | None) -> None:
    planner = Planner(TOPOLOGY, 8, release_gil=release_gil)
    loads = [load(seed) for seed in range(4)]
    wanted = [planner.plan(one) for one in loads]

    def work(index: int) -> None:
        out = planner.allocate(12, 256)
        for turn in range(30):
            seed = (index + turn) % len(loads)
            planner.plan_into(loads[seed], out)
            np.testing.assert_array_equal(out.phy2log, wanted[seed].phy2log)
            np.testing.assert_array_equal(out.logcnt, wanted[seed].logcnt)

    each(4, work)


@RELEASE
def test_shared_buffers_hold_a_whole_plan_or_are_refused(release_gil: bool | None) -> None:
    """Of two calls into the same buffers at once, one is refused; no mixture is ever written."""
    planner = Planner(TOPOLOGY, 8, release_gil=release_gil)
    loads = [load(seed) for seed in range(4)]
    wanted = {planner.plan(one).phy2log.tobytes() for one in loads}
    out = planner.allocate(12, 256)
    outcomes: list[str] = []

    def work(index: int) -> None:
        for turn in range(50):
            try:
                planner.plan_into(loads[(index + turn) % len(loads)], out)
                outcomes.append("written")
            except InvalidInputError as error:
                outcomes.append(error.code)

    each(4, work)
    assert set(outcomes) <= {"written", "in_use"}
    assert "written" in outcomes
    if release_gil is False and HAS_GIL:
        assert "in_use" not in outcomes
    assert out.phy2log.tobytes() in wanted


class Paused:
    """A thread that has let go of the interpreter inside ``plan_into``, on so large a load that
    it stays there while the test does something else."""

    def __init__(self) -> None:
        self.planner = Planner(Topology(1, 2048, 2), release_gil=True)
        self.load = np.tile(load(0, num_layers=16, num_experts=2048), (24, 1))
        self.out: PlanBuffers = self.planner.allocate(len(self.load), 2048, 0)
        self.out.phy2log.fill(-7)
        # Never lets go, so that it is not found in the buffers itself.
        self.prober = Planner(self.planner.topology, release_gil=False)
        self.no_load = -np.ones_like(self.load)
        self.thread = threading.Thread(
            target=self.planner.plan_into, args=(self.load, self.out), daemon=True
        )

    def __enter__(self) -> Self:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)
        self.thread.start()
        deadline = time.monotonic() + 30
        while not self.inside() and self.thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0)
        sys.setswitchinterval(interval)
        return self

    def inside(self) -> bool:
        """Whether the buffers are held: then another call is refused."""
        if not HAS_GIL:  # then the prober might be found in the buffers
            time.sleep(0.05)
            return True
        try:
            self.prober.plan_into(self.no_load, self.out)
        except InvalidInputError as error:
            return error.code == "in_use"
        return False

    def __exit__(self, *_: object) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive()

    def wrote_plan_of(self, load: npt.NDArray[np.float32]) -> bool:
        """Whether the buffers hold the plan of a load, which repeats itself after 16 layers."""
        once = self.planner.plan(load[:16]).phy2log
        return np.array_equal(self.out.phy2log, np.tile(once, (len(load) // 16, 1)))


def test_buffers_in_use_are_refused_and_not_yet_written() -> None:
    with Paused() as paused:
        assert paused.thread.is_alive(), "the load is too small to watch"
        with pytest.raises(InvalidInputError) as caught:
            paused.planner.plan_into(paused.load, paused.out)
        assert caught.value.code == "in_use"
        unwritten = (paused.out.phy2log[[0, -1]] == -7).all()
        assert paused.thread.is_alive(), "it ended before it was watched"
    assert unwritten, "buffers are written at the end, while nobody else runs"
    assert (paused.out.phy2log >= 0).all()
    assert paused.wrote_plan_of(paused.load)


def test_a_load_that_changes_while_it_is_planned_does_no_harm() -> None:
    """The call that has let go works on a copy, taken when it was made."""
    with Paused() as paused:
        before = paused.load.copy()
        paused.load[:] = np.nan
        assert paused.thread.is_alive(), "it ended before it was watched"
    assert paused.wrote_plan_of(before)


@pytest.fixture
def busy() -> Iterator[None]:
    """Another thread that keeps the interpreter busy."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join(60)


@RELEASE
@pytest.mark.usefixtures("busy")
def test_planning_goes_on_while_another_thread_computes(release_gil: bool | None) -> None:
    planner = Planner(TOPOLOGY, 8, release_gil=release_gil)
    one = load(0)
    wanted = Planner(TOPOLOGY, 8).plan(one)
    for _ in range(20):
        assert planner.plan(one) == wanted


@pytest.mark.parametrize("limit", [{"time_limit_us": 3e5}, {"iterations": 100_000}])
def test_others_run_while_a_search_is_long(limit: dict[str, Any]) -> None:
    """However few slots there are."""
    ticks = 0
    stop = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.wait(0.002):
            ticks += 1

    thread = threading.Thread(target=tick, daemon=True)
    planner = Planner(Topology(18, 8, 2), **limit)
    thread.start()
    planner.plan(load(0, num_layers=1))
    ran = ticks
    stop.set()
    thread.join(60)
    assert planner.last_timing.native_us > 50_000, "too short to see"
    assert ran > 3


@pytest.mark.skipif(not HAS_GIL, reason="nobody waits for an interpreter without a lock")
@pytest.mark.usefixtures("busy")
def test_the_wait_for_the_interpreter_is_reported_apart() -> None:
    """A call that lets go waits for the other thread, up to a switch interval; one that does not
    let go does not wait."""
    one = load(0, num_layers=400)
    waits = {}
    for release_gil in (False, True):
        planner = Planner(TOPOLOGY, 8, release_gil=release_gil)
        out = planner.allocate(400, 256, 0)
        timings = []
        for _ in range(20):
            planner.plan_into(one, out)
            timings.append(planner.last_timing)
        waits[release_gil] = sorted(timing.wait_us for timing in timings)
        assert all(timing.native_us > 0 for timing in timings)
    assert waits[False][10] < 50
    assert waits[True][-1] > 1000


def test_timings_are_those_of_the_call() -> None:
    planner = Planner(TOPOLOGY, 8, release_gil=False)
    assert planner.last_timing == (0.0, 0.0)
    large, small = load(0, num_layers=400), load(0, num_layers=1)
    start = time.perf_counter()
    planner.plan(large)
    elapsed_us = (time.perf_counter() - start) * 1e6
    first = planner.last_timing
    assert isinstance(first, eplb_rs.Timing)
    assert 0 < first.native_us <= elapsed_us
    assert 0 <= first.wait_us <= elapsed_us
    times_us = []
    for _ in range(20):  # the machine may hold up any one call
        planner.plan(small)
        times_us.append(planner.last_timing.native_us)
    assert min(times_us) < first.native_us


def test_a_refused_call_keeps_the_planner_usable_from_all_threads() -> None:
    planner = Planner(TOPOLOGY, 8, threads=2, release_gil=True)
    good, wanted = load(1), Planner(TOPOLOGY, 8).plan(load(1))
    bad: list[Any] = [-good, good[:, :255], good * np.nan, [["x"]], np.zeros((0, 256))]

    def work(index: int) -> None:
        for turn in range(20):
            with pytest.raises(InvalidInputError):
                planner.plan(bad[(index + turn) % len(bad)])
            assert planner.plan(good) == wanted

    each(4, work)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked there")
def test_a_forked_process_plans_the_same() -> None:
    code = """
import os, signal, sys
import eplb_rs
planner = eplb_rs.Planner(eplb_rs.Topology(2, 4, 9), threads=3)
load = [[(17 * e + layer) % 23 for e in range(64)] for layer in range(6)]
plans = [lambda: planner.plan(load), lambda: planner.plan_scenarios([load, load])]
wanted = [plan() for plan in plans]
child = os.fork()
if child == 0:
    signal.alarm(20)  # threads that are not there would be waited for
    same = [plan() for plan in plans] == wanted
    del planner, plans
    os._exit(0 if same else 1)
sys.exit(os.waitpid(child, 0)[1])
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


def test_planners_come_and_go_on_many_threads() -> None:
    def work(index: int) -> None:
        for threads in range(1, 5):
            planner = Planner(TOPOLOGY, 8, threads=threads, release_gil=bool(index % 2))
            planner.plan(load(index, num_layers=3))

    each(6, work)
