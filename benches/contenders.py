"""Who runs a pipeline step in the executor's benchmark: this executor, PyTorch's, DeepSeek's.

A contender is made in a process of its own on each rank, from the case and the rank, and has
`step()`, which gives the losses of the micro-batches that end on this rank (by their number), and
`share`, the layers that are this rank's part of the work.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from transformer import Case, loss_of, make_batch, make_layers

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CONTENDERS", "WARM_UP", "make_contender", "num_ranks"]

WARM_UP = 4
"""Steps before any is timed."""


def _layer_numbers(case: Case, stage: int, num_stages: int) -> range:
    each = case.layers // num_stages
    return range(stage * each, (stage + 1) * each)


class Ours:
    """PipelineExecutor with a generated schedule."""

    def __init__(self, case: Case, device: torch.device, method: str, **options: Any) -> None:
        from dualpipe import Schedule
        from dualpipe.executor import PipelineExecutor

        rank, size = dist.get_rank(), dist.get_world_size()
        self.schedule = Schedule.generate(method, size, case.num_micro_batches)
        placement = self.schedule.placement.tolist()
        stages = {
            (stage, copy): make_layers(
                case, _layer_numbers(case, stage, self.schedule.num_stages), device
            )
            for copy, ranks in enumerate(placement)
            for stage, holder in enumerate(ranks)
            if holder == rank
        }
        options.setdefault("reduce_copies", False)
        self.executor = PipelineExecutor(stages, self.schedule, **options)
        # With copies a rank's modules are the same work twice, each for half of the micro-batches.
        first_copy = next(iter(stages))[1]
        self.share = nn.Sequential(*(m for (_, copy), m in stages.items() if copy == first_copy))
        inputs, targets = make_batch(case, device)
        firsts = [0]
        for count in self.schedule.micro_batches:
            firsts.append(firsts[-1] + count)
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._labels: tuple[torch.Tensor, ...] = ()
        self._numbers: list[int] = []
        for copy, ranks in enumerate(placement):
            part = slice(firsts[copy], firsts[copy + 1])
            if ranks[0] == rank:
                self._inputs = (inputs[part].clone(),)
            if ranks[-1] == rank:
                self._labels = (targets[part].clone(),)
                self._numbers = list(range(part.start, part.stop))

    @property
    def num_bytes(self) -> int:
        """Of what this rank was given."""
        return sum(given.nbytes for given in (*self._inputs, *self._labels))

    def step(self) -> dict[int, torch.Tensor]:
        result = self.executor.step(
            *self._inputs, labels=self._labels, criterion=loss_of if self._labels else None
        )
        return {} if result.losses is None else dict(zip(self._numbers, result.losses, strict=True))

    def close(self) -> None:
        self.executor.close()


class Torch:
    """torch.distributed.pipelining."""

    def __init__(self, case: Case, device: torch.device, kind: str) -> None:
        from torch.distributed.pipelining import PipelineStage, schedules

        rank, size = dist.get_rank(), dist.get_world_size()
        is_v = kind != "Schedule1F1B"
        held = [rank, 2 * size - 1 - rank] if is_v else [rank]
        num_stages = size * len(held)
        modules = [make_layers(case, _layer_numbers(case, s, num_stages), device) for s in held]
        stages = [
            PipelineStage(module, stage, num_stages, device)
            for stage, module in zip(held, modules, strict=True)
        ]
        make = getattr(schedules, kind)
        given = stages if is_v else stages[0]
        self._schedule = make(given, case.num_micro_batches, loss_fn=loss_of, scale_grads=False)
        self.share = nn.Sequential(*modules)
        inputs, targets = make_batch(case, device)
        self._inputs = (inputs,) if 0 in held else ()
        self._target = targets if num_stages - 1 in held else None

    def step(self) -> dict[int, torch.Tensor]:
        losses: list[torch.Tensor] = []
        given = {} if self._target is None else {"target": self._target, "losses": losses}
        self._schedule.step(*self._inputs, **given)
        return dict(enumerate(loss.detach() for loss in losses))

    def close(self) -> None:
        pass


class DeepSeek:
    """DeepSeek's DualPipe, from a checkout named by DEEPSEEK_DUALPIPE."""

    def __init__(self, case: Case, device: torch.device, kind: str) -> None:
        # The package of the same name that the benchmark itself has imported makes room.
        for name in [name for name in sys.modules if name.partition(".")[0] == "dualpipe"]:
            del sys.modules[name]
        sys.path.insert(0, os.environ["DEEPSEEK_DUALPIPE"])
        import dualpipe

        where = os.path.realpath(str(dualpipe.__file__))
        assert where.startswith(os.path.realpath(os.environ["DEEPSEEK_DUALPIPE"])), where
        rank, size = dist.get_rank(), dist.get_world_size()
        is_v = kind == "DualPipeV"
        num_stages = 2 * size if is_v else size
        held = [rank, num_stages - 1 - rank]
        linear = _stored_linear()
        modules = [
            make_layers(case, _layer_numbers(case, s, num_stages), device, linear) for s in held
        ]
        dualpipe.set_p2p_tensor_shapes([(1, case.sequence, case.hidden)])
        dualpipe.set_p2p_tensor_dtype(case.dtype)
        self._model = getattr(dualpipe, kind)(tuple(modules))
        self.share = nn.Sequential(*modules) if is_v else modules[0]
        self._count = case.num_micro_batches
        inputs, targets = make_batch(case, device)
        half = self._count // 2
        self._numbers = range(self._count)
        if not is_v:
            # The first rank's labels belong to the last rank's inputs.
            self._numbers = range(half, self._count) if rank == 0 else range(half)
            inputs = (inputs[:half] if rank == 0 else inputs[half:]).clone()
            targets = (targets[half:] if rank == 0 else targets[:half]).clone()
        elif rank:
            inputs = targets = None
        self._inputs, self._targets = inputs, targets

    def step(self) -> dict[int, torch.Tensor]:
        loss, _ = self._model.step(
            self._inputs, num_chunks=self._count, criterion=loss_of, labels=(self._targets,)
        )
        return {} if loss is None else dict(zip(self._numbers, loss, strict=True))

    def close(self) -> None:
        pass


def _stored_linear() -> type[nn.Linear]:
    """A Linear layer that keeps its weight gradient for later, as DualPipe's users write it."""
    from dualpipe.utils import WeightGradStore

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, weight)
            return nn.functional.linear(x, weight)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            x, weight = ctx.saved_tensors

            def accumulate() -> None:
                found = grad.flatten(0, -2).T @ x.flatten(0, -2)
                if weight.grad is None:
                    weight.grad = found
                else:
                    weight.grad += found

            if WeightGradStore.enabled:
                WeightGradStore.put(accumulate)
            else:
                accumulate()
            return grad @ weight, None

    class StoredLinear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Product.apply(x, self.weight)

    return StoredLinear


def unfused(case: Case, device: torch.device, method: str, **options: Any) -> Ours:
    """This executor with weight gradients computed, and then added, as autograd does it."""
    return Ours(case, device, method, fuse_accumulation=False, **options)


CONTENDERS: dict[str, tuple[Callable[..., Any], str]] = {
    "DualPipe": (Ours, "dualpipe"),
    "DualPipeV": (Ours, "dualpipev"),
    "ZBV": (Ours, "zbv"),
    "1F1B": (Ours, "1f1b"),
    "DualPipe, gradients added by autograd": (unfused, "dualpipe"),
    "DualPipeV, gradients added by autograd": (unfused, "dualpipev"),
    "one rank": (Ours, "1f1b"),
    "one rank, gradients added by autograd": (unfused, "1f1b"),
    "DeepSeek DualPipe": (DeepSeek, "DualPipe"),
    "DeepSeek DualPipeV": (DeepSeek, "DualPipeV"),
    "torch 1F1B": (Torch, "Schedule1F1B"),
    "torch ZBVZeroBubble": (Torch, "ScheduleZBVZeroBubble"),
    "torch DualPipeV": (Torch, "ScheduleDualPipeV"),
}


def make_contender(name: str, case: Case, device: torch.device, **options: Any) -> Any:
    """The contender of that name on this rank."""
    kind, argument = CONTENDERS[name]
    return kind(case, device, argument, **options)


def num_ranks(name: str) -> int:
    """How many GPUs a contender runs on: with one there is nobody to wait for."""
    return 1 if name.startswith("one rank") else 2
