"""What one rank has to do for a layer to come from one plan to another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from eplb_rs.errors import InfeasibleError

if TYPE_CHECKING:
    import numpy.typing as npt

    from eplb_rs.moe.sites import Sites
    from eplb_rs.transfers import Transfers

__all__ = ["Hop", "LayerTask", "layer_tasks", "most_arriving"]


class Hop(NamedTuple):
    """An expert that this rank sends or receives."""

    way: Literal["send", "receive"]
    slot: int
    """Of this rank, counted from its first."""
    peer: int
    """The other process, as the group counts."""


@dataclass(slots=True)
class LayerTask:
    """A layer's move as one rank sees it; slots are counted from its first."""

    layer: int
    rounds: list[list[Hop]] = field(default_factory=list)
    """In each round at most one expert each way. As many rounds on every rank, so that all count
    alike; many are empty."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """From slot, to slot: of what is there before."""
    repeats: list[tuple[int, int]] = field(default_factory=list)
    """The same, of what has come."""
    loads: list[tuple[int, int]] = field(default_factory=list)
    """Expert, slot: from storage."""
    senders: dict[int, int] = field(default_factory=dict)
    """For each slot that receives, the one it comes from, in the numbering of the plan."""


def most_arriving(transfers: Transfers) -> npt.NDArray[np.int64]:
    """`[D]`, how many experts two layers bring to each rank at most."""
    arriving = np.zeros((transfers.num_layers, transfers.topology.num_gpus), dtype=np.int64)
    np.add.at(arriving, (transfers.layer, transfers.target), 1)
    most: npt.NDArray[np.int64] = np.sort(arriving, axis=0)[-2:].sum(axis=0)
    return most


def layer_tasks(transfers: Transfers, sites: Sites, *, can_load: bool) -> list[LayerTask]:
    """The tasks of this rank, for every layer that changes on any.

    Raises:
        InfeasibleError: ``missing_expert`` for one that no rank holds and nobody can load.
    """
    rank, first = sites.rank, sites.held.start
    member = {one: number for number, one in enumerate(sites.ranks)}
    tasks: dict[int, LayerTask] = {}
    table = transfers.table.tolist()
    for row, repeats in zip(table, transfers.repeats.tolist(), strict=True):
        layer, expert, source_slot, source, slot, target, number = row
        task = tasks.setdefault(layer, LayerTask(layer))
        if source < 0 and not can_load:
            raise InfeasibleError(
                code="missing_expert",
                argument="new",
                got=f"expert {expert} of layer {layer} in slot {slot}",
                expected="of experts that some rank holds",
                hint="`load=` reads lost experts from storage",
            )
        if source == target:
            if target == rank:
                copies = task.repeats if repeats else task.copies
                copies.append((source_slot - first, slot - first))
        elif source < 0:
            if target == rank:
                task.loads.append((expert, slot - first))
        else:
            while len(task.rounds) <= number:
                task.rounds.append([])
            if source == rank:
                task.rounds[number].append(Hop("send", source_slot - first, member[target]))
            if target == rank:
                task.rounds[number].append(Hop("receive", slot - first, member[source]))
                task.senders[slot - first] = source_slot
    return list(tasks.values())
