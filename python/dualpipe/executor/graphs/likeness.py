"""What micro-batches are like, and what a capture of a stage depends on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dualpipe.executor.graphs.stage import GraphedStage
    from dualpipe.executor.stage import Flight

__all__ = ["Like", "hooks_of", "kind_of", "sample", "state_of", "tensor_pairs"]


class Like(NamedTuple):
    """What a micro-batch on a stage is like."""

    inputs: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    labels: tuple[Any, ...]


class _TensorLike(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


def kind_of(inputs: Sequence[Any], flight: Flight) -> Like:
    """What a micro-batch is like."""
    return Like(
        tuple(map(_like, inputs)),
        tuple((name, _like(given)) for name, given in flight.kwargs.items()),
        tuple(map(_like, flight.labels)),
    )


def _like(given: Any) -> Any:
    if isinstance(given, torch.Tensor):
        return _TensorLike(given.shape, given.dtype, given.device, given.requires_grad)
    try:
        hash(given)
    except TypeError:
        # Of what cannot be compared, no two are alike.
        return object()
    return given


def sample(like: Any) -> Any:
    """Memory for what is like this; what is no tensor, as it is."""
    if isinstance(like, _TensorLike):
        return torch.empty(like.shape, dtype=like.dtype, device=like.device).requires_grad_(
            like.requires_grad
        )
    return like


def tensor_pairs(
    own: Sequence[Any], given: Sequence[Any]
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """A slot's tensors, each with what is to be copied there."""
    return ((o, g) for o, g in zip(own, given, strict=True) if isinstance(o, torch.Tensor))


def state_of(stage: GraphedStage) -> Any:
    """Everything that a capture depends on, cheap enough to ask for at every step."""
    found: list[Any] = []
    for module in stage.modules:
        found.append(module.training)
        found += map(id, module._modules.values())
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    found += (tensor.data_ptr(), tensor.requires_grad)
    settings = stage.settings
    given = [(f.kwargs, f.labels) for f in stage.flights if f.kwargs or f.labels]
    return (
        found,
        settings.criterion if stage.is_last else None,
        settings.loss_scale,
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        hooks_of(stage),
        {
            (tuple(map(_like, kwargs.values())), tuple(map(_like, labels)))
            for kwargs, labels in given
        },
    )


_MODULE_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def hooks_of(stage: GraphedStage) -> str:
    """What the user has hung on a stage, in words; empty if nothing."""
    found = set()
    for module in stage.modules:
        if any(getattr(module, name) for name in _MODULE_HOOKS):
            found.add("module hooks")
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if parameter._post_accumulate_grad_hooks:
                found.add("post-accumulate hooks")
            if parameter._backward_hooks:
                found.add("tensor hooks")
    return " and ".join(sorted(found))
