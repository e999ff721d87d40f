"""The backward of a stage: whole (B), or as an input part (I) and a weight part (W).

Any module can be split, as it is: the cut runs through the autograd graph (:mod:`.cut`), and the
sum of the two parts is the whole backward, bit for bit.

- I computes the inputs' gradients and nothing else, and keeps the gradient that comes into every
  joint. What only I needs of the saved tensors is freed at its end.
- W runs every joint again for the edges that I left out, and then the autograd engine over the
  branches behind them, so that hooks, accumulation and post-accumulate hooks are the engine's own.

Between I and W are kept: what the joints have saved (a Linear's input, a norm's input and
statistics), the gradient of each joint's output, and what the branches have saved.

Where products add weight gradients by themselves (:mod:`.products`), B and W do so, and the engine
has the rest.

A custom autograd Function with weights runs once, in I, weights included. A Function that runs a
backward of its own inside (reentrant checkpointing) cannot be split: I is the whole backward.
Non-reentrant checkpoints recompute once in I and once in W. A module that keeps its weight
gradients in :class:`~dualpipe.utils.WeightGradStore` is left to that, and not split as well.

Sums of several terms are added up in the order of the whole backward, which runs its nodes in one
queue. A stage that computes on several devices has no such order, in one part or two.

Cost: I and W together take 1.5 times the host time of B (4.4 ms where B takes 2.7, for four
transformer layers with 36 parameters; finding the cut takes 0.5 of it and freeing 0.35), and the
same device time.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dualpipe.executor.cut import cut, find_products
from dualpipe.utils import WeightGradStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.autograd.graph import Node

    from dualpipe.executor.cut import Branch, Cut
    from dualpipe.executor.products import Product

__all__ = ["StageBackward", "WeightPart"]

_FLUSH_BYTES = 1 << 26
"""Weight gradients computed before they are accumulated: few launches, and little memory."""


class WeightPart:
    """What a backward has left for later."""

    why: str | None
    """Why part of it, or all, was not left; None if nothing is missing."""

    def __init__(self, run: Callable[[], None] | None = None, why: str | None = None) -> None:
        self._run = run
        self.why = why

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do (any more)."""
        return self._run is None

    def run(self) -> None:
        """Computes and accumulates the weights' gradients, on the current stream. Once."""
        work, self._run = self._run, None
        if work is not None:
            work()


class StageBackward:
    """The backward of one stage copy.

    Args:
        products: Let products add weight gradients by themselves; see :mod:`.products`. Their
            rounding is another one than autograd's.
    """

    def __init__(self, *, products: bool = False) -> None:
        self._uses_store: bool | None = None
        self.products = products
        self.why_whole: str | None = None
        """Why the backward cannot be split, whatever its graph is; None if it may be."""
        self.added: Callable[[torch.Tensor], None] | None = None
        """Is told of every weight whose gradient a product has added."""

    def whole(
        self,
        outputs: Sequence[torch.Tensor | GradientEdge],
        output_grads: Sequence[torch.Tensor | None] | None,
        inputs: Sequence[torch.Tensor],
        *,
        retain_graph: bool = False,
    ) -> list[torch.Tensor | None]:
        """B: the inputs' gradients; those of the weights are accumulated.

        Args:
            outputs: What the stage has returned, or the edges of it.
            output_grads: Their gradients; where one is None nothing comes back. None altogether
                if the outputs are losses.
            inputs: Leaves; those that need no gradient get None.
            retain_graph: Leave the graph as it is.
        """
        roots, grads = _roots(outputs, output_grads)
        if roots:
            self._run_whole(roots, grads, retain_graph)
        return [_taken(tensor) for tensor in inputs]

    def _run_whole(
        self, roots: list[GradientEdge], grads: list[torch.Tensor], retain_graph: bool
    ) -> None:
        products, leaves = (
            find_products(roots) if self.products and not self._uses_store else ([], [])
        )
        if not products:
            _engine(roots, grads, (), keep=retain_graph)
            return
        hooks = [p.node.register_prehook(partial(self._add, p)) for p in products]
        _engine(roots, grads, tuple(leaves), keep=retain_graph)
        for hook in hooks:
            hook.remove()

    def _add(
        self,
        product: Product,
        grads: tuple[torch.Tensor | None, ...],
        factor: torch.Tensor | None = None,
    ) -> None:
        product.add(grads[0], product.factor if factor is None else factor)
        if self.added is not None:
            self.added(product.weight)

    def input_part(
        self,
        outputs: Sequence[torch.Tensor | GradientEdge],
        output_grads: Sequence[torch.Tensor | None] | None,
        inputs: Sequence[torch.Tensor],
        *,
        retain_graph: bool = False,
    ) -> tuple[list[torch.Tensor | None], WeightPart]:
        """I: the inputs' gradients, and what is left for W. Arguments as for :meth:`whole`."""
        roots, grads = _roots(outputs, output_grads)
        if not roots:
            return [None] * len(inputs), WeightPart()
        if self._uses_store:
            return self._with_store(roots, grads, inputs, retain_graph)
        if self.why_whole is not None:
            _engine(roots, grads, (), keep=retain_graph)
            return [_taken(tensor) for tensor in inputs], WeightPart(why=self.why_whole)
        leaves = [tensor for tensor in inputs if tensor.requires_grad]
        edges = [get_gradient_edge(tensor) for tensor in leaves]
        found = cut(roots, edges, products=self.products)
        if found.custom and self._uses_store is None:
            return self._with_store(roots, grads, inputs, retain_graph)
        if found.whole:
            _engine(roots, grads, (), keep=retain_graph)
            return [_taken(tensor) for tensor in inputs], WeightPart(why=found.why)
        work = _Weights(found, grads, retain_graph, self._add)
        wanted = (*leaves, *found.prompt)
        # What products need they hold; otherwise the joints will be run again.
        keep = retain_graph or not found.only_products
        _engine(roots, grads, wanted, keep=keep)
        if keep and not retain_graph:
            _free(found.path)
        rest = work.run if found.joints or found.roots else None
        return [_taken(tensor) for tensor in inputs], WeightPart(rest, found.why)

    def _with_store(
        self,
        roots: list[GradientEdge],
        grads: list[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        retain_graph: bool,
    ) -> tuple[list[torch.Tensor | None], WeightPart]:
        """As published: I is the backward with the store on, W calls what was put there."""
        before, WeightGradStore.cache = WeightGradStore.cache, []
        enabled, WeightGradStore.enabled = WeightGradStore.enabled, True
        try:
            _engine(roots, grads, (), keep=retain_graph)
        finally:
            WeightGradStore.enabled = enabled
            kept, WeightGradStore.cache = WeightGradStore.cache, before
        self._uses_store = bool(self._uses_store or kept)
        taken = [_taken(tensor) for tensor in inputs]
        if not kept:
            return taken, WeightPart(why=_LOOKED)
        return taken, WeightPart(partial(_call_all, kept))


_LOOKED = "the first backward of a stage with custom functions is whole, to see if they use WeightGradStore"


class _Weights:
    """The weight part of one micro-batch, while it waits."""

    def __init__(
        self,
        found: Cut,
        grads: list[torch.Tensor],
        retain_graph: bool,
        add: Callable[..., None],
    ) -> None:
        self._joints = found.joints
        self._only_products = found.only_products
        self._add = add
        self._outputs = [(edge, grads[position], branch) for position, edge, branch in found.roots]
        self._retain = retain_graph
        self._arrived: list[tuple[torch.Tensor | None, ...]] = [()] * len(found.joints)
        self._order: list[int] = []
        self._factors: dict[int, torch.Tensor] = {}
        """The left factors of the joints that are products."""
        for number, joint in enumerate(found.joints):
            joint.node.register_prehook(partial(self._keep, number))

    def _keep(self, number: int, grads: tuple[torch.Tensor | None, ...]) -> None:
        self._arrived[number] = grads
        self._order.append(number)
        product = self._joints[number].product
        if product is not None:
            self._factors[number] = product.factor

    def run(self) -> None:
        if self._only_products:
            for number in self._order:
                self._run_product(number)
                self._let_go(number)
        else:
            self._run_in_engine()
        if not self._retain:
            self._joints, self._outputs = [], []

    def _run_product(self, number: int) -> None:
        product = self._joints[number].product
        if product is not None:
            self._add(product, self._arrived[number], self._factors[number])

    def _let_go(self, number: int) -> None:
        if not self._retain:
            self._arrived[number] = ()
            self._factors.pop(number, None)

    def _run_in_engine(self) -> None:
        # Within a task of the engine, a node that is called computes only the edges that the task
        # wants. This task wants those into branches, reaches none of them, and calls the joints.
        start = torch.zeros((), device="cpu", requires_grad=True)
        start.register_hook(self._run_joints)  # type: ignore[no-untyped-call]
        edges = dict.fromkeys(edge for joint in self._joints for _, edge, _ in joint.edges)
        wanted: tuple[torch.Tensor | GradientEdge, ...] = (start, *edges)
        with _RECOMPUTE_ONCE():
            _engine([start], [start.detach()], wanted, keep=True, accumulate=False)

    def _run_joints(self, _start: torch.Tensor) -> None:
        ready = _Ready(self._retain)
        for edge, grad, branch in self._outputs:
            ready.add(edge, grad, branch)
        for number in self._order:
            self._run_product(number)
            node, edges, _ = self._joints[number]
            grads = node(*self._arrived[number]) if edges else ()  # type: ignore[operator]
            self._let_go(number)
            for position, edge, branch in edges:
                ready.add(edge, grads[position], branch)
            del grads
            if ready.num_bytes >= _FLUSH_BYTES and not ready.num_open:
                ready.flush()
        ready.flush()


class _Ready:
    """Gradients at the upper ends of branches, from where the engine takes them on."""

    def __init__(self, retain_graph: bool) -> None:
        self._retain = retain_graph
        self._seen: dict[int, int] = {}
        self._clear()

    def _clear(self) -> None:
        self._edges: list[GradientEdge] = []
        self._grads: list[torch.Tensor] = []
        self._parameters: dict[int, torch.Tensor] = {}
        self.num_bytes = 0

    num_open = 0
    """Branches that have some of their gradients and wait for others."""

    def add(self, edge: GradientEdge, grad: torch.Tensor | None, branch: Branch) -> None:
        seen = self._seen.get(id(branch), 0) + 1
        self._seen[id(branch)] = seen
        self.num_open += (seen == 1) - (seen == branch.num_edges)
        if grad is not None:
            self._edges.append(edge)
            self._grads.append(grad)
            self._parameters.update((id(tensor), tensor) for tensor in branch.parameters)
            self.num_bytes += grad.nbytes

    def flush(self) -> None:
        if self._edges:
            parameters = tuple(self._parameters.values())
            _engine(self._edges, self._grads, parameters, keep=self._retain)
        self._clear()


def _call_all(functions: list[Callable[[], Any]]) -> None:
    for function in functions:
        function()


_RECOMPUTE_ONCE: Callable[[], contextlib.AbstractContextManager[Any]]
_RECOMPUTE_ONCE = getattr(torch.utils.checkpoint, "GraphExecGroup", contextlib.nullcontext)


def _roots(
    outputs: Sequence[torch.Tensor | GradientEdge],
    output_grads: Sequence[torch.Tensor | None] | None,
) -> tuple[list[GradientEdge], list[torch.Tensor]]:
    """Where the backward starts, and with what."""
    roots, grads = [], []
    for position, output in enumerate(outputs):
        if isinstance(output, torch.Tensor):
            if not output.requires_grad:
                continue
            grad = torch.ones_like(output) if output_grads is None else output_grads[position]
            output = get_gradient_edge(output)  # noqa: PLW2901
        elif output_grads is None:
            raise TypeError("losses are given as tensors")
        else:
            grad = output_grads[position]
        if grad is not None:
            roots.append(output)
            grads.append(grad)
    return roots, grads


def _taken(tensor: torch.Tensor) -> torch.Tensor | None:
    grad, tensor.grad = tensor.grad, None
    return grad


def _engine(
    roots: Sequence[torch.Tensor | GradientEdge],
    grads: Sequence[torch.Tensor],
    inputs: tuple[torch.Tensor | GradientEdge, ...],
    keep: bool,
    *,
    accumulate: bool = True,
) -> None:
    """The engine as it is: what ``torch.autograd.backward`` asks first costs as much again."""
    torch.autograd.Variable._execution_engine.run_backward(
        tuple(roots),
        tuple(grads),
        keep_graph=keep,
        create_graph=False,
        inputs=inputs,
        allow_unreachable=True,
        accumulate_grad=accumulate,
    )


def _free(nodes: Sequence[Node]) -> None:
    """Drops the tensors that nodes have saved."""
    for node in nodes:
        kind = type(node)
        names = _SAVED.get(kind)
        if names is None:
            names = _SAVED[kind] = [name for name in dir(kind) if name.startswith("_raw_saved_")]
        for name in names:
            saved = getattr(node, name)
            for one in saved if isinstance(saved, tuple) else (saved,):
                try:
                    one.register_hooks(_nothing, _freed)
                except RuntimeError:  # no tensor, or hooks of others hold it
                    continue


_SAVED: dict[type, list[str]] = {}


def _nothing(_: torch.Tensor) -> None:
    return None


def _freed(_: None) -> torch.Tensor:
    raise RuntimeError("the input part of this backward has run, and freed what only it needs")
