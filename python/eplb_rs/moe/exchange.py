"""Token rows to the ranks of their experts, and back.

An :class:`Exchange` knows for one pass and layer where each row goes and where it comes back to.
Its two directions are each other's transposes, so the backward of one is the other.

Letters: D ranks, R slots of all ranks, S slots of this rank, T tokens, K experts of a token, N rows
at this rank's experts, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from eplb_rs.moe.experts import Groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eplb_rs.moe.rows import RowFunctions
    from eplb_rs.moe.sites import Sites

__all__ = ["CapacityExchange", "Exchange", "Flight", "UnevenExchange"]


class Flight:
    """Rows on their way."""

    def __init__(self, work: distributed.Work | None, buffer: Tensor) -> None:
        self._work, self._buffer = work, buffer

    def land(self) -> Tensor:
        """Waits for the rows (on a GPU: makes the current stream wait), in order of arrival."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._buffer


class Exchange:
    """Where the rows of one pass through one layer go; see the two ways to make one.

    Rows go from tokens to experts and back in that order or the other: what begins with `to_` is
    sent off and lands as it arrives, and what ends in `_landed` makes use of it.

    Attributes:
        groups: Which of the N rows here belong to which slot.
        got_S: `[S]` int64 on the device, how many rows each slot of this rank gets.
        sent_R: `[R]` int64 on the device, how many rows this rank has for each slot.
    """

    groups: Groups
    got_S: Tensor
    sent_R: Tensor
    _sites: Sites
    _rows: RowFunctions
    _sent_M: Tensor
    """`[M]`, which of the T*K rows stands at each place of the send buffer."""
    _place_TK: Tensor
    """`[T, K]`, the place in the send buffer of each row, or one behind it."""
    _arrived_N: Tensor
    """`[N]`, the place in the receive buffer of each row, or one behind it."""
    _back_A: Tensor
    """`[A]`, which of the N rows stands at each place of the receive buffer."""
    _gaps: tuple[bool, bool, bool]
    """Whether some of `_sent_M`, `_place_TK`, `_arrived_N` point behind the last row."""

    def to_experts(self, x_TH: Tensor) -> Flight:
        """Starts each token's row to its experts."""
        choices = self._place_TK.shape[1]
        sent = self._rows.gather(x_TH, self._sent_M, gaps=self._gaps[0], share=choices)
        return self._all_to_all(sent, back=False)

    def experts_landed(self, flight: Flight) -> Tensor:
        """Waits: `[N, H]`, grouped by slot; zeros where a group is filled up."""
        return self._rows.gather(flight.land(), self._arrived_N, gaps=self._gaps[2])

    def to_tokens(self, rows_NH: Tensor) -> Flight:
        """Starts rows back to their tokens."""
        return self._all_to_all(self._rows.gather(rows_NH, self._back_A, gaps=False), back=True)

    def tokens_landed(self, landed: Tensor, gate_TK: Tensor | None) -> Tensor:
        """Adds what has landed for each token, in order of k, times its gates: `[T, H]`."""
        return self._rows.weighted_sum(landed, self._place_TK, gate_TK, gaps=self._gaps[1])

    def spread_to_experts(
        self, grad_TH: Tensor, gate_TK: Tensor, landed: Tensor
    ) -> tuple[Flight, Tensor]:
        """The backward of :meth:`tokens_landed`: starts the gradients of the rows to their experts.

        Returns:
            Them, and the gradient of the gates, `[T, K]`.
        """
        grads, gate_grad = self._rows.spread(
            grad_TH, gate_TK, landed, self._place_TK, gaps=self._gaps[1]
        )
        return self._all_to_all(grads, back=False), gate_grad

    def _all_to_all(self, sent: Tensor, *, back: bool) -> Flight:
        raise NotImplementedError


class UnevenExchange(Exchange):
    """As many rows as there are. The host learns the sizes: the one time it waits for the device.

    Args:
        slot_TK: `[T, K]`, the slot of each row, as the sites count them, -1 for none.
        sites: Who takes part. A collective call: all ranks make theirs at once.
        rows: What gathers and adds.
        multiple: Each group is filled up with zero rows to a multiple of this.

    Cost: one all-to-all of R counts, one wait, one sort.
    """

    def __init__(
        self, slot_TK: Tensor, sites: Sites, rows: RowFunctions, *, multiple: int = 1
    ) -> None:
        self._sites, self._rows = sites, rows
        device = sites.device
        num_slots, here = sum(sites.slots), sites.num_slots
        ranks = len(sites.slots)
        slot_M, order, begin_R1 = _by_slot(slot_TK, num_slots)
        self.sent_R = counts_R = begin_R1.diff()
        counts_DS = torch.empty(ranks * here, dtype=torch.int64, device=device)
        distributed.all_to_all_single(
            counts_DS, counts_R, [here] * ranks, list(sites.slots), group=sites.group
        )
        # The rows of a source and slot arrive together; where they begin, and where they belong.
        counts = counts_DS.view(ranks, here)
        self.got_S = counts.sum(0)
        padded_S = -(-self.got_S // multiple) * multiple
        ends_S = padded_S.cumsum(0)
        begin = ends_S - padded_S + counts.cumsum(0) - counts
        arrives = counts_DS.cumsum(0) - counts_DS

        known: list[int] = torch.cat((counts_R, counts_DS)).tolist()  # the wait
        sent, got = known[:num_slots], known[num_slots:]
        self._to = _sums(sent, sites.slots)
        self._from = _sums(got, [here] * ranks)
        num_sent, num_got = sum(self._to), sum(self._from)
        self._sent_M = order[:num_sent]
        self._place_TK = _inverse(self._sent_M, slot_M.numel(), missing=num_sent).view_as(slot_TK)
        shift = torch.repeat_interleave(begin.flatten() - arrives, counts_DS, output_size=num_got)
        self._back_A = torch.arange(num_got, device=device) + shift
        sizes = [-(-sum(got[slot::here]) // multiple) * multiple for slot in range(here)]
        self._arrived_N = _inverse(self._back_A, sum(sizes), missing=num_got)
        self._gaps = (False, num_sent < slot_M.numel(), num_got < sum(sizes))
        self.groups = Groups(ends_S.int(), sizes, multiple)

    def _all_to_all(self, sent: Tensor, *, back: bool) -> Flight:
        to, here = (self._from, self._to) if back else (self._to, self._from)
        buffer = sent.new_empty(sum(here), *sent.shape[1:])
        work = distributed.all_to_all_single(
            buffer, sent, here, to, group=self._sites.group, async_op=True
        )
        return Flight(work, buffer)


class CapacityExchange(Exchange):
    """Room for so many rows from each rank to each other. Waits for nothing on the host, so it may
    be captured in a CUDA graph; what does not fit is counted, and whoever reads the results must
    look (:meth:`ExpertParallelMoE.raise_on_overflow`).

    Args:
        slot_TK: `[T, K]`, the slot of each row, as the sites count them, -1 for none.
        sites: Who takes part. A collective call: all ranks make theirs at once.
        rows: What gathers and adds.
        capacity: Rows from each rank to each other.
        overflow: One number on the device: gets the rows that did not fit, on any rank, added.
        multiple: As for :class:`UnevenExchange`.

    Memory: `D * capacity` rows at both ends, whatever is sent, and `S * (multiple - 1)` here.
    """

    def __init__(
        self,
        slot_TK: Tensor,
        sites: Sites,
        rows: RowFunctions,
        capacity: int,
        overflow: Tensor,
        *,
        multiple: int = 1,
    ) -> None:
        self._sites, self._rows = sites, rows
        device = sites.device
        ranks = len(sites.slots)
        slot_M, order, begin_R1 = _by_slot(slot_TK, sum(sites.slots))
        self.sent_R = begin_R1.diff()
        sorted_slot = slot_M[order]
        chosen = sorted_slot < len(sites.slot_ranks)
        rank_M = sites.slot_ranks[sorted_slot.clamp(max=len(sites.slot_ranks) - 1)]
        first_M = sites.first_slots[rank_M]
        within = torch.arange(len(order), device=device) - begin_R1[first_M]
        fits = chosen & (within < capacity)

        places = ranks * capacity
        place_M = torch.where(fits, rank_M * capacity + within, places)
        # One place more takes what does not fit or goes nowhere.
        sent = torch.full((places + 1,), slot_M.numel(), dtype=torch.int64, device=device)
        sent[place_M] = torch.where(fits, order, slot_M.numel())
        self._sent_M = sent[:places]
        self._place_TK = torch.empty_like(slot_M).scatter_(0, order, place_M).view_as(slot_TK)

        # Which slot of its rank each row is for, behind all slots where there is no row; and to
        # every rank how many rows did not fit here, so that all know and none goes on alone.
        nowhere = max(sites.slots)
        local = torch.full((places + 1,), nowhere, dtype=torch.int64, device=device)
        local[place_M] = torch.where(fits, sorted_slot - first_M, nowhere)
        missed = (chosen & ~fits).sum().expand(ranks, 1)
        told = torch.cat((local[:places].view(ranks, capacity), missed), dim=1)
        heard = torch.empty_like(told)
        distributed.all_to_all_single(heard, told, group=sites.group)
        overflow += heard[:, capacity].sum()
        arrived = heard[:, :capacity].flatten()
        arrived.clamp_(max=sites.num_slots)
        # Grouped by slot, each group filled up; behind them what is no row.
        in_order, by_slot = torch.sort(arrived, stable=True)
        here = sites.num_slots
        slots = torch.arange(here + 1, device=device)
        begin_S1 = torch.searchsorted(in_order, slots)
        self.got_S = begin_S1.diff()
        padded_S = -(-self.got_S // multiple) * multiple
        end_S = padded_S.cumsum(0)
        shift_S1 = torch.cat((end_S - padded_S, end_S[-1:])) - begin_S1
        place = torch.arange(places, device=device) + shift_S1[in_order]
        room = places + here * (multiple - 1)
        self._arrived_N = by_slot.new_full((room,), places).scatter_(0, place, by_slot)
        self._back_A = torch.empty_like(place).scatter_(0, by_slot, place)
        self._gaps = (True, True, multiple > 1)
        self.groups = Groups(end_S.int(), None, multiple)

    def _all_to_all(self, sent: Tensor, *, back: bool) -> Flight:
        del back  # both ways are alike
        buffer = torch.empty_like(sent)
        work = distributed.all_to_all_single(buffer, sent, group=self._sites.group, async_op=True)
        return Flight(work, buffer)


def _by_slot(slot_TK: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots with none behind all; the rows by slot, then by token; where each slot's begin."""
    slot_M = slot_TK.flatten()
    slot_M = torch.where(slot_M < 0, num_slots, slot_M)
    # A radix sort takes a pass for each byte.
    ordered, order = torch.sort(slot_M.int(), stable=True)
    slots = torch.arange(num_slots + 1, dtype=torch.int32, device=slot_M.device)
    return slot_M, order, torch.searchsorted(ordered, slots)


def _inverse(index: Tensor, size: int, *, missing: int) -> Tensor:
    """For each of `size` places, where `index` names it."""
    inverse = torch.full((size,), missing, dtype=torch.int64, device=index.device)
    inverse[index] = torch.arange(len(index), device=index.device)
    return inverse


def _sums(counts: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The sums of consecutive runs of these sizes."""
    remaining = iter(counts)
    return [sum(next(remaining) for _ in range(size)) for size in sizes]
