"""What bad input is tried on, and what a refusal has to be."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import eplb_rs
import numpy as np
import pytest
from eplb_rs import InvalidInputError, PlanError, Topology

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

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


class RaisingArray:
    """Has NumPy's protocol, but not the values."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        raise self.error


class Attack:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))
