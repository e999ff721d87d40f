"""The sum over the copies of a stage of its gradients, while backwards go on.

Two ways: by all-reduce in a group (:class:`GroupSums`), a stage at a time; or, where the transport
can add tensors of two ranks up beside everything else (:class:`PairSums`), a weight at a time, as
soon as its gradient is complete.

A parameter without a gradient on any copy keeps none; one that only some copies have counts as
zero on the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from dualpipe.executor.groups import waiting

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dualpipe.executor.transport.base import PairSum

__all__ = ["GroupSums", "PairSums", "Sums"]

_SMALL_BYTES = 1 << 18
"""Gradients up to this size travel together; larger ones are summed where they lie."""


class Sums(ABC):
    """The sums of some *parts*, each a list of parameters, once in every optimizer step.

    Args:
        parts: The parameters by part; the same on all ranks that hold them.
    """

    def __init__(self, parts: Mapping[int, Sequence[torch.Tensor]]) -> None:
        self._parts = parts
        self._bundles: list[_Bundle] = []

    def ready(self, part: int, parameter: torch.Tensor) -> None:  # noqa: B027 - not all sum early
        """Says that the gradient of one of a part's parameters is complete, should it be one."""

    @abstractmethod
    def start(self, part: int) -> None:
        """Says that all gradients of a part are complete. Every part is started once a step."""

    @abstractmethod
    def wait(self, part: int) -> None:
        """Waits, or lets the current stream wait, for the sums of a part that are under way."""

    def finish(self) -> list[torch.Tensor]:
        """Ends a step, in which all parts have been started; the parameters."""
        for part in self._parts:
            self.wait(part)
        for bundle in self._bundles:
            bundle.forget_absent()
        self._bundles = []
        return [parameter for parameters in self._parts.values() for parameter in parameters]

    def drop(self) -> None:
        """Leaves what is under way."""
        self._bundles = []


class GroupSums(Sums):
    """By all-reduce.

    Args:
        parts: As for all.
        group: The ranks that hold them.
        limit_s: How long a wait may last.
    """

    def __init__(
        self,
        parts: Mapping[int, Sequence[torch.Tensor]],
        group: dist.ProcessGroup,
        limit_s: float,
    ) -> None:
        super().__init__(parts)
        self._group = group
        self._limit_s = limit_s
        self._under_way: dict[int, tuple[_Bundle, list[dist.Work]]] = {}

    def start(self, part: int) -> None:
        parameters = self._parts[part]
        bundle = _Bundle(parameters)
        self._bundles.append(bundle)
        tensors = [*map(bundle.tensor_of, bundle.large), *bundle.pack()]
        works: list[dist.Work] = []
        for tensor in tensors:
            work = dist.all_reduce(tensor, group=self._group, async_op=True)
            assert work is not None
            works.append(work)
        self._under_way[part] = bundle, works

    def wait(self, part: int) -> None:
        if part not in self._under_way:
            return
        bundle, works = self._under_way[part]
        with waiting(self._limit_s):
            while works:
                works[0].wait()
                del works[0]
        bundle.unpack()
        del self._under_way[part]

    def drop(self) -> None:
        super().drop()
        for _, works in self._under_way.values():
            works.clear()
        self._under_way = {}


class PairSums(Sums):
    """By a transport, with one other rank.

    Both ranks give it the same tensors in the same order, whatever the order in which they get
    them: later parts first, and in a part later parameters first, as backwards compute them; then
    what is small.

    Args:
        parts: As for all.
        pair: What sums.
    """

    def __init__(self, parts: Mapping[int, Sequence[torch.Tensor]], pair: PairSum) -> None:
        super().__init__(parts)
        self._pair = pair
        self._order = sorted(self._parts, reverse=True)
        self._open: dict[int, _Bundle] = {}
        self._ready: set[tuple[int, torch.Tensor]] = set()
        self._complete: set[int] = set()
        self._at = 0
        """The part whose tensors are given next, counted in the order."""
        self._num_given = 0
        """How many of its large ones have been given."""

    def ready(self, part: int, parameter: torch.Tensor) -> None:
        self._ready.add((part, parameter))
        self._give()

    def start(self, part: int) -> None:
        self._complete.add(part)
        self._give()

    def _give(self) -> None:
        """Gives what is complete, as far as the order goes."""
        while self._at < len(self._order):
            part = self._order[self._at]
            bundle = self._open.get(part)
            if bundle is None:
                bundle = self._open[part] = _Bundle(self._parts[part])
                self._bundles.append(bundle)
            complete = part in self._complete
            for parameter in bundle.large[::-1][self._num_given :]:
                if not complete and (part, parameter) not in self._ready:
                    return
                self._pair.add(bundle.tensor_of(parameter))
                self._num_given += 1
            if not complete:
                return
            for tensor in bundle.pack():
                self._pair.add(tensor)
            self._at += 1
            self._num_given = 0

    def wait(self, part: int) -> None:
        if part in self._order[: self._at]:
            self._pair.wait()
            self._open[part].unpack()

    def finish(self) -> list[torch.Tensor]:
        parameters = super().finish()
        self._reset()
        return parameters

    def drop(self) -> None:
        super().drop()
        self._reset()

    def _reset(self) -> None:
        self._open = {}
        self._ready = set()
        self._complete = set()
        self._at = self._num_given = 0


class _Bundle:
    """Gradients of parameters as tensors to sum: the large where they lie, the small together."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self.large = [p for p in self._parameters if p.nbytes > _SMALL_BYTES]
        self._small = [p for p in self._parameters if p.nbytes <= _SMALL_BYTES]
        self._lacking: list[tuple[int, torch.Tensor]] = []
        """Parameters without a gradient here, with their places."""
        self._copied: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        """What is summed in memory of its own, and where it belongs."""
        self._present: torch.Tensor | None = None
        self._noted: set[torch.Tensor] = set()

    def tensor_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The gradient of a large parameter, or a contiguous copy of it."""
        grad = self._grad_of(parameter)
        if grad.is_contiguous():
            return grad
        copied = grad.contiguous()
        self._copied.append((copied, [grad]))
        return copied

    def pack(self) -> list[torch.Tensor]:
        """The small ones together, by dtype; and which parameters have a gradient at all."""
        if not self._parameters:
            return []
        small: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter in self._small:
            grad = self._grad_of(parameter)
            small.setdefault(grad.dtype, []).append(grad)
        packed = []
        for grads in small.values():
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            self._copied.append((flat, grads))
            packed.append(flat)
        device = self._parameters[0].device
        here = torch.ones(len(self._parameters), dtype=torch.int32, device="cpu")
        for at, parameter in enumerate(self._parameters):
            if parameter in self._noted:
                here[at] = 0
                self._lacking.append((at, parameter))
        if device.type == "cuda":
            # Pinned, so that the host does not wait for the GPU in the middle of a step.
            here = here.pin_memory()
        self._present = here.to(device, non_blocking=True)
        return [*packed, self._present]

    def unpack(self) -> None:
        """Puts what was summed elsewhere where it belongs."""
        for flat, grads in self._copied:
            parts = torch.split(flat.view(-1), [grad.numel() for grad in grads])
            for grad, part in zip(grads, parts, strict=True):
                grad.copy_(part.view(grad.shape))
        self._copied = []

    def forget_absent(self) -> None:
        """Gives parameters without a gradient on any copy none, at the end of a step."""
        if self._lacking:
            assert self._present is not None
            present = self._present.tolist()
            for at, parameter in self._lacking:
                if not present[at]:
                    parameter.grad = None

    def _grad_of(self, parameter: torch.Tensor) -> torch.Tensor:
        if parameter.grad is None:
            self._noted.add(parameter)
            parameter.grad = torch.zeros_like(parameter)
        elif parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()
        return parameter.grad
