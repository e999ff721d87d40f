"""What user code takes from ``dualpipe.utils``: the published names, with the published behaviour."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["WeightGradStore", "run_backward"]


class WeightGradStore:
    """Weight gradients that a module keeps for later.

    A module that computes them itself asks ``enabled`` in its backward: if it is set, it gives
    ``put`` a function that computes them, and the executor calls it when the schedule says W;
    otherwise it computes them at once. One store for the process, as published: the executor takes what a
    backward has put as soon as that backward ends, so pipelines that step in turn do not meet.
    """

    enabled: ClassVar[bool] = False
    cache: ClassVar[list[Callable[[], Any]]] = []
    funcs_queue: ClassVar[queue.Queue[list[Callable[[], Any]]]] = queue.Queue()

    @classmethod
    def put(cls, func: Callable[[], Any]) -> None:
        """Keeps a function for later."""
        cls.cache.append(func)

    @classmethod
    def flush(cls) -> None:
        """Closes the present micro-batch: what was put goes into the queue as one entry."""
        cls.funcs_queue.put(cls.cache)
        cls.cache = []

    @classmethod
    def pop(cls) -> None:
        """Runs the oldest entry of the queue.

        Raises:
            IndexError: The queue is empty.
        """
        if cls.funcs_queue.empty():
            raise IndexError("WeightGradStore.pop: nothing was flushed")
        for func in cls.funcs_queue.get():
            func()

    @classmethod
    def clear(cls) -> None:
        """Forgets everything."""
        cls.cache = []
        cls.funcs_queue = queue.Queue()


def run_backward(
    tensors: Sequence[torch.Tensor], grad_tensors: Sequence[torch.Tensor | None]
) -> None:
    """Backward from tensors, given their gradients; leaves that it does not reach are left alone."""
    torch.autograd.Variable._execution_engine.run_backward(
        tuple(tensors),
        tuple(grad_tensors),
        keep_graph=False,
        create_graph=False,
        inputs=(),
        allow_unreachable=True,
        accumulate_grad=True,
    )
