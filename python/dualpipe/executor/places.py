"""Which rank of a group holds which stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from dualpipe.errors import PipelineError
from dualpipe.executor.graphs import GraphedStage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualpipe.executor.stage import Stage
    from dualpipe.schedule import Schedule

__all__ = ["Places", "group_ranks", "held_stages"]


class Places:
    """Who holds what, seen from one rank.

    Args:
        given: This rank's modules, as :func:`held_stages` takes them.
        schedule: Says where stages live.
        group: The ranks.
        ranks: The pipeline rank of each of them; None where they are the same.

    Raises:
        PipelineError: ``group_size``, ``ranks``, ``stages``, ``device``.
    """

    def __init__(
        self,
        given: Mapping[Any, nn.Module] | Sequence[nn.Module],
        schedule: Schedule,
        group: dist.ProcessGroup,
        ranks: Sequence[int] | None,
    ) -> None:
        self.group_ranks = group_ranks(ranks, schedule.num_ranks, group.size())
        """The group's rank of every pipeline rank, `[P]`."""
        self.rank = self.group_ranks.index(group.rank())
        """This one's pipeline rank."""
        self.stages = held_stages(given, schedule, self.rank)
        """Its stages, by stage and copy."""
        self._placement: list[list[int]] = schedule.placement.tolist()
        self._group = group

    @cached_property
    def has_last(self) -> bool:
        """Whether the last stage is here."""
        return any(stage.is_last for stage in self.stages.values())

    @cached_property
    def peers(self) -> dict[tuple[int, int], int]:
        """The group's rank that holds each stage and copy."""
        return {
            (stage, copy): self.group_ranks[rank]
            for copy, row in enumerate(self._placement)
            for stage, rank in enumerate(row)
        }

    @cached_property
    def holders(self) -> dict[int, tuple[int, ...]]:
        """The ranks, of the default group, that hold the copies of each stage of this rank."""
        ranks = dist.get_process_group_ranks(self._group)
        copies = range(len(self._placement))
        return {
            index: tuple(ranks[self.peers[index, copy]] for copy in copies)
            for index, _ in self.stages
        }

    @cached_property
    def mirrors(self) -> dict[int, int]:
        """The group's rank that holds the only other copy of each stage of this rank, if one does."""
        copies = range(len(self._placement))
        return {
            stage: self.peers[stage, 1 - copy]
            for stage, copy in self.stages
            if len(copies) == 2 and (stage, 1 - copy) not in self.stages
        }

    def trained(self, *, with_gradients: bool) -> tuple[Any, ...]:
        """How this rank's modules are set: which are in training mode, which parameters learn.

        What crosses boundaries, and which gradients come back, may follow from it.

        Cost: .3 us a parameter.
        """
        training = tuple(stage.module.training for stage in self.stages.values())
        if not with_gradients:
            return (training,)
        learning = (
            bytes(
                parameter.requires_grad
                for module in stage.modules
                for parameter in module._parameters.values()
                if parameter is not None
            )
            for stage in self.stages.values()
        )
        return training, *learning

    @cached_property
    def device(self) -> torch.device:
        """Where the parameters of the stages live; the CPU where there is none.

        Raises:
            PipelineError: ``device`` where they live on several.
        """
        found = {
            parameter.device: index
            for (index, _), stage in self.stages.items()
            for parameter in stage.module.parameters()
        }
        if len(found) > 1:
            raise PipelineError(
                code="device",
                argument="stages",
                got=", ".join(
                    f"parameters of stage {i} on {device}" for device, i in found.items()
                ),
                expected="modules on one device",
                hint="move them there, or say by `device` where their inputs live",
            )
        return next(iter(found), torch.device("cpu"))


def group_ranks(ranks: Sequence[int] | None, num_ranks: int, group_size: int) -> list[int]:
    """The group's rank of every pipeline rank, `[P]`.

    Args:
        ranks: The pipeline rank of each rank of the group; None where they are the same.
        num_ranks: P.
        group_size: How many ranks the group has.

    Raises:
        PipelineError: ``group_size``, ``ranks``.
    """
    if group_size != num_ranks:
        raise PipelineError(
            code="group_size",
            argument="group",
            got=f"{group_size} ranks",
            expected=f"{num_ranks}, as the schedule has",
        )
    every = range(num_ranks)
    asked: object = every if ranks is None else ranks
    given = list(asked) if isinstance(asked, Iterable) else []
    if len(given) != num_ranks or any(rank not in given for rank in every):
        raise PipelineError(
            code="ranks",
            argument="ranks",
            got=repr(ranks),
            expected=f"every pipeline rank from 0 to {num_ranks - 1} once",
        )
    return [given.index(rank) for rank in every]


def held_stages(
    given: Mapping[Any, nn.Module] | Sequence[nn.Module], schedule: Schedule, rank: int
) -> dict[tuple[int, int], Stage]:
    """The stages of a pipeline rank, by stage and copy, in the order of copy, then stage.

    Args:
        given: Modules in that order, or by stage, or by stage and copy.
        schedule: Says where stages live.
        rank: The pipeline rank.

    Raises:
        PipelineError: ``stages``.
    """
    placement = schedule.placement.tolist()
    places = [
        (stage, copy)
        for copy, row in enumerate(placement)
        for stage, holder in enumerate(row)
        if holder == rank
    ]
    lone: Any = given
    if isinstance(lone, nn.Module) and not isinstance(lone, (nn.ModuleList, nn.Sequential)):
        raise PipelineError(
            code="stages",
            argument="stages",
            got=f"a module, {type(lone).__name__}",
            expected="a mapping from stage to module, or a list of modules",
        )
    if isinstance(given, Mapping):
        modules = {key if isinstance(key, tuple) else (key, 0): m for key, m in given.items()}
    else:
        modules = dict(zip(places, given, strict=False)) if len(given) == len(places) else {}
    if sorted(modules) != sorted(places):
        raise PipelineError(
            code="stages",
            argument="stages",
            got=f"modules for {sorted(modules)}" if modules else f"{len(given)} modules",
            expected=f"one for each stage and copy on pipeline rank {rank}: {places}",
        )
    for (stage, _), module in modules.items():
        if not isinstance(module, nn.Module):
            raise PipelineError(
                code="stages",
                argument="stages",
                got=f"a {type(module).__name__} for stage {stage}",
                expected="a torch.nn.Module for every stage",
            )
    stages: dict[tuple[int, int], Stage] = {
        (stage, copy): GraphedStage(modules[stage, copy], stage, copy, schedule.num_stages)
        for stage, copy in places
    }
    for (index, copy), stage in stages.items():
        stage.previous = stages.get((index - 1, copy))
        stage.next = stages.get((index + 1, copy))
    return stages
