"""Stages that live on several ranks: equal at the start, their gradients reduced at the end."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dualpipe.errors import MismatchError, PipelineError
from dualpipe.executor.groups import make_group, waiting

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

__all__ = ["Copies"]

_CHUNK_BYTES = 1 << 24
"""How much of a stage is compared at once."""

_SMALL_BYTES = 1 << 18
"""Gradients up to this size travel together; larger ones are reduced where they lie."""


class Copies:
    """The copies of this rank's stages.

    Args:
        modules: This rank's modules by stage.
        holders: The ranks, of the default group, that hold each stage.
        limit_s: How long a wait may last.
    """

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        holders: Mapping[int, tuple[int, ...]],
        limit_s: float,
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
        owners: dict[nn.Parameter, list[int]] = {}
        for stage in sorted(modules):
            for parameter in modules[stage].parameters():
                owners.setdefault(parameter, []).append(stage)
        self._own: dict[int, list[nn.Parameter]] = {stage: [] for stage in modules}
        # Tied between stages of this rank: complete only when all of them are.
        self._tied: dict[int, list[nn.Parameter]] = {}
        for parameter, stages in owners.items():
            part = self._own if len(stages) == 1 else self._tied
            part.setdefault(stages[0], []).append(parameter)
        self._started: set[int] = set()
        self._ended: list[_Reduction] = []
        self._under_way: dict[int, list[_Reduction]] = {}
        self._reduced: list[tuple[torch.Tensor, weakref.ref[torch.Tensor], int]] = []

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
        for parameter, grad, version in self._reduced:
            present = parameter.grad
            if present is not None and present is grad() and present._version == version:
                raise PipelineError(
                    code="reduced_twice",
                    argument="grad",
                    got="gradients that are summed over the copies already",
                    expected="None or zero, since they would be summed again",
                    hint="call zero_grad() between optimizer steps; to accumulate over several "
                    "steps, pass accumulate=True to all but the last",
                )
        self._reduced = []

    def start(self, stage: int) -> None:
        """REDUCE_GRAD: starts the sum over the copies of a stage's gradients, which are complete."""
        self._started.add(stage)
        self._under_way[stage] = [_Reduction(self._own[stage], self._groups[stage])]

    def wait(self, stage: int) -> None:
        """WAIT_REDUCE_GRAD: waits for it."""
        for reduction in self._under_way[stage]:
            with waiting(self._limit_s):
                reduction.wait()
            self._ended.append(reduction)
        del self._under_way[stage]

    def finish(self) -> None:
        """Ends a step: what no instruction has started, what is under way, what is tied."""
        for stage in sorted(self._groups):
            if stage not in self._started:
                self.start(stage)
        for stage in sorted(self._under_way):
            self.wait(stage)
        for stage in sorted(self._tied):
            self._under_way[stage] = [_Reduction(self._tied[stage], self._groups[stage])]
            self.wait(stage)
        for reduction in self._ended:
            reduction.forget_absent()
            for parameter in reduction.parameters:
                if (grad := parameter.grad) is not None:
                    # One of a stage tells whether somebody has cleared them since.
                    self._reduced.append((parameter, weakref.ref(grad), grad._version))
                    break
        self._ended.clear()
        self._started.clear()

    def reset(self) -> None:
        """Drops what is under way."""
        for reductions in self._under_way.values():
            for reduction in reductions:
                reduction.drop()
        self._under_way = {}
        self._started.clear()
        self._ended.clear()

    def close(self) -> None:
        """Ends the groups."""
        self.reset()
        for group in self._made:
            dist.destroy_process_group(group)
        self._made = []
        self._groups = {}


class _Reduction:
    """The sum over copies of some parameters' gradients, under way.

    Small gradients are gathered, large ones summed in place. A parameter without a gradient on
    any copy keeps none.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self._works: list[dist.Work] = []
        self._gathered: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        self._lacking: list[int] = []
        """Parameters without a gradient here."""
        if not self.parameters:
            return
        here = [parameter.grad is not None for parameter in self.parameters]
        self._lacking = [at for at, present in enumerate(here) if not present]
        device = self.parameters[0].device
        # Pinned, so that the host does not wait for the GPU in the middle of a step.
        pinned = torch.tensor(here, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._present = pinned.to(device, non_blocking=True)
        self._start(self._present, group)
        small: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
            grad = parameter.grad
            if grad.nbytes <= _SMALL_BYTES or not grad.is_contiguous():
                small.setdefault((grad.dtype, grad.device), []).append(grad)
            else:
                self._start(grad, group)
        for grads in small.values():
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            self._gathered.append((flat, grads))
            self._start(flat, group)

    def _start(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
        work = dist.all_reduce(tensor, group=group, async_op=True)
        assert work is not None
        self._works.append(work)

    def drop(self) -> None:
        self._works = []

    def wait(self) -> None:
        while self._works:
            self._works[0].wait()
            del self._works[0]
        for flat, grads in self._gathered:
            parts = torch.split(flat, [grad.numel() for grad in grads])
            for grad, part in zip(grads, parts, strict=True):
                grad.copy_(part.view_as(grad))

    def forget_absent(self) -> None:
        """Gives parameters without a gradient on any copy none, at the end of a step."""
        if self._lacking:
            present = self._present.tolist()
            for at in self._lacking:
                if not present[at]:
                    self.parameters[at].grad = None


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
