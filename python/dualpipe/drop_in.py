"""DualPipe and DualPipeV with the signatures and behaviour published by DeepSeek."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dualpipe import comm
from dualpipe.errors import PipelineError, ScheduleError
from dualpipe.executor.executor import PipelineExecutor
from dualpipe.executor.groups import given_group
from dualpipe.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch.distributed as dist

__all__ = ["DualPipe", "DualPipeV"]


class _DropIn(nn.Module):
    """Two modules on every rank, and a step that runs a schedule made for its micro-batches."""

    _method: str

    def __init__(
        self,
        modules: Sequence[nn.Module],
        batch_dim: int,
        process_group: dist.ProcessGroup | None,
        rank_mapping: Sequence[int] | None,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        if len(modules) != 2:
            raise PipelineError(
                code="stages",
                argument="modules",
                got=f"{len(modules)} modules",
                expected="two",
            )
        self.module = nn.ModuleList(modules)
        self.batch_dim = batch_dim
        self.group = given_group(process_group)
        self.num_ranks: int = self.group.size()
        self._schedules: dict[int, Schedule] = {}
        self.executor = PipelineExecutor(
            modules,
            self._schedule(2 * self.num_ranks),
            self.group,
            ranks=rank_mapping,
            batch_dim=batch_dim,
            **options,
        )
        self.rank = self.executor.rank
        self.is_first_rank = self.rank == 0
        self.is_last_rank = self.rank == self.num_ranks - 1

    def _schedule(self, num_micro_batches: int) -> Schedule:
        known = self._schedules.get(num_micro_batches)
        if known is None:
            known = Schedule.generate(self._method, self.num_ranks, num_micro_batches)
            self._schedules[num_micro_batches] = known
        return known

    def step(
        self,
        *inputs: torch.Tensor | None,
        num_chunks: int = 0,
        criterion: Callable[..., torch.Tensor] | None = None,
        labels: torch.Tensor | Sequence[torch.Tensor | None] = (),
        return_outputs: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | tuple[torch.Tensor | None, ...] | None]:
        """Runs a training step, or under ``torch.no_grad()`` an inference step.

        Args:
            inputs: Inputs of the first stage, on the ranks that hold it; ignored elsewhere. Cut
                along ``batch_dim``.
            num_chunks: How many micro-batches, those of both directions together; at least 1.
            criterion: ``criterion(*outputs, *labels)`` gives a micro-batch's loss. Needed for
                training on the ranks that hold the last stage.
            labels: Labels, on the ranks that hold the last stage; a lone one may be given as it is.
            return_outputs: Return the last stage's outputs too.

        Returns:
            ``(loss, outputs)`` on the ranks that hold the last stage: the micro-batches' losses,
            stacked, and with ``return_outputs`` their outputs, put together along ``batch_dim``.
            ``(None, None)`` elsewhere.

        Raises:
            ScheduleError: ``num_micro_batches``.
            PipelineError: As :meth:`PipelineExecutor.step`.
        """
        executor = self.executor
        try:
            schedule = self._schedule(num_chunks)
            executor.boundaries = comm.given_specs()
        except (PipelineError, ScheduleError) as error:
            executor.refuse(error)
        if not any(stage.is_first for stage in executor.stages.values()):
            inputs = ()
        if isinstance(labels, torch.Tensor):
            labels = [labels]
        result = executor.step(
            *inputs,
            labels=labels,
            criterion=criterion,
            return_outputs=return_outputs,
            schedule=schedule,
        )
        return tuple(result)  # type: ignore[return-value]


class DualPipe(_DropIn):
    """Bidirectional pipeline: micro-batches enter at both ends, every stage lives on two ranks.

    Every rank makes one at the same time. Their number must be even.

    Args:
        modules: On rank r of P, stage r and stage P - 1 - r, both entered from rank 0.
        batch_dim: Along which dimension inputs, labels and outputs are batches.
        process_group: The ranks; by default the default group.
        rank_mapping: The pipeline rank of each rank of the group; by default the same.
        reduce_copies: Sum the gradients of the two copies of every stage at the end of each
            training step. By default, as published, that is left to the caller, after the step.
        options: As for :class:`~dualpipe.executor.PipelineExecutor`.

    In :meth:`step`, rank 0 and the last rank hold first and last stages both: each gives the
    inputs of its own half of the micro-batches, and gives the labels and gets the losses and
    outputs of the other's. A type of module that has ``overlapped_forward_backward`` runs
    overlapped pairs by it, where both modules are of that type.
    """

    _method = "dualpipe"

    def __init__(
        self,
        modules: Sequence[nn.Module],
        batch_dim: int = 0,
        process_group: dist.ProcessGroup | None = None,
        rank_mapping: Sequence[int] | None = None,
        *,
        reduce_copies: bool = False,
        **options: Any,
    ) -> None:
        options["reduce_copies"] = reduce_copies
        super().__init__(modules, batch_dim, process_group, rank_mapping, options)
        self.is_in_second_half = self.rank >= self.num_ranks // 2
        self.is_middle_rank = self.rank in {self.num_ranks // 2 - 1, self.num_ranks // 2}


class DualPipeV(_DropIn):
    """A V of stages: every rank holds two, and rank 0 gives the inputs and gets the losses.

    Every rank makes one at the same time.

    Args:
        modules: On rank r of P, stage r and stage 2P - 1 - r.
        batch_dim: Along which dimension inputs, labels and outputs are batches.
        process_group: The ranks; by default the default group.
        rank_mapping: The pipeline rank of each rank of the group; by default the same.
        options: As for :class:`~dualpipe.executor.PipelineExecutor`.

    A type of module that has ``overlapped_forward_backward`` runs overlapped pairs by it, where
    both modules are of that type.
    """

    _method = "dualpipev"

    def __init__(
        self,
        modules: Sequence[nn.Module],
        batch_dim: int = 0,
        process_group: dist.ProcessGroup | None = None,
        rank_mapping: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(modules, batch_dim, process_group, rank_mapping, options)
