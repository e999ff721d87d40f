"""What training needs of experts that have replicas: one gradient, and optimizer state that moves.

Letters: L layers, S slots of this rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from eplb_rs.errors import InvalidInputError
from eplb_rs.moe.sites import Sites
from eplb_rs.moe.weights import ExpertWeights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eplb_rs.plan import Plan

__all__ = ["sum_replica_gradients", "with_optimizer_state"]


@torch.no_grad()
def sum_replica_gradients(
    gradients: Sequence[Mapping[str, Tensor]],
    plan: Plan,
    *,
    group: distributed.ProcessGroup | None = None,
) -> None:
    """Gives all replicas of an expert the sum of their gradients, in place, to the same bits.

    A collective call, once for each optimizer step, after its last backward. The rank of an
    expert's first replica adds them in order of replica and sends the sum back.

    Args:
        gradients: For each layer, by name, stacked by slot: `[S, *shape]`.
        plan: Where the replicas are.
        group: The ranks; by default all of torch.distributed's.

    Raises:
        InvalidInputError: ``wrong_shape`` for another number of layers, slots or ranks than the
            plan's, ``wrong_type`` for a gradient that is missing.

    Cost: each replica but the first sends its gradient once and gets the sum once.
    """
    sites = Sites.of(plan, group)
    here = sites.held
    for layer, tensors in enumerate(gradients):
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise InvalidInputError(
                    code="wrong_type",
                    argument="gradients",
                    got=f"{type(tensor).__name__} for {name} of layer {layer}",
                    expected="a tensor, on every rank",
                    hint="zeros where no backward has come by",
                )
    got = (len(gradients), {len(tensor) for layer in gradients for tensor in layer.values()})
    if got != (plan.num_layers, {len(here)}):
        raise InvalidInputError(
            code="wrong_shape",
            argument="gradients",
            got=f"{got[0]} layers of {sorted(got[1])} slots",
            expected=f"{plan.num_layers} layers of {len(here)} slots, as the plan has",
        )
    member_of = sites.slot_members.tolist()
    for layer, tensors in enumerate(gradients):
        shared = (plan.logcnt[layer] > 1).nonzero()[0].tolist()
        replicas = [
            plan.log2phy[layer, expert, : plan.logcnt[layer, expert]].tolist() for expert in shared
        ]
        _gather_sums(tensors, replicas, member_of, here, sites.group)


def _gather_sums(
    tensors: Mapping[str, Tensor],
    replicas: list[list[int]],
    member_of: list[int],
    here: range,
    group: distributed.ProcessGroup,
) -> None:
    """One layer: all addends to the first replicas, then all sums back."""
    rank = group.rank()
    for name in tensors:
        stacked = tensors[name]
        arrived: dict[int, Tensor] = {}
        sums: list[tuple[Tensor, int]] = []
        operations: list[distributed.P2POp] = []

        def post(call: Any, tensor: Tensor, peer: int, into: list[distributed.P2POp]) -> None:
            into.append(distributed.P2POp(call, tensor, group=group, group_peer=peer))

        for slots in replicas:
            first = slots[0]
            for slot in slots[1:]:
                if member_of[slot] == member_of[first]:
                    continue
                if member_of[first] == rank:
                    arrived[slot] = torch.empty_like(stacked[0])
                    post(distributed.irecv, arrived[slot], member_of[slot], operations)
                elif member_of[slot] == rank:
                    post(
                        distributed.isend, stacked[slot - here.start], member_of[first], operations
                    )
        _run(operations)

        operations = []
        for slots in replicas:
            first = slots[0]
            if member_of[first] == rank:
                total = stacked[first - here.start]
                for slot in slots[1:]:
                    total += arrived[slot] if slot in arrived else stacked[slot - here.start]
            for slot in slots[1:]:
                if member_of[first] == member_of[slot]:
                    if member_of[slot] == rank:
                        sums.append((stacked[first - here.start], slot - here.start))
                elif member_of[first] == rank:
                    post(
                        distributed.isend, stacked[first - here.start], member_of[slot], operations
                    )
                elif member_of[slot] == rank:
                    post(
                        distributed.irecv, stacked[slot - here.start], member_of[first], operations
                    )
        _run(operations)
        for total, slot in sums:
            stacked[slot].copy_(total)


def _run(operations: list[distributed.P2POp]) -> None:
    if operations:
        for work in distributed.batch_isend_irecv(operations):
            work.wait()


def with_optimizer_state(
    weights: ExpertWeights,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Mapping[str, torch.nn.Parameter]],
) -> ExpertWeights:
    """The weights and, as further fields, what the optimizer keeps for each expert.

    A mover of these moves an expert's state with it. What is no tensor of the parameter's shape,
    a count of steps, say, is the same for all experts and stays.

    Args:
        weights: This rank's experts.
        optimizer: After its first step: its state is there from then on.
        parameters: For each layer, by field, the parameter that is stacked by slot.

    Returns:
        The same tensors, not copies.

    Raises:
        InvalidInputError: ``missing_state`` for a parameter without state.
    """
    layers = []
    for layer, named in enumerate(parameters):
        tensors = dict(weights[layer])
        for name, parameter in named.items():
            state = optimizer.state.get(parameter)
            if not state:
                raise InvalidInputError(
                    code="missing_state",
                    argument="optimizer",
                    got=f"no state for {name} of layer {layer}",
                    expected="an optimizer that has made its first step",
                )
            tensors |= {
                f"{name}/{key}": value
                for key, value in state.items()
                if isinstance(value, Tensor) and value.shape == parameter.shape
            }
        layers.append(tensors)
    return ExpertWeights.adopt(layers)
