"""Stages that live on several ranks: equal at the start, their gradients reduced at the end."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dualpipe.errors import MismatchError, PipelineError
from dualpipe.executor.groups import make_group, waiting
from dualpipe.executor.reduction import GroupSums, PairSums, Sums

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from dualpipe.executor.stage import Stage
    from dualpipe.executor.transport.base import PairSum

__all__ = ["Copies"]

_CHUNK_BYTES = 1 << 24
"""How much of a stage is compared at once."""


class Copies:
    """The copies of this rank's stages.

    Args:
        modules: This rank's modules by stage.
        holders: The ranks, of the default group, that hold each stage.
        limit_s: How long a wait may last.
        pairs: What sums the gradients of stages with the other rank that holds them, by stage; all
            others are summed in groups.
    """

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        holders: Mapping[int, tuple[int, ...]],
        limit_s: float,
        pairs: Mapping[int, PairSum],
    ) -> None:
        self._modules = modules
        self._limit_s = limit_s
        made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for stage in sorted(modules):
            ranks = tuple(sorted(holders[stage]))
            if ranks not in made:
                made[ranks] = make_group(ranks, limit_s)
        self._made = list(made.values())
        self._groups = {stage: made[tuple(sorted(holders[stage]))] for stage in modules}
        self._holders = holders
        self._sums = self._make_sums(pairs)
        self._started: set[int] = set()
        self._reduced: list[
            tuple[torch.Tensor, weakref.ref[torch.Tensor], int, list[torch.Tensor]]
        ] = []
        """A parameter of those that were summed together, its gradient then, and all of them."""

    def _make_sums(self, pairs: Mapping[int, PairSum]) -> dict[int, Sums]:
        """What sums each part: a stage's own parameters, or what it shares with others.

        Parameters that are tied between stages of this rank are complete only when all of them
        are; they are a part of their own, below all stages.
        """
        owners: dict[nn.Parameter, list[int]] = {}
        for stage in sorted(self._modules):
            for parameter in self._modules[stage].parameters():
                owners.setdefault(parameter, []).append(stage)
        parts: dict[int, dict[int, list[torch.Tensor]]] = {}
        for parameter, stages in owners.items():
            part = stages[0] if len(stages) == 1 else _tied(stages[0])
            parts.setdefault(stages[0], {}).setdefault(part, []).append(parameter)
        sums: dict[int, Sums] = {}
        together: dict[PairSum, dict[int, list[torch.Tensor]]] = {}
        for stage, own in parts.items():
            if stage in pairs:
                together.setdefault(pairs[stage], {}).update(own)
            else:
                group = GroupSums(own, self._groups[stage], self._limit_s)
                sums.update(dict.fromkeys(own, group))
        for pair, own in together.items():
            sums.update(dict.fromkeys(own, PairSums(own, pair)))
        return sums

    def check_equal(self) -> None:
        """Compares parameters and buffers of the copies, byte for byte.

        Raises:
            MismatchError: ``copies``, on every rank that holds the stage.

        Cost: one broadcast of the stage within its copies.
        """
        with waiting(self._limit_s):
            for stage in sorted(self._modules):
                self._check_stage(stage)

    def _check_stage(self, stage: int) -> None:
        group = self._groups[stage]
        source = self._holders[stage][0]
        named = dict(_state(self._modules[stage]))
        mine = [(name, tuple(t.shape), str(t.dtype)) for name, t in named.items()]
        verdicts: list[Any] = [None] * group.size()
        dist.all_gather_object(verdicts, mine, group=group)
        different = next((v for v in verdicts if v != verdicts[0]), None)
        if different is not None:
            pairs = zip([*verdicts[0], None], [*different, None], strict=False)
            raise _unequal(stage, f"{next((a, b) for a, b in pairs if a != b)}")
        differing = [name for name, t in named.items() if not _same_bytes(t, source, group)]
        dist.all_gather_object(verdicts, differing, group=group)
        names = [name for names in verdicts for name in names]
        if names:
            raise _unequal(stage, f"another content of {names[0]!r}")

    def begin(self) -> None:
        """Looks at the start of a step whether gradients that are reduced would be reduced again.

        Raises:
            PipelineError: ``reduced_twice``.
        """
        for parameter, grad, version, together in self._reduced:
            present = parameter.grad
            if present is None or present is not grad() or present._version != version:
                continue
            # Whoever clears gradients by `.data` leaves no trace but zeros.
            if all(p.grad is None or not p.grad.count_nonzero() for p in together):
                continue
            raise PipelineError(
                code="reduced_twice",
                argument="grad",
                got="gradients that are summed over the copies already",
                expected="None or zero, since they would be summed again",
                hint="call zero_grad() between optimizer steps; to accumulate over several "
                "steps, pass accumulate=True to all but the last",
            )
        self._reduced = []

    def last(self, stage: Stage, backward: Callable[[], None]) -> None:
        """Runs the last backward of a stage; what it completes is summed at once."""
        sums = self._sums.get(stage.index)
        if sums is None:
            backward()
            return
        stage.gradient.added = partial(sums.ready, stage.index)
        try:
            backward()
        finally:
            stage.gradient.added = None

    def start(self, stage: int) -> None:
        """REDUCE_GRAD: starts the sum over the copies of a stage's gradients, which are complete."""
        self._started.add(stage)
        if stage in self._sums:
            self._sums[stage].start(stage)

    def wait(self, stage: int) -> None:
        """WAIT_REDUCE_GRAD: waits for it."""
        if stage in self._sums:
            self._sums[stage].wait(stage)

    def finish(self) -> None:
        """Ends a step: what no instruction has started, what is under way, what is tied."""
        for stage in sorted(self._groups, reverse=True):
            if stage not in self._started:
                self.start(stage)
        for part in self._sums:
            if part < 0:
                self._sums[part].start(part)
        for sums in dict.fromkeys(self._sums.values()):
            together = sums.finish()
            for parameter in together:
                if (grad := parameter.grad) is not None:
                    # One of them tells whether somebody has cleared them since.
                    self._reduced.append((parameter, weakref.ref(grad), grad._version, together))
                    break
        self._started.clear()

    def reset(self) -> None:
        """Drops what is under way."""
        for sums in self._sums.values():
            sums.drop()
        self._started.clear()

    def close(self) -> None:
        """Ends the groups."""
        self.reset()
        for group in self._made:
            dist.destroy_process_group(group)
        self._made = []
        self._groups = {}
        self._sums = {}


def _tied(stage: int) -> int:
    """The number of the part that a stage shares with others."""
    return -1 - stage


def _state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _chunks(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return torch.split(tensor.detach().contiguous().reshape(-1).view(torch.uint8), _CHUNK_BYTES)


def _same_bytes(tensor: torch.Tensor, source: int, group: dist.ProcessGroup) -> bool:
    """Whether a tensor has the bytes that it has at the source."""
    same = True
    for chunk in _chunks(tensor) if tensor.numel() else ():
        theirs = chunk.clone()
        dist.broadcast(theirs, src=source, group=group)
        same = same and torch.equal(chunk, theirs)
    return same


def _unequal(stage: int, got: str) -> MismatchError:
    return MismatchError(
        code="copies",
        argument="stages",
        got=f"copies of stage {stage} that differ: {got}",
        expected="equal byte for byte, parameters and buffers, since they are trained as one",
        hint="load the same state into both, or seed both alike",
    )
