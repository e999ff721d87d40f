"""Runs any schedule on the ranks of a process group.

Letters: P ranks, S stages, C copies of every stage, M micro-batches of all copies together.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, NoReturn, Self, overload

import torch

from dualpipe.errors import MismatchError, PeerLostError, PipelineError, ScheduleError
from dualpipe.executor.agreement import Agreement
from dualpipe.executor.arguments import (
    as_device,
    check_options,
    check_schedule,
    fault_of,
    one_of,
)
from dualpipe.executor.copies import Copies
from dualpipe.executor.graphs import Graphs
from dualpipe.executor.groups import given_group
from dualpipe.executor.parallel import hears_gradients, why_whole
from dualpipe.executor.places import Places
from dualpipe.executor.planner import Draft, Planner, Request
from dualpipe.executor.report import StepReport
from dualpipe.executor.result import StepResult, result_of
from dualpipe.executor.runner import Runner
from dualpipe.executor.seeds import unseeded
from dualpipe.executor.stage import Settings
from dualpipe.executor.timeline import Recorder
from dualpipe.executor.transport import make_transport
from dualpipe.executor.watch import Doing, Watch, find_store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    import torch.distributed as dist
    from torch import nn
    from torch.distributed.distributed_c10d import Store

    from dualpipe.costs import Costs
    from dualpipe.executor.transport.base import PairSum, TensorSpec, Transport
    from dualpipe.schedule import Schedule

__all__ = ["PipelineExecutor"]

_LIMIT_S = 300.0


class PipelineExecutor:
    """Runs the instruction streams of a schedule: one training or inference step at a time.

    Every rank of the group makes one, at the same time, with the same schedule.

    Args:
        stages: This rank's modules: a mapping from stage to module (from stage and copy, where
            the schedule has copies), or the modules in the order of copy, then stage. The group's
            rank r is pipeline rank ``ranks[r]``.
        schedule: Who computes what when. Without transfers they are placed first.
        group: P ranks; by default the default group. Messages go through groups of its members
            that the executor makes for itself.
        ranks: The pipeline rank of each rank of the group, `[P]`; by default the same.
        batch_dim: Along which dimension inputs, labels and outputs are batches.
        boundaries: What crosses from stage to stage for one micro-batch: a list of
            :class:`TensorSpec` for all boundaries, or a list of those for each. By default it is
            found by a dry forward, once for every combination of input shapes.
        gradients: ``"sum"`` of the micro-batches' gradients, as published, or their ``"mean"``.
        reduce_copies: Sum the gradients of a stage's copies, once per optimizer step, and check
            before the first that the copies are equal: by all-reduce, a stage at a time, or with
            ``"pairs"`` by the transport where it can (``"push"``, two copies), a weight at a time.
        transport: ``"auto"``, ``"push"``, ``"nccl"``, ``"gloo"``, or a transport that is made already.
        device: Where inputs of stages live; by default where the first parameter does.
        limit_s: How long a wait for another rank may last.
        store: Lives in no rank; through it ranks find out which of them is lost. By default
            torchrun's, which lives in its agent; without one, errors name the neighbour alone.
        seed: Seed every forward by this, the step, stage and micro-batch
            (:func:`~dualpipe.executor.seed_of`), so that dropout does not depend on the schedule.
        graphs: On GPUs, run stages as CUDA graphs: always, never, or with ``"auto"`` where their
            launches are the limit; see :class:`~dualpipe.executor.graphs.Graphs`.
        fuse_accumulation: Let the product that computes a weight's gradient add it to ``.grad`` as
            well, which rounds once instead of twice; see :mod:`~dualpipe.executor.products`. By
            default on GPUs; on CPUs gradients are bit for bit those of autograd.
        measure: Measure every step, for :meth:`report`; the attribute may be set between steps.

    Raises:
        PipelineError: ``no_group``, ``schedule``, ``limit_s``, ``seed``, ``batch_dim``, ``store``,
            ``group_size``, ``ranks``, ``stages``, ``device``, ``gradients``, ``graphs``,
            ``reduce_copies``, ``transport``.
    """

    def __init__(
        self,
        stages: Mapping[Any, nn.Module] | Sequence[nn.Module],
        schedule: Schedule,
        group: dist.ProcessGroup | None = None,
        *,
        ranks: Sequence[int] | None = None,
        batch_dim: int = 0,
        boundaries: Sequence[TensorSpec] | Sequence[Sequence[TensorSpec]] | None = None,
        gradients: str = "sum",
        reduce_copies: bool | str = True,
        transport: str | Transport = "auto",
        device: torch.device | str | None = None,
        limit_s: float = _LIMIT_S,
        store: Store | None = None,
        seed: int | None = None,
        graphs: bool | str = "auto",
        fuse_accumulation: bool | None = None,
        measure: bool = False,
    ) -> None:
        self.group = given_group(group)
        self.schedule = schedule
        self.boundaries = boundaries
        self.seed = seed
        self._batch_dim = batch_dim
        store = find_store(store)

        def check() -> None:
            check_schedule(schedule)
            check_options(limit_s=limit_s, seed=seed, batch_dim=batch_dim, store=store)

        fault = fault_of(check)
        self._agreement = Agreement(self.group, _LIMIT_S if fault else limit_s)
        kinds = {
            "transport": transport if isinstance(transport, str) else type(transport).__name__,
            "reduce_copies": reduce_copies,
            "store": store is not None,
        }
        try:
            if fault is not None:
                self.refuse(fault)
            token = self._settle(stages, ranks, device, gradients, graphs, kinds)
        except PipelineError:
            self._agreement.close()
            raise
        self._agreement.root = self._places.group_ranks[schedule.num_ranks // 2]
        self.rank = self._places.rank
        self.stages = self._places.stages
        if fuse_accumulation is None:
            fuse_accumulation = self.device.type == "cuda"
        for stage in self.stages.values():
            stage.gradient.products = fuse_accumulation and not hears_gradients(stage.module)
            stage.gradient.why_whole = why_whole(stage.module)
        self.transport = make_transport(transport, self.group, self.device, limit_s)
        self._copies: Copies | None = None
        if reduce_copies and schedule.num_copies > 1:
            modules = {stage.index: stage.module for stage in self.stages.values()}
            pairs = self._pairs() if reduce_copies == "pairs" else {}
            self._copies = Copies(modules, self._places.holders, limit_s, pairs)
        self._compared = False
        self._planner = Planner(
            schedule, self._places, self._agreement, self._copies, batch_dim, self.device
        )
        self._broken: BaseException | None = None
        self._closed = False
        self._recorder = Recorder(self.device, measure=measure)
        self.graphs = Graphs(self.stages, self.device, graphs)
        """The stages' CUDA graphs."""
        self._runner = Runner(
            self._places,
            self.transport,
            self._copies,
            self.graphs,
            self._recorder,
            self.device,
        )
        self._watch = Watch(store, token, self.rank, schedule.num_ranks, limit_s, self._doing)
        self._measured: tuple[Schedule, list[Any]] | None = None
        self.num_steps = 0
        """Steps that were started."""

    def step(
        self,
        *inputs: Any,
        labels: Sequence[Any] = (),
        criterion: Callable[..., torch.Tensor] | None = None,
        kwargs: Mapping[Any, Any] | None = None,
        return_outputs: bool = False,
        accumulate: bool = False,
        schedule: Schedule | None = None,
    ) -> StepResult:
        """One step, on all ranks at the same time; under ``torch.no_grad()`` forwards only.

        Tensors are cut into micro-batches along ``batch_dim``, as even as can be, the longer ones
        first; :class:`~dualpipe.executor.MicroBatches` are taken as they are. Gradients are added
        to those that parameters have.

        Args:
            inputs: Of the micro-batches whose first stage is on this rank; of all copies in a row
                if it is for several. Inputs that need a gradient get it at the end of the step.
            labels: Of the micro-batches whose last stage is on this rank.
            criterion: ``criterion(*outputs, *labels)`` gives the loss of a micro-batch, one
                element. Needed where there is a last stage, in training.
            kwargs: Keyword arguments of this rank's stages: one mapping for all of them, or a
                mapping for each by stage, or by stage and copy.
            return_outputs: Return the outputs of the last stage as well.
            accumulate: Other steps follow before the optimizer's: leave the gradients of copies
                alone until the last.
            schedule: Another schedule with the same placement for this step.

        Raises:
            PipelineError: On every rank, before anything is sent, where an argument cannot be;
                ``boundary`` where a stage returns other shapes than those agreed on.
            ScheduleError: Likewise, where the schedule cannot be run to its end.
            MismatchError: Ranks do not agree on the schedule, mode or boundaries.
            PeerLostError: A rank is gone, stopped, too late, or has raised. Every rank raises it,
                at most ``limit_s`` and 2 s after; it names the ranks at fault.
        """
        if self._broken is not None or self._closed:
            raise PipelineError(
                code="closed" if self._broken is None else "broken",
                argument="executor",
                got="closed" if self._broken is None else "its last step broke off",
                expected="one whose steps have ended",
                hint="make a new one" if self._broken is None else "close it and make a new one",
            ) from self._broken
        if schedule is None:
            schedule = self.schedule
        try:
            check_schedule(schedule)
        except PipelineError as error:
            self.refuse(error)
        training = torch.is_grad_enabled()
        request = Request(
            schedule=schedule,
            training=training,
            reducing=training and not accumulate and self._copies is not None,
            boundaries=self.boundaries,
            criterion=criterion,
            inputs=inputs,
            labels=labels,
            kwargs=kwargs or {},
            alike={
                "gradients": "mean" if self._mean else "sum",
                "measure": self.measure,
                "seed": self.seed,
            },
        )
        agreed = False
        try:
            with unseeded(self.seed is not None, self.device):
                draft = self._planner.draft(request)
                settings = Settings(
                    training=training,
                    criterion=criterion,
                    loss_scale=1 / schedule.num_micro_batches if self._mean else 1.0,
                    return_outputs=return_outputs,
                    seed=None if self.seed is None else (self.seed, self.num_steps),
                )
                fault = self._lead(draft, settings)
                plan, batch = self._planner.agree(draft)
                if request.reducing and not self._compared:
                    self._compare_copies()
                agreed = True
                self.num_steps += 1
                if plan is not draft.plan or self._runner.stream is None:
                    self._runner.undo()
                    self._runner.start(plan, batch, settings, reducing=request.reducing)
                elif fault is not None:
                    raise fault
                self._runner.run(plan, settings)
            result = result_of(self.stages.values(), batch, settings, self._batch_dim)
            self._runner.wait(self._poll)
            if self.measure:
                own = self._recorder.spans(), self._notes()
                self._measured = plan.schedule, self._planner.exchange(own)
            return result
        except PeerLostError as error:
            raise self._break_off(error) from error
        except BaseException as error:
            # What is refused before anything is sent is refused by every rank.
            if agreed or not isinstance(error, (PipelineError, ScheduleError)):
                self._break_off(error)
            else:
                self._runner.undo()
            raise
        finally:
            self._runner.end()

    def _pairs(self) -> dict[int, PairSum]:
        """What the transport sums gradients with, by stage."""
        mirrors = self._places.mirrors
        sums = self.transport.pair_sums(sorted(set(mirrors.values())))
        return {stage: sums[peer] for stage, peer in mirrors.items() if peer in sums}

    def _lead(self, draft: Draft, settings: Settings) -> Exception | None:
        """Starts a step that the ranks have not agreed on yet; what was raised, to be kept until
        they have, since the others wait for this one."""
        if draft.plan is None or draft.batch is None or not self._runner.leads(draft.plan):
            return None
        try:
            reducing = draft.request.reducing
            self._runner.start(draft.plan, draft.batch, settings, reducing=reducing)
            self._runner.lead(settings)
        except Exception as error:
            return error
        return None

    def _poll(self) -> None:
        self.transport.poll()
        self._watch.poll()

    @property
    def measure(self) -> bool:
        """Whether steps are measured; may be set between steps, on all ranks."""
        return self._recorder.measure

    @measure.setter
    def measure(self, value: bool) -> None:
        self._recorder.measure = value

    def report(self, costs: Costs | None = None) -> StepReport:
        """The last measured step of all ranks, beside what is predicted for it.

        Args:
            costs: What to predict by, in microseconds; by default what was measured itself.

        Raises:
            PipelineError: ``not_measured``.
        """
        if self._measured is None:
            raise PipelineError(
                code="not_measured",
                argument="measure",
                got="no step that was measured",
                expected="True during a step",
                hint="set executor.measure = True",
            )
        schedule, every = self._measured
        return StepReport(
            schedule,
            tuple(tuple(spans) for spans, _ in every),
            tuple(note for _, notes in every for note in notes),
            costs,
        )

    def close(self, *, drop: bool = False) -> None:
        """Ends the executor and its groups; the group it was given is left alone.

        Args:
            drop: Do not wait for anything: a rank is gone.
        """
        self._watch.close()
        self._close_groups(drop=drop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(drop=error is not None)

    def refuse(self, error: Exception) -> NoReturn:
        """Takes part in a step by refusing it, so that no other rank waits for this one.

        Raises:
            Exception: The one given; on the other ranks, whose :meth:`step` it refuses, a
                :class:`PipelineError` that says so.
        """
        self._agreement.exchange({}, error)
        raise error

    # When a step breaks off

    def _doing(self) -> Doing:
        """What this rank is at."""
        stream, peer = self._runner.stream, self.transport.waiting_for
        if stream is None:
            return Doing(None)
        rank = None if peer is None else self._places.group_ranks.index(peer)
        return Doing(str(stream.instructions[stream.at]), rank)

    @overload
    def _break_off(self, error: PeerLostError) -> PeerLostError: ...
    @overload
    def _break_off(self, error: BaseException) -> BaseException: ...
    def _break_off(self, error: BaseException) -> BaseException:
        """Lets the other ranks know, and finds out from them who is lost."""
        self._broken = error
        doing = self._doing()
        if isinstance(error, PeerLostError) and error.peer is not None:
            doing = doing._replace(peer=self._places.group_ranks.index(error.peer))
        self._watch.broke_off(error, doing)
        self._close_groups(drop=True)
        return self._watch.judge(error, doing) if isinstance(error, PeerLostError) else error

    def _close_groups(self, *, drop: bool) -> None:
        if self._closed:
            return
        self._closed = True
        for stage in self.stages.values():
            stage.reset()
        if self._copies is not None:
            self._copies.close()
        self.transport.close(drop=drop)
        self._agreement.close()

    # The parts of a step

    def _settle(
        self,
        stages: Mapping[Any, nn.Module] | Sequence[nn.Module],
        ranks: Sequence[int] | None,
        device: torch.device | str | None,
        gradients: str,
        graphs: bool | str,
        kinds: Mapping[str, Any],
    ) -> str:
        """Takes what this rank was given, if no rank refuses; a name that all ranks share."""
        own: Any = uuid.uuid4().hex
        try:
            self._mean = one_of("gradients", gradients, ("sum", "mean")) == "mean"
            one_of("graphs", graphs, (True, False, "auto"))
            one_of("reduce_copies", kinds["reduce_copies"], (True, False, "pairs"))
            self._places = Places(stages, self.schedule, self.group, ranks)
            self.device = as_device(device) or self._places.device
        except PipelineError as error:
            own = error
        placement = self.schedule.placement.tolist()
        name: str = self._agreement.exchange({"placement": placement, **kinds}, own)[0]
        return name

    def _compare_copies(self) -> None:
        """Refuses the step on every rank, where copies of any stage differ."""
        assert self._copies is not None
        own = None
        try:
            self._copies.check_equal()
        except MismatchError as error:
            own = error
        self._agreement.exchange({}, own)
        self._compared = True

    def _notes(self) -> list[str]:
        """What did not run as it could on this rank, and why."""
        notes = [
            f"rank {self.rank}, stage {stage.index}: {count} weight parts not left for later: {why}"
            for stage in self.stages.values()
            for why, count in stage.not_left.items()
        ]
        return notes + [
            f"rank {self.rank}, stage {index}: no CUDA graphs: {why}"
            for (index, _), why in self.graphs.why.items()
        ]
