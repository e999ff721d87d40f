"""What has to be sent for one plan to take the place of another.

Letters: T transfers, L layers, D ranks (GPUs).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from eplb_rs.errors import InvalidInputError

if TYPE_CHECKING:
    import numpy.typing as npt

    from eplb_rs import _core

__all__ = ["Transfers"]


@dataclass(frozen=True, eq=False)
class Transfers:
    """A list of transfers, by layer and slot, from :meth:`eplb_rs.Plan.transfers`.

    Attributes:
        table: `[T, 7]` int64, read-only: layer, expert, source slot, source rank, slot, rank,
            round. Source and round are -1 for an expert that no live rank holds, to be loaded from
            storage; the round is -1 for a copy from slot to slot of one rank.
        topology: The machines.
        by_layer: Whether each layer has rounds of its own.
    """

    table: npt.NDArray[np.int64]
    topology: _core.Topology
    by_layer: bool

    def __len__(self) -> int:
        return len(self.table)

    @property
    def layer(self) -> npt.NDArray[np.int64]:
        """`[T]`, the layer."""
        return self.table[:, 0]

    @property
    def expert(self) -> npt.NDArray[np.int64]:
        """`[T]`, the expert."""
        return self.table[:, 1]

    @property
    def source_slot(self) -> npt.NDArray[np.int64]:
        """`[T]`, the slot it comes from."""
        return self.table[:, 2]

    @property
    def source(self) -> npt.NDArray[np.int64]:
        """`[T]`, the rank it comes from."""
        return self.table[:, 3]

    @property
    def slot(self) -> npt.NDArray[np.int64]:
        """`[T]`, the slot it goes to."""
        return self.table[:, 4]

    @property
    def target(self) -> npt.NDArray[np.int64]:
        """`[T]`, the rank it goes to."""
        return self.table[:, 5]

    @property
    def round(self) -> npt.NDArray[np.int64]:
        """`[T]`, the round."""
        return self.table[:, 6]

    @cached_property
    def num_rounds(self) -> int:
        """How many rounds there are; of the layer with most, where layers have their own."""
        return int(self.round.max(initial=-1)) + 1

    @property
    def num_from_storage(self) -> int:
        """How many experts no live rank holds."""
        return int((self.source < 0).sum())

    def num_bytes(self, expert_bytes: float) -> float:
        """How many bytes go from rank to rank, if an expert of a layer has so many."""
        return expert_bytes * int((self.round >= 0).sum())

    def predicted_s(
        self,
        expert_bytes: float,
        *,
        intra_node_gb_s: float,
        inter_node_gb_s: float,
        latency_us: float = 0.0,
    ) -> float:
        """How long the rounds take one after the other, in seconds.

        A round takes as long as its slowest transfer: an expert over a link within a node or
        between nodes. Copies on a rank and loads from storage are left out.

        Args:
            expert_bytes: The bytes of one expert of one layer.
            intra_node_gb_s: What a rank sends to another of its node, in 1e9 bytes a second.
            inter_node_gb_s: What it sends to one of another node.
            latency_us: What each round takes besides, in microseconds.

        Raises:
            InvalidInputError: ``out_of_range`` for a number that is not above zero (the latency:
                below zero).
        """
        for name, value in (
            ("expert_bytes", expert_bytes),
            ("intra_node_gb_s", intra_node_gb_s),
            ("inter_node_gb_s", inter_node_gb_s),
        ):
            if not 0 < value < float("inf"):
                raise _out_of_range(name, value, "above 0")
        if not 0 <= latency_us < float("inf"):
            raise _out_of_range("latency_us", latency_us, "0 or more")
        sent = self.round >= 0
        if not sent.any():
            return 0.0
        per_node = self.topology.gpus_per_node
        near = self.source[sent] // per_node == self.target[sent] // per_node
        seconds = expert_bytes / np.where(near, intra_node_gb_s, inter_node_gb_s) / 1e9
        first = self.layer[sent] * self.num_rounds if self.by_layer else 0
        rounds, index = np.unique(first + self.round[sent], return_inverse=True)
        slowest = np.zeros(len(rounds))
        np.maximum.at(slowest, index, seconds)
        return float(slowest.sum()) + len(rounds) * latency_us * 1e-6

    def __repr__(self) -> str:
        return f"<{len(self)} transfers in {self.num_rounds} rounds>"


def _out_of_range(argument: str, got: object, expected: str) -> InvalidInputError:
    return InvalidInputError(
        code="out_of_range", argument=argument, got=repr(got), expected=f"finite and {expected}"
    )
