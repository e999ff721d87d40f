"""Every recorded answer of DeepSeek's EPLB, through every door of the package."""

from pathlib import Path
from typing import NamedTuple

import eplb_rs
import numpy as np
import numpy.typing as npt
import pytest
import reference

GOLDEN = Path(__file__).parent.parent / "data" / "eplb_golden.npz"
MAPS = ("phy2log", "log2phy", "logcnt")


class Case(NamedTuple):
    load: npt.NDArray[np.generic]
    arguments: tuple[int, int, int, int]
    """num_replicas, num_groups, num_nodes, num_gpus"""
    answer: tuple[npt.NDArray[np.int64], ...]

    def planner(self, threads: int = 1) -> eplb_rs.Planner:
        num_replicas, num_groups, num_nodes, num_gpus = self.arguments
        topology = eplb_rs.Topology.from_totals(
            num_replicas=num_replicas, num_nodes=num_nodes, num_gpus=num_gpus
        )
        return eplb_rs.Planner(topology, num_groups, "deepseek", threads=threads)


def read_cases() -> list[Case]:
    with np.load(GOLDEN) as file:
        count = len({name.split("/")[0] for name in file.files})
        return [
            Case(
                load=file[f"{i}/load"],
                arguments=tuple(file[f"{i}/args"].tolist()),
                answer=tuple(file[f"{i}/{name}"].astype(np.int64) for name in MAPS),
            )
            for i in range(count)
        ]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    cases = read_cases()
    assert len(cases) == 300
    return cases


def assert_answer(case: Case, got: object) -> None:
    assert isinstance(got, tuple)
    for name, array, wanted in zip(MAPS, got, case.answer, strict=True):
        assert array.dtype == np.int64, name
        np.testing.assert_array_equal(array, wanted, err_msg=name, strict=True)


def test_arrays(cases: list[Case]) -> None:
    for case in cases:
        assert_answer(case, eplb_rs.rebalance_experts(case.load, *case.arguments))


def test_nested_lists(cases: list[Case]) -> None:
    for case in cases:
        assert_answer(case, eplb_rs.rebalance_experts(case.load.tolist(), *case.arguments))


def test_tensors(cases: list[Case]) -> None:
    torch = pytest.importorskip("torch")
    for case in cases:
        maps = eplb_rs.rebalance_experts(torch.from_numpy(case.load.copy()), *case.arguments)
        for tensor in maps:
            assert isinstance(tensor, torch.Tensor)
            assert tensor.dtype == torch.int64
            assert tensor.device.type == "cpu"
        assert_answer(case, tuple(tensor.numpy() for tensor in maps))


@pytest.mark.parametrize("threads", range(1, 9))
def test_plans(cases: list[Case], threads: int) -> None:
    for case in cases:
        plan = case.planner(threads).plan(case.load)
        assert_answer(case, (plan.phy2log, plan.log2phy, plan.logcnt))


@pytest.mark.parametrize("threads", range(1, 9))
def test_buffers(cases: list[Case], threads: int) -> None:
    for case in cases:
        planner = case.planner(threads)
        out = planner.allocate(*case.answer[1].shape)
        planner.plan_into(case.load, out)
        assert_answer(case, (out.phy2log, out.log2phy, out.logcnt))


def test_the_plain_numpy_reference(cases: list[Case]) -> None:
    for case in cases:
        assert_answer(case, reference.rebalance_experts(case.load, *case.arguments))


def test_the_published_example(cases: list[Case]) -> None:
    """That of DeepSeek's README; it is the first case."""
    load = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    phy2log, _, _ = eplb_rs.rebalance_experts(load, 16, 4, 2, 8)
    assert phy2log.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert cases[0].load.tolist() == load
