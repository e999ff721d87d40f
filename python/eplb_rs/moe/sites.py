"""Who takes part: the processes of a group, the rank of the plan that each is, and its slots.

A process for each rank of the plan; or one for each that is not dead: those that are left when
ranks are lost keep their numbers and their slots, and go on in a smaller group.

Letters: D processes, R slots of the plan, S slots of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed

from eplb_rs.errors import InvalidInputError

if TYPE_CHECKING:
    from eplb_rs.plan import Plan

__all__ = ["Sites", "members"]


@dataclass(frozen=True)
class Sites:
    """The processes of a group and their slots.

    Slots are counted over these processes, one behind the other: as in the plan, but that dead
    ranks without a process are left out. :attr:`numbers` leads from the plan's to these.

    Attributes:
        group: The processes.
        ranks: The rank of the plan that each process is.
        slots: How many slots each process has.
        plan_slots: How many slots each rank of the plan has.
        device: Where rows are.
    """

    group: distributed.ProcessGroup
    ranks: tuple[int, ...]
    slots: tuple[int, ...]
    plan_slots: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(
        cls,
        plan: Plan,
        group: distributed.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> Sites:
        """Those of a plan.

        Args:
            plan: Where experts live.
            group: The processes, in order of the plan's ranks: all of them, or those that are not
                dead; by default all of torch.distributed's.
            device: Where rows are.

        Raises:
            InvalidInputError: ``missing_group``; ``wrong_shape`` if the group has another number
                of processes.
        """
        group, topology = members(group), plan.topology
        everyone = range(topology.num_gpus)
        live = tuple(rank for rank in everyone if rank not in topology.dead)
        ranks = {len(live): live, len(everyone): tuple(everyone)}.get(group.size())
        if ranks is None:
            raise InvalidInputError(
                code="wrong_shape",
                argument="group",
                got=f"{group.size()} ranks",
                expected=f"{len(everyone)} ranks, as the plan has"
                + f", or the {len(live)} that are not dead" * (len(live) < len(everyone)),
            )
        slots = tuple(topology.slots)
        here = tuple(slots[rank] for rank in ranks)
        return cls(group, ranks, here, slots, torch.device(device))

    @property
    def member(self) -> int:
        """This process, as the group counts."""
        return self.group.rank()

    @property
    def rank(self) -> int:
        """This rank, as the plan counts."""
        return self.ranks[self.member]

    @property
    def held(self) -> range:
        """The slots of this rank, as the plan counts."""
        first = sum(self.plan_slots[: self.rank])
        return range(first, first + self.num_slots)

    @property
    def num_slots(self) -> int:
        """S."""
        return self.slots[self.member]

    @cached_property
    def numbers(self) -> npt.NDArray[np.int64]:
        """`[R + 1]`, each slot of the plan as counted here; -1 on ranks without a process, and at
        the end for what is no slot."""
        present = self.slot_members >= 0
        return np.append(np.where(present, present.cumsum() - 1, -1), -1)

    @cached_property
    def present(self) -> Tensor:
        """Each slot counted here, as the plan counts it."""
        return torch.from_numpy(np.flatnonzero(self.slot_members >= 0)).to(self.device)

    @cached_property
    def slot_members(self) -> npt.NDArray[np.int64]:
        """`[R]`, the process that has each slot of the plan; -1 for none."""
        held = np.full(len(self.plan_slots), -1, dtype=np.int64)
        held[list(self.ranks)] = np.arange(len(self.ranks))
        return np.repeat(held, self.plan_slots)

    @cached_property
    def first_slots(self) -> Tensor:
        """`[D]`, the first slot of each process, as counted here."""
        return torch.tensor([0, *accumulate(self.slots)][:-1], device=self.device)

    @cached_property
    def slot_ranks(self) -> Tensor:
        """The process of each slot, as counted here."""
        processes = [process for process, count in enumerate(self.slots) for _ in range(count)]
        return torch.tensor(processes, device=self.device)


def members(group: distributed.ProcessGroup | None) -> distributed.ProcessGroup:
    """A group that this process is in; by default all of torch.distributed's.

    Raises:
        InvalidInputError: ``missing_group``.
    """
    found: Any = group or distributed.group.WORLD
    if not isinstance(found, distributed.ProcessGroup):
        raise InvalidInputError(
            code="missing_group",
            argument="group",
            got="none" if found is None else "a group without this rank",
            expected="a group of torch.distributed that this rank is in",
            hint="`torch.distributed.init_process_group` first",
        )
    return found
