"""Loads that are on a GPU."""

from __future__ import annotations

import eplb_rs
import numpy as np
import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SIZES = (288, 8, 4, 32)
DTYPES = ("int32", "int64", "uint8", "float16", "bfloat16", "float32", "float64")


@pytest.fixture
def load() -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.round(rng.lognormal(0, 1, (58, 256)) * 20).clip(0, 255))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_answer_is_that_of_the_same_load_on_the_cpu(load: torch.Tensor, dtype: str) -> None:
    on_cpu = load.to(getattr(torch, dtype))
    on_gpu = on_cpu.cuda()
    for got, wanted in zip(
        eplb_rs.rebalance_experts(on_gpu, *SIZES),
        eplb_rs.rebalance_experts(on_cpu, *SIZES),
        strict=True,
    ):
        assert (got.device.type, got.dtype) == ("cpu", torch.int64)
        assert torch.equal(got, wanted)


def test_views_and_tensors_with_gradients_are_taken(load: torch.Tensor) -> None:
    on_gpu = load.float().cuda().t().contiguous().t().requires_grad_()
    plan = eplb_rs.Planner(eplb_rs.Topology(4, 8, 9), 8).plan(on_gpu)
    assert plan == eplb_rs.Planner(eplb_rs.Topology(4, 8, 9), 8).plan(load)


def test_faults_on_the_gpu_are_refused_as_on_the_cpu(load: torch.Tensor) -> None:
    load[3, 7] = float("nan")
    with pytest.raises(eplb_rs.InvalidInputError, match="layer 3, expert 7") as raised:
        eplb_rs.rebalance_experts(load.cuda(), *SIZES)
    assert (raised.value.code, raised.value.argument) == ("not_finite", "weight")
