"""What an executor is given, refused where it cannot be."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.distributed_c10d import Store

from dualpipe.errors import PipelineError
from dualpipe.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["as_device", "check_options", "check_schedule", "fault_of", "one_of"]


def fault_of(check: Callable[[], None]) -> PipelineError | None:
    """What a check raises, to be told to the other ranks first."""
    try:
        check()
    except PipelineError as error:
        return error
    return None


def check_schedule(schedule: Any) -> None:
    """Refuses what is no schedule.

    Raises:
        PipelineError: ``schedule``.
    """
    if not isinstance(schedule, Schedule):
        raise PipelineError(
            code="schedule",
            argument="schedule",
            got=repr(schedule),
            expected="a Schedule",
            hint="make one by Schedule.generate(method, num_ranks, num_micro_batches)",
        )


def check_options(*, limit_s: Any, seed: Any, batch_dim: Any, store: Any) -> None:
    """Refuses what an executor cannot be made with, whatever its stages are.

    Raises:
        PipelineError: ``limit_s``, ``seed``, ``batch_dim``, ``store``.
    """
    if not isinstance(limit_s, Real) or not 0 < float(limit_s) < math.inf:
        raise PipelineError(
            code="limit_s",
            argument="limit_s",
            got=repr(limit_s),
            expected="a number of seconds above 0",
        )
    for name, value in (("seed", seed), ("batch_dim", batch_dim)):
        if not (value is None and name == "seed") and not _fits(value):
            raise PipelineError(
                code=name,
                argument=name,
                got=repr(value),
                expected="a whole number of 64 bits",
            )
    if not isinstance(store, Store | None):
        raise PipelineError(
            code="store",
            argument="store",
            got=type(store).__name__,
            expected="a torch.distributed.Store that lives in no rank",
        )


def as_device(device: Any) -> torch.device | None:
    """A device, or its name.

    Raises:
        PipelineError: ``device``.
    """
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise PipelineError(
            code="device",
            argument="device",
            got=repr(device),
            expected="a torch.device, or the name of one",
        ) from error


def one_of(argument: str, value: Any, known: tuple[Any, ...]) -> Any:
    """One of a few values.

    Raises:
        PipelineError: Its code is the argument's name.
    """
    if value not in known:
        raise PipelineError(
            code=argument,
            argument=argument,
            got=repr(value),
            expected=" or ".join(map(repr, known)),
        )
    return value


def _fits(value: Any) -> bool:
    try:
        return -(2**63) <= operator.index(value) < 2**63
    except TypeError:
        return False
