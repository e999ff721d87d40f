"""The plan of a step, which all ranks agree on before anything is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from dualpipe.errors import PipelineError, ScheduleError
from dualpipe.executor.boundary import given_boundaries
from dualpipe.executor.microbatches import signature
from dualpipe.executor.parallel import syncing
from dualpipe.executor.plan import Batch, Plan, find_boundaries

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dualpipe.executor.agreement import Agreement
    from dualpipe.executor.boundary import Boundary
    from dualpipe.executor.copies import Copies
    from dualpipe.executor.places import Places
    from dualpipe.schedule import Schedule

__all__ = ["Draft", "Planner", "Request"]

_MAX_PLANS = 64
"""Plans are kept for so many combinations of shapes."""


@dataclass(frozen=True)
class Request:
    """What a rank's caller wants of a step."""

    schedule: Schedule
    training: bool
    reducing: bool
    """Whether gradients of copies are summed in it."""
    boundaries: Any
    """As given; None to find them out."""
    criterion: Callable[..., torch.Tensor] | None
    inputs: Sequence[Any]
    labels: Sequence[Any]
    kwargs: Mapping[Any, Any]
    alike: Mapping[str, Any]
    """What else must be the same on all ranks, and changes no plan."""


class Draft(NamedTuple):
    """What a rank would do, before it knows whether the others agree."""

    request: Request
    key: tuple[Any, ...]
    """What the plan follows from, apart from the ranks' shapes."""
    batch: Batch | None
    """None where it was refused."""
    plan: Plan | None
    """What will be agreed on, if no rank has anything new to say; None where this one has."""


class Planner:
    """Makes the plans of an executor's steps, each of them once.

    Args:
        schedule: The executor's: those of steps have its placement.
        places: Who holds which stages.
        agreement: What ranks agree by.
        copies: Those of the rank's stages, if their gradients are summed.
        batch_dim: Along which dimension tensors are cut.
        device: Where inputs of stages live.
    """

    def __init__(
        self,
        schedule: Schedule,
        places: Places,
        agreement: Agreement,
        copies: Copies | None,
        batch_dim: int,
        device: torch.device,
    ) -> None:
        self._schedule = schedule
        self._places = places
        self._agreement = agreement
        self._copies = copies
        self._batch_dim = batch_dim
        self._device = device
        self._plans: dict[Any, Plan] = {}
        self._digests: dict[int, tuple[Schedule, str]] = {}

    def draft(self, request: Request) -> Draft:
        """Looks at what this rank was asked for, and tells the others; :meth:`agree` must follow."""
        schedule = request.schedule
        batch = None
        own: Any
        try:
            self._check(request)
            batch = Batch(
                self._places.stages,
                schedule.micro_batches,
                self._batch_dim,
                inputs=request.inputs,
                labels=request.labels,
                kwargs=request.kwargs,
            )
            trained = self._places.trained(with_gradients=request.training)
            own = signature(request.inputs), signature(request.kwargs), trained
            if request.training and self._copies is not None:
                self._copies.begin()
        except PipelineError as error:
            own = error
        except Exception as error:
            own = PipelineError(
                code="arguments",
                argument="arguments",
                got=f"{type(error).__name__}: {error}",
                expected="such as can be cut into micro-batches",
            )
            own.__cause__ = error
        equal = {
            "num_micro_batches": schedule.num_micro_batches,
            "schedule": self._digest(schedule),
            "training": request.training,
            "boundaries": repr(request.boundaries),
            "reducing": request.reducing,
            "autocast": _autocast(self._device),
        }
        key = tuple(equal.values())
        every = self._agreement.start({**equal, **request.alike}, own)
        plan = None if every is None else self._plans.get((*key, *every))
        return Draft(request, key, batch, plan)

    def agree(self, draft: Draft) -> tuple[Plan, Batch]:
        """The plan that all ranks have agreed on, and this rank's micro-batches.

        Raises:
            PipelineError: On every rank, where one cannot do what it was asked.
            MismatchError: Ranks were asked for different things.
        """
        every = self._agreement.finish()
        batch = draft.batch
        assert batch is not None
        key = (*draft.key, *every)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                del self._plans[next(iter(self._plans))]
            plan = self._plans[key] = self._make(draft.request, batch)
        return plan, batch

    def exchange(self, own: Any) -> list[Any]:
        """What every pipeline rank gave, in their order."""
        every = self._agreement.exchange({}, own)
        return [every[rank] for rank in self._places.group_ranks]

    def _check(self, request: Request) -> None:
        schedule = request.schedule
        self._check_kwargs(request.kwargs)
        if not (request.criterion is None or callable(request.criterion)):
            raise PipelineError(
                code="criterion",
                argument="criterion",
                got=repr(request.criterion),
                expected="a function of outputs and labels",
            )
        if schedule is not self._schedule and not np.array_equal(
            schedule.placement, self._schedule.placement
        ):
            raise PipelineError(
                code="placement",
                argument="schedule",
                got=repr(schedule),
                expected=f"one with the placement of {self._schedule!r}",
            )
        if not request.training:
            return
        if not schedule.has_backward:
            raise PipelineError(
                code="no_backward",
                argument="schedule",
                got=repr(schedule),
                expected="one with backwards",
                hint="it is for steps under torch.no_grad()",
            )
        if schedule.num_micro_batches > 1 and any(
            syncing(stage.modules) for stage in self._places.stages.values()
        ):
            raise PipelineError(
                code="gradient_sync",
                argument="stages",
                got="a DistributedDataParallel that averages gradients in every backward",
                expected="one that leaves them alone, since several backwards make up a step",
                hint="run the step inside its no_sync(), and average the gradients after it",
            )
        if request.criterion is None and self._places.has_last:
            raise PipelineError(
                code="criterion",
                argument="criterion",
                got="None",
                expected="a loss function, since the last stage is on this rank",
            )

    def _check_kwargs(self, kwargs: Mapping[Any, Any]) -> None:
        if not isinstance(kwargs, Mapping):
            raise PipelineError(
                code="kwargs",
                argument="kwargs",
                got=f"a {type(kwargs).__name__}",
                expected="a mapping from names, or from stages",
            )
        copies, stages = self._schedule.placement.shape
        for key, value in kwargs.items():
            stage, copy = key if isinstance(key, tuple) and len(key) == 2 else (key, 0)
            if isinstance(key, str):
                continue
            if stage not in range(stages) or copy not in range(copies):
                raise PipelineError(
                    code="kwargs",
                    argument="kwargs",
                    got=f"key {key!r}",
                    expected=f"names, stages from 0 to {stages - 1}, or pairs of stage and copy",
                )
            if not isinstance(value, Mapping):
                raise PipelineError(
                    code="kwargs",
                    argument="kwargs",
                    got=f"a {type(value).__name__} for {key!r}",
                    expected="a mapping from names for each stage",
                )

    def _make(self, request: Request, batch: Batch) -> Plan:
        schedule, training = request.schedule, request.training
        if not training and schedule.has_backward:
            schedule = schedule.forward_only()
        if not schedule.has_transfers:
            schedule = schedule.place_transfers()
        _prove(schedule)
        boundaries: Mapping[tuple[int, int], Sequence[Boundary]]
        placement = schedule.placement.tolist()
        crosses = any(len(set(row)) > 1 for row in placement)
        if request.boundaries is not None or not crosses:
            given = request.boundaries or []
            row = given_boundaries(given, schedule.num_stages, training=training)
            boundaries = {
                (copy, m): row
                for copy, count in enumerate(schedule.micro_batches)
                for m in range(count)
            }
        else:
            boundaries = find_boundaries(
                self._places.stages,
                placement,
                batch,
                self.exchange,
                self._device,
                training=training,
            )
        return Plan(schedule, boundaries)

    def _digest(self, schedule: Schedule) -> str:
        """The schedule in one line: what it is, and a hash of all of it."""
        known = self._digests.get(id(schedule))
        if known is None or known[0] is not schedule:
            content = hashlib.blake2b(schedule.text().encode(), digest_size=8).hexdigest()
            known = self._digests[id(schedule)] = schedule, f"{schedule!r} {content}"
        return known[1]


def _prove(schedule: Schedule) -> None:
    """Refuses what was read without a proof, and would wait for ever or add gradients twice.

    Raises:
        ScheduleError: As :meth:`Schedule.verify`.
    """
    try:
        schedule.verify(transports=("eager",))
    except ScheduleError as error:
        if error.code != "reduction":  # the executor reduces at the end what no instruction has
            raise


def _autocast(device: torch.device) -> str | None:
    if not torch.is_autocast_enabled(device.type):
        return None
    return str(torch.get_autocast_dtype(device.type))
