"""Tensors that are refused as loads, and those that are not."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from eplb_rs import Planner
from refusals import LOAD, TOPOLOGY, assert_planned, rebalance, refused


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
