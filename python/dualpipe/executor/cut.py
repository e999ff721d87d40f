"""Where the autograd graph of a stage is cut into the input's part and the weights' part.

A node is on the *input path* if the gradient of an input of the stage comes through it. What is
not on it belongs to the weights: a *branch* is a connected piece of that, down to its leaves, the
parameters. A *joint* is a node of the input path with edges into branches; ``addmm`` of a Linear
layer, for example. The input part runs the path and leaves those edges out; the weight part runs
the joints again for those edges alone, with the gradients that came into them, and then the
branches.

Some joints cannot be run twice, and some sums would then be made in another order than the whole
backward makes them. The branches there are *prompt*: the input part runs them as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.autograd.graph import GradientEdge

from dualpipe.executor.products import product_at

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.autograd.graph import Node

    from dualpipe.executor.products import Product

__all__ = ["Branch", "Cut", "Joint", "cut", "find_products"]

_ACCUMULATE = torch._C._functions.AccumulateGrad


@dataclass(slots=True, eq=False)
class Branch:
    """A connected piece of the graph that only weights need."""

    parameters: list[torch.Tensor]
    """Its leaves."""
    num_edges: int = 0
    """Edges into it: from joints, and from outputs of the stage."""


class Joint(NamedTuple):
    """A node of the input path with edges into branches."""

    node: Node
    edges: list[tuple[int, GradientEdge, Branch]]
    """Which of the node's edges, where to, and the branch there."""
    product: Product | None
    """A weight whose gradient the node's product adds by itself; not among the edges."""


class Cut(NamedTuple):
    """A graph, cut."""

    @property
    def only_products(self) -> bool:
        """Whether nothing but products is left to the weight part."""
        return not self.roots and not any(joint.edges for joint in self.joints)

    joints: list[Joint]
    roots: list[tuple[int, GradientEdge, Branch]]
    """Outputs that lie in a branch, with their positions."""
    prompt: list[torch.Tensor]
    """Parameters whose gradients the input part computes too."""
    path: list[Node]
    """Nodes that only the input part runs."""
    why: str | None
    """Why some parameters, or all, are not left to the weight part."""
    whole: bool
    """Whether the graph cannot be cut at all."""
    custom: bool
    """Whether autograd Functions written in Python are in it."""


class _Graph:
    """What is reached from some nodes, with edges both ways."""

    def __init__(self, roots: Iterable[Node]) -> None:
        self.edges: dict[Node, tuple[tuple[Node | None, int], ...]] = {}
        self.parents: dict[Node, list[Node]] = {root: [] for root in roots}
        self.custom: list[Node] = []
        edges, parents = self.edges, self.parents
        found = list(parents)
        while found:
            node = found.pop()
            edges[node] = children = node.next_functions
            if issubclass(type(node), torch._C._FunctionBase):
                self.custom.append(node)
            for child, _ in children:
                if child is None:
                    continue
                known = parents.get(child)
                if known is None:
                    parents[child] = [node]
                    found.append(child)
                else:
                    known.append(node)

    def above(self, nodes: Iterable[Node]) -> set[Node]:
        """Those of the nodes that are in the graph, and all that lead to them."""
        parents = self.parents
        above = {node for node in nodes if node in parents}
        found = list(above)
        while found:
            for parent in parents[found.pop()]:
                if parent not in above:
                    above.add(parent)
                    found.append(parent)
        return above

    def beside(self, start: Node, path: set[Node]) -> set[Node]:
        """What hangs together with a node off the path without crossing the path."""
        beside = {start}
        found = [start]
        while found:
            node = found.pop()
            below = [child for child, _ in self.edges[node] if child is not None]
            for near in below + self.parents[node]:
                if near not in beside and near not in path:
                    beside.add(near)
                    found.append(near)
        return beside

    def leaves(self) -> list[Node]:
        return [node for node in self.edges if isinstance(node, _ACCUMULATE)]

    def first_used(self) -> Node | None:
        """A small parameter among those that the forward used first."""
        waiting = {node: len(parents) for node, parents in self.parents.items()}
        ready = [node for node, number in waiting.items() if not number]
        depth = dict.fromkeys(self.parents, 0)
        for node in ready:
            for child, _ in self.edges[node]:
                if child is not None:
                    depth[child] = max(depth[child], depth[node] + 1)
                    waiting[child] -= 1
                    if not waiting[child]:
                        ready.append(child)
        leaves = self.leaves()
        if not leaves:
            return None
        node = max(leaves, key=depth.__getitem__)
        while len(self.parents[node]) == 1 and len(self.edges[node]) <= 1:
            node = self.parents[node][0]
        return min(_Graph([node]).leaves(), key=lambda leaf: _variable(leaf).numel())


def cut(
    outputs: Sequence[GradientEdge],
    inputs: Sequence[GradientEdge],
    *,
    products: bool = False,
) -> Cut:
    """Cuts what is between outputs and inputs.

    Where no input is reached, the path leads to a parameter among those used first, so that the
    two parts share the work as elsewhere.

    Args:
        outputs: Where the backward starts.
        inputs: Whose gradients the input part computes.
        products: Whether products may add weight gradients by themselves. The input part then
            computes those of vectors, of norms and biases, as well: that costs less than to run
            their joints again, and lets it free what it has used.
    """
    graph = _Graph(edge.node for edge in outputs)
    for node in graph.custom:
        if (why := _why_whole(node)) is not None:
            return Cut([], [], [], [], why, True, True)
    custom = bool(graph.custom)
    prompt = []
    path = graph.above(edge.node for edge in inputs)
    if not path:
        first = graph.first_used()
        if first is None:
            return Cut([], [], [], [], None, False, custom)
        prompt.append(_variable(first))
        path = graph.above([first])

    ends = [edge.node for edge in outputs]
    branches: dict[Node, Branch | None] = {}
    reasons: dict[str, int] = {}

    def branch_at(start: Node) -> Branch | None:
        """The branch of a node off the path; None where there are no leaves, or it is prompt."""
        if start in branches:
            return branches[start]
        beside = graph.beside(start, path)
        found = [_variable(node) for node in beside if isinstance(node, _ACCUMULATE)]
        light = products and all(variable.ndim < 2 for variable in found)
        why = None if light else _not_left(graph, beside, path, ends)
        branch = Branch(found) if found and why is None and not light else None
        if found and branch is None:
            prompt.extend(found)
            if why is not None:
                reasons[why] = reasons.get(why, 0) + len(found)
        branches.update(dict.fromkeys(beside, branch))
        return branch

    roots = []
    for position, node in enumerate(ends):
        if node not in path and (branch := branch_at(node)) is not None:
            roots.append((position, outputs[position], branch))
            branch.num_edges += 1
    joints, alone = [], []
    for node in path:
        edges = []
        product = product_at(node, graph.edges[node], graph.parents) if products else None
        if product is not None and graph.edges[node][product.place][0] in path:
            product = None
        for position, (child, number) in enumerate(graph.edges[node]):
            if child is None or child in path:
                continue
            if product is not None and position == product.place:
                continue
            branch = branch_at(child)
            if branch is not None:
                edges.append((position, GradientEdge(child, number), branch))
                branch.num_edges += 1
        if edges or product is not None:
            joints.append(Joint(node, edges, product))
        else:
            alone.append(node)
    why = "; ".join(f"{reasons[text]} parameters: {text}" for text in sorted(reasons))
    return Cut(joints, roots, prompt, alone, why or None, False, custom)


def find_products(
    outputs: Sequence[GradientEdge],
) -> tuple[list[Product], list[torch.Tensor]]:
    """The products of a whole backward, and the leaves whose gradients are left to autograd.

    Only nodes that lead to such a leaf are run by the engine, so others are no products.
    """
    graph = _Graph(edge.node for edge in outputs)
    if any(map(_recomputes_inside, graph.custom)):
        return [], []
    products = {}
    for node, edges in graph.edges.items():
        product = product_at(node, edges, graph.parents)
        if product is not None:
            products[product.weight] = product
    leaves = {leaf: _variable(leaf) for leaf in graph.leaves()}
    while True:
        rest = [leaf for leaf, variable in leaves.items() if variable not in products]
        run = graph.above(rest)
        idle = [weight for weight, product in products.items() if product.node not in run]
        if not idle:
            return list(products.values()), [leaves[leaf] for leaf in rest]
        for weight in idle:
            del products[weight]


def _not_left(graph: _Graph, beside: set[Node], path: set[Node], ends: list[Node]) -> str | None:
    """Why a branch is not left to the weight part."""
    for node in beside:
        above = graph.parents[node]
        num_joints = 0
        for parent in above:
            if parent in path:
                num_joints += 1
                if not _can_run_again(type(parent)):
                    return f"{_name(parent)} can be run only once"
        # The whole backward adds in the order in which it runs nodes, the weight part joints
        # first. For two summands that is the same.
        if 0 < num_joints < len(above) and len(above) + ends.count(node) > 2:
            return "a sum with terms of both parts would be added in another order"
    return None


@cache
def _can_run_again(kind: type) -> bool:
    """Whether nodes of a type compute the edges that are wanted, and may be called twice.

    So do those that PyTorch generates from its table of derivatives; of others nothing is known.
    """
    generated = re.fullmatch(r"\w+Backward\d+", kind.__name__) is not None
    return generated and not issubclass(kind, torch._C._FunctionBase)


def _variable(leaf: Node) -> torch.Tensor:
    variable: torch.Tensor = leaf.variable  # type: ignore[attr-defined]
    return variable


def _name(node: Node) -> str:
    return type(node).__name__.removesuffix("Backward")


def _why_whole(node: Node) -> str | None:
    """Why a graph with this custom function in it cannot be cut; None if it can."""
    if _recomputes_inside(node):
        return f"{_name(node)} runs a backward of its own inside; use_reentrant=False can be split"
    if _donates(node):
        return (
            f"{_name(node)} computes in the memory of what it has saved; compiled under "
            "torch._functorch.config.donated_buffer = False, it does not"
        )
    return None


def _donates(node: Node) -> bool:
    """Whether a compiled function overwrites what it has saved, and so wants its graph freed."""
    metadata = getattr(getattr(node, "_forward_cls", None), "metadata", None)
    return bool(getattr(metadata, "bw_donated_idxs", None))


def _recomputes_inside(node: Node) -> bool:
    """Whether a custom function insists on a backward that leaves nothing out.

    So do reentrant checkpoints, PyTorch's and others'.
    """
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    code = getattr(backward, "__code__", None)
    return code is not None and "_is_checkpoint_valid" in code.co_names
