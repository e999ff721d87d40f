"""Plans of one layer from the load of a micro-batch, beside UltraEP's recorded answers."""

import pickle
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import eplb_rs
import numpy as np
import numpy.typing as npt
import pytest
from eplb_rs.realtime import Step, StepBuffers, StepLimits, StepPlanner

GOLDEN = Path(__file__).parent.parent / "data" / "realtime_golden.npz"

# The largest over the mean rank load that plans stay within, mean over the cases of a kind.
WITHIN = {
    (64, "dsr1"): 1.002,
    (64, "lognormal1"): 1.001,
    (33, "dsr1"): 1.035,
    (33, "lognormal1"): 1.013,
    (34, "dsr1"): 1.0015,
    (34, "lognormal1"): 1.001,
    (8, "dsr1"): 1.003,
    (8, "lognormal1"): 1.0005,
}


class Case(NamedTuple):
    kind: tuple[int, str]
    load: npt.NDArray[np.int32]
    shape: tuple[int, int, int]
    level: int
    copies: int

    @property
    def mean(self) -> float:
        return float(self.load.sum(dtype=np.int64)) / self.shape[0]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    cases = []
    with np.load(GOLDEN) as file:
        for i in range(40):
            ranks, home, spare = (int(n) for n in file[f"{i}/args"])
            slots, quota = file[f"{i}/log2phy"], file[f"{i}/quota"]
            used = slots >= 0
            carried = np.bincount(slots[used] // (home + spare), quota[used], ranks)
            kind = (ranks + (spare if ranks == 32 else 0), str(file[f"{i}/kind"]))
            load = file[f"{i}/load"]
            shape = (ranks, home, spare)
            cases.append(Case(kind, load, shape, int(carried.max()), int(used[:, 1:].sum())))
    assert len({case.kind for case in cases}) == len(WITHIN)
    return cases


def added_up(load: npt.NDArray[np.int32], home: int, step: Step) -> npt.NDArray[np.int64]:
    """Tokens by rank, after checking that the plan is one."""
    totals = load.sum(axis=0, dtype=np.int64)
    ranks = len(step.experts)
    used = step.experts >= 0
    assert ((step.tokens > 0) == used).all()
    assert step.num_copies == used.sum()
    taken = np.bincount(step.experts[used], step.tokens[used], len(totals)).astype(np.int64)
    assert (taken <= totals).all()
    own = np.arange(ranks)[:, None]
    assert (step.experts // home != own)[used].all()
    assert step.by_source is not None
    assert step.by_source.dtype == load.dtype
    assert (step.by_source >= 0).all()
    np.testing.assert_array_equal(step.by_source.sum(axis=2), step.tokens)
    sent = np.zeros(load.shape, dtype=np.int64)
    for rank, slot in zip(*np.nonzero(used), strict=True):
        expert = step.experts[rank, slot]
        sent[:, expert] += step.by_source[rank, slot]
        own_first = min(step.tokens[rank, slot], load[rank, expert])
        assert step.by_source[rank, slot, rank] == own_first
    assert (sent <= load).all()
    return (totals - taken).reshape(ranks, home).sum(axis=1) + step.tokens.sum(axis=1)


def test_imbalance_of_each_kind(cases: list[Case]) -> None:
    reached = defaultdict(list)
    for case in cases:
        step = StepPlanner(*case.shape).plan(case.load)
        carried = added_up(case.load, case.shape[1], step)
        assert carried.max() == step.level
        assert carried.sum() == step.total
        assert step.imbalance == pytest.approx(step.level / case.mean)
        assert step.level <= case.level
        reached[case.kind].append(step.imbalance)
    for kind, most in WITHIN.items():
        assert np.mean(reached[kind]) <= most, kind


def test_fewer_copies_at_the_recorded_balance(cases: list[Case]) -> None:
    ours, theirs = defaultdict(int), defaultdict(int)
    for case in cases:
        limits = StepLimits(target_imbalance=max(1.0, (case.level + 0.5) / case.mean))
        step = StepPlanner(*case.shape, limits=limits).plan(case.load)
        assert added_up(case.load, case.shape[1], step).max() <= case.level
        ours[case.kind] += step.num_copies
        theirs[case.kind] += case.copies
    for kind in WITHIN:
        assert ours[kind] <= theirs[kind], kind
    assert sum(ours.values()) <= 0.88 * sum(theirs.values())


def test_limits(cases: list[Case]) -> None:
    for case in cases[::7]:
        for limits in (
            StepLimits(max_copies=3),
            StepLimits(max_out=1),
            StepLimits(max_in=1),
            StepLimits(min_tokens=4096),
            StepLimits(max_copies=0),
        ):
            step = StepPlanner(*case.shape, limits=limits).plan(case.load)
            added_up(case.load, case.shape[1], step)
            used = step.experts >= 0
            homes = np.bincount(step.experts[used] // case.shape[1], minlength=1)
            assert limits.max_copies is None or step.num_copies <= limits.max_copies
            assert limits.max_out is None or homes.max() <= limits.max_out
            assert limits.max_in is None or used.sum(axis=1).max() <= limits.max_in
            assert step.tokens[used].min(initial=1 << 30) >= limits.min_tokens


def test_a_load_by_expert_gets_the_same_copies(cases: list[Case]) -> None:
    for case in cases[::5]:
        planner = StepPlanner(*case.shape)
        by_source = planner.plan(case.load)
        totals = case.load.sum(axis=0)
        for load in (totals, totals.astype(np.int64), totals.astype(np.uint32), totals.tolist()):
            step = planner.plan(load)
            assert step.by_source is None
            assert step.level == by_source.level
            np.testing.assert_array_equal(step.experts, by_source.experts)
            np.testing.assert_array_equal(step.tokens, by_source.tokens)


def test_buffers_and_pickles(cases: list[Case]) -> None:
    case = cases[0]
    planner = StepPlanner(*case.shape, limits=StepLimits(target_imbalance=1.01))
    step = planner.plan(case.load)
    wide = case.load.astype(np.int64)
    for other, load in (
        (planner, case.load),
        (pickle.loads(pickle.dumps(planner)), case.load),
        (planner, wide),
    ):
        out = other.allocate(load.dtype)
        assert other.plan_into(load, out) == (step.level, step.total, step.num_copies)
        np.testing.assert_array_equal(out.experts, step.experts)
        np.testing.assert_array_equal(out.tokens, step.tokens)
        np.testing.assert_array_equal(out.by_source, step.by_source)


def test_through_a_planner(cases: list[Case]) -> None:
    case = cases[20]
    ranks, home, spare = case.shape
    planner = eplb_rs.Planner(eplb_rs.Topology(1, ranks, home + spare))
    for _ in range(2):
        step = planner.plan_step(case.load)
        assert step.level == StepPlanner(*case.shape).plan(case.load).level
    fewer = planner.plan_step(case.load, limits=StepLimits(max_copies=2))
    assert fewer.num_copies == 2
    with refused("not_multiple", "load"):
        planner.plan_step([1, 2, 3])
    for uneven in (
        planner.topology.with_dead([1]),
        planner.topology.with_speeds([1.0] * (ranks - 1) + [2.0]),
        planner.topology.with_slots([home + spare] * (ranks - 1) + [home]),
    ):
        with refused("inconsistent", "topology"):
            eplb_rs.Planner(uneven).plan_step(case.load)
    full = eplb_rs.Planner(eplb_rs.Topology(1, 2, 2))
    with refused("too_small", "slots_per_gpu"):
        full.plan_step([1, 2, 3, 4])


def test_nothing_to_do() -> None:
    step = StepPlanner(3, 2, 1).plan(np.zeros((3, 6), dtype=np.int32))
    assert (step.level, step.num_copies, step.imbalance) == (0, 0, 1.0)
    step = StepPlanner(1, 4, 2).plan([5, 6, 7, 8])
    assert (step.level, step.num_copies) == (26, 0)


def refused(code: str, argument: str) -> pytest.RaisesExc[eplb_rs.InvalidInputError]:
    return pytest.RaisesExc(
        eplb_rs.InvalidInputError, check=lambda e: (e.code, e.argument) == (code, argument)
    )


def test_bad_input() -> None:
    planner = StepPlanner(2, 2, 1)
    out = planner.allocate()
    load = np.ones((2, 4), dtype=np.int32)
    narrow = StepBuffers(experts=out.experts[:1], tokens=out.tokens)
    for code, argument, call in (
        ("not_positive", "num_ranks", lambda: StepPlanner(0, 1, 1)),
        ("not_positive", "spare_slots", lambda: StepPlanner(2, 1, 0)),
        ("not_integer", "home_slots", lambda: StepPlanner(2, 1.5, 1)),
        ("too_large", "num_ranks", lambda: StepPlanner(2000, 1, 1)),
        ("too_large", "spare_slots", lambda: StepPlanner(64, 1, 1 << 20)),
        ("wrong_type", "limits", lambda: StepPlanner(2, 2, 1, limits=3)),
        ("out_of_range", "target_imbalance", lambda: limited(target_imbalance=0.5)),
        ("out_of_range", "target_imbalance", lambda: limited(target_imbalance=float("nan"))),
        ("wrong_type", "target_imbalance", lambda: limited(target_imbalance="1")),
        ("negative", "max_copies", lambda: limited(max_copies=-1)),
        ("not_integer", "max_in", lambda: limited(max_in=0.5)),
        ("not_positive", "min_tokens", lambda: limited(min_tokens=0)),
        ("wrong_dtype", "load", lambda: planner.plan([1.0, 2.0, 3.0, 4.0])),
        ("wrong_shape", "load", lambda: planner.plan([1, 2, 3])),
        ("wrong_shape", "load", lambda: planner.plan_into(load[:, :3], out)),
        ("negative", "load", lambda: planner.plan_into(-load, out)),
        ("too_large", "load", lambda: planner.plan([2**60] * 4)),
        ("wrong_type", "out", lambda: planner.plan_into(load, None)),
        ("wrong_shape", "experts", lambda: planner.plan_into(load, narrow)),
        ("wrong_dtype", "by_source", lambda: planner.plan_into(load.astype(np.int64), out)),
        ("inconsistent", "by_source", lambda: planner.plan_into(load[0], out)),
    ):
        with refused(code, argument):
            call()
    assert (out.experts == -1).all()
    assert (out.tokens == 0).all()


def limited(**limits: object) -> StepPlanner:
    return StepPlanner(2, 2, 1, limits=StepLimits(**limits))  # type: ignore[arg-type]
