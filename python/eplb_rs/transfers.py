"""What has to be sent for one plan to take the place of another.

Letters: T transfers, L layers, D ranks (GPUs).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from eplb_rs import _core
from eplb_rs._inputs import as_expert_bytes, as_number

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["TransferLimits", "Transfers"]


@dataclass(frozen=True, eq=False)
class Transfers:
    """A list of transfers, by layer and slot, from :meth:`eplb_rs.Plan.transfers`.

    Attributes:
        table: `[T, 7]` int64, read-only: layer, expert, source slot, source rank, slot, rank,
            round. Source and round are -1 for an expert that no live rank holds, to be loaded from
            storage; the round is -1 for a copy from slot to slot of one rank. What a rank gets for
            several slots comes to the first of them, and from there to the others: see
            :attr:`repeats`.
        topology: The machines.
        num_layers: L.
        by_layer: Whether each layer has rounds of its own.
    """

    table: npt.NDArray[np.int64]
    topology: _core.Topology
    num_layers: int
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
    def repeats(self) -> npt.NDArray[np.bool_]:
        """`[T]`, whether it is a copy on a rank of what has come to another of its slots: to be
        made after that, where other copies are of what the slots held before."""
        come = self.source != self.target
        arrived = np.full((self.num_layers, self.topology.num_slots), -1, dtype=np.int64)
        arrived[self.layer[come], self.slot[come]] = self.expert[come]
        repeats: npt.NDArray[np.bool_] = ~come
        repeats &= arrived[self.layer, self.source_slot] == self.expert
        return repeats

    @cached_property
    def num_rounds(self) -> int:
        """How many rounds there are; of the layer with most, where layers have their own."""
        return int(self.round.max(initial=-1)) + 1

    @property
    def num_from_storage(self) -> int:
        """How many experts no live rank holds."""
        return int((self.source < 0).sum())

    def num_bytes(self, expert_bytes: npt.ArrayLike) -> float:
        """How many bytes go from rank to rank.

        Args:
            expert_bytes: The bytes of an expert of one layer: a number, or one for each layer.

        Raises:
            InvalidInputError: As :meth:`predicted_s`.
        """
        return float(self._expert_bytes(expert_bytes)[self.layer[self.round >= 0]].sum())

    def rank_bytes(self, expert_bytes: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """`[D, 2]` float64: the bytes that each rank sends to others, and those it gets from them or
        from storage.

        Args:
            expert_bytes: As for :meth:`num_bytes`.

        Raises:
            InvalidInputError: As :meth:`predicted_s`.
        """
        bytes_T = self._expert_bytes(expert_bytes)[self.layer]
        come = self.source != self.target
        sent = self.round >= 0
        num_gpus = self.topology.num_gpus
        return np.stack(
            [
                np.bincount(self.source[sent], bytes_T[sent], num_gpus),
                np.bincount(self.target[come], bytes_T[come], num_gpus),
            ],
            axis=1,
        )

    def predicted_s(
        self,
        expert_bytes: npt.ArrayLike,
        *,
        intra_node_gb_s: float,
        inter_node_gb_s: float,
        latency_us: float = 0.0,
    ) -> float:
        """How long the rounds take one after the other, in seconds.

        A round takes as long as its slowest transfer: an expert over a link within a node or
        between nodes. Copies on a rank and loads from storage are left out.

        Args:
            expert_bytes: The bytes of an expert of one layer: a number, or one for each layer.
            intra_node_gb_s: What a rank sends to another of its node, in 1e9 bytes a second.
            inter_node_gb_s: What it sends to one of another node.
            latency_us: What each round takes besides, in microseconds.

        Raises:
            InvalidInputError: ``out_of_range`` for a number that is not above zero (the latency:
                below zero); ``wrong_type``; ``wrong_shape`` for the bytes.
        """
        links = as_links(intra_node_gb_s, inter_node_gb_s, latency_us)
        expert_bytes = self._expert_bytes(expert_bytes)
        return _core.predicted_s(self.table, self.topology, self.by_layer, expert_bytes, links)

    def _expert_bytes(self, expert_bytes: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return as_expert_bytes(expert_bytes, self.num_layers)

    def __repr__(self) -> str:
        return f"<{len(self)} transfers in {self.num_rounds} rounds>"


@dataclass(frozen=True, kw_only=True, eq=False)
class TransferLimits:
    """What may be sent for a plan to take the place of another.

    Attributes:
        expert_bytes: The bytes of an expert of one layer: a number, or one for each layer.
        max_bytes_per_rank: The most that any rank sends to others, and that any gets, over all
            layers.
        max_seconds: The longest that the transfers are predicted to take, as
            :meth:`Transfers.predicted_s` has it, over links of these speeds:
        intra_node_gb_s: What a rank sends to another of its node, in 1e9 bytes a second.
        inter_node_gb_s: What it sends to one of another node.
        latency_us: What each round takes besides, in microseconds.
        by_layer: Whether each layer has rounds of its own.
    """

    expert_bytes: npt.ArrayLike
    max_bytes_per_rank: float | None = None
    max_seconds: float | None = None
    intra_node_gb_s: float | None = None
    inter_node_gb_s: float | None = None
    latency_us: float = 0.0
    by_layer: bool = True

    def _checked(self, num_layers: int) -> _core._Limits:
        """As the native module takes them."""
        expert_bytes = as_expert_bytes(self.expert_bytes, num_layers).tolist()
        most = self.max_bytes_per_rank
        most = None if most is None else as_number(most, "max_bytes_per_rank")
        seconds, links = self.max_seconds, (1.0, 1.0, 0.0)
        if seconds is not None:
            seconds = as_number(seconds, "max_seconds")
            links = as_links(self.intra_node_gb_s, self.inter_node_gb_s, self.latency_us)
        return expert_bytes, most, seconds, links, bool(self.by_layer)


def as_links(intra_node_gb_s: object, inter_node_gb_s: object, latency_us: object) -> _core._Links:
    """Speeds and latency as the native module takes them.

    Raises:
        InvalidInputError: ``wrong_type`` or ``out_of_range``.
    """
    return (
        as_number(intra_node_gb_s, "intra_node_gb_s", above=True),
        as_number(inter_node_gb_s, "inter_node_gb_s", above=True),
        as_number(latency_us, "latency_us"),
    )
