"""Whether what a layer is given fits: said before any other rank waits for this one.

Letters: S slots of this rank, H hidden size, I intermediate size, T tokens, K experts of a token, E
logical experts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch
from torch import Tensor

from eplb_rs._inputs import wrong_type
from eplb_rs.errors import InvalidInputError
from eplb_rs.plan import Plan, as_plan

__all__ = ["can_fuse", "check_fused", "check_plan", "check_routed", "check_weights"]

_FIELDS = ("gate_up.weight", "down.weight")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_weights(weights: Mapping[str, Tensor], num_slots: int) -> tuple[Tensor, Tensor]:
    """The two tensors of a gated feed-forward, `[S, 2I, H]` and `[S, H, I]`.

    Raises:
        InvalidInputError: ``wrong_type`` for what holds no tensors by name, ``unknown`` for other
            tensors than these, ``wrong_dtype`` for what is not computed with, ``wrong_shape`` for
            what does not fit together or the plan, ``inconsistent`` for tensors on two devices.
    """
    if not isinstance(weights, Mapping):
        raise wrong_type(
            "weights",
            weights,
            "the tensors of one layer by name",
            "`weights[layer]` of ExpertWeights",
        )
    if set(weights) != set(_FIELDS):
        raise InvalidInputError(
            code="unknown",
            argument="weights",
            got=", ".join(sorted(weights)) or "nothing",
            expected=f"{_FIELDS[0]} and {_FIELDS[1]}, and nothing that would be left out",
            hint="experts with scales or biases can be loaded and moved; to compute with them, "
            "write a layer with `record` and `follow`",
        )
    gate_up, down = (weights[name] for name in _FIELDS)
    if gate_up.dtype not in _DTYPES or down.dtype != gate_up.dtype:
        raise InvalidInputError(
            code="wrong_dtype",
            argument="weights",
            got=f"{gate_up.dtype} and {down.dtype}",
            expected=f"both of one of {', '.join(str(one) for one in _DTYPES)}",
        )
    if gate_up.device != down.device:
        raise InvalidInputError(
            code="inconsistent",
            argument="weights",
            got=f"tensors on {gate_up.device} and {down.device}",
            expected="both on one device",
        )
    width = gate_up.shape[-1] if gate_up.ndim == 3 else -1
    wanted = (num_slots, width, gate_up.shape[1] // 2 if gate_up.ndim == 3 else -1)
    if gate_up.shape != (num_slots, 2 * wanted[2], width) or down.shape != wanted:
        raise InvalidInputError(
            code="wrong_shape",
            argument="weights",
            got=f"{list(gate_up.shape)} and {list(down.shape)}",
            expected=f"[S, 2I, H] and [S, H, I] with S = {num_slots}, as the plan has here",
        )
    return gate_up, down


def can_fuse(weight: Tensor) -> bool:
    """Whether the layer's kernels are for such weights, and triton is there."""
    return weight.is_cuda and weight.dtype in _DTYPES[1:] and _has_triton()


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def check_fused(weight: Tensor) -> None:
    """Refuses kernels for weights that they are not for.

    Raises:
        InvalidInputError: ``inconsistent``.
    """
    if not can_fuse(weight):
        raise InvalidInputError(
            code="inconsistent",
            argument="fused",
            got=f"True, with {weight.dtype} on {weight.device}"
            + ("" if _has_triton() else ", without triton"),
            expected="weights of at most 32 bits on a CUDA GPU, and triton",
            hint="False does the same in plain torch",
        )


def check_plan(plan: Plan, layer: int, *, like: tuple[int, tuple[int, ...]] | None = None) -> None:
    """Refuses what is no plan for a layer, or is for other experts or slots than one before it.

    Raises:
        InvalidInputError: ``wrong_type``, ``wrong_shape`` for other experts or slots,
            ``out_of_range`` for a layer that it has not.
    """
    plan = as_plan(plan)
    if not 0 <= layer < plan.num_layers:
        raise InvalidInputError(
            code="out_of_range",
            argument="layer",
            got=str(layer),
            expected=f"a layer of the plan, 0 to {plan.num_layers - 1}",
        )
    got = (plan.num_experts, tuple(plan.topology.slots))
    if like is not None and got != like:
        raise InvalidInputError(
            code="wrong_shape",
            argument="plan",
            got="{} experts, slots {} by rank".format(*got),
            expected="{} experts, slots {} by rank, as the layer was made for".format(*like),
        )


def check_routed(
    x_TH: Tensor, gate_TK: Tensor, expert_TK: Tensor, weight: Tensor, num_experts: int
) -> None:
    """Refuses tokens and choices that do not fit the weights `[S, 2I, H]` or each other.

    What experts are chosen is looked at on a CPU only: on a GPU that would be to wait for it.

    Raises:
        InvalidInputError: ``wrong_shape``, ``wrong_dtype``, ``inconsistent`` for tensors on other
            devices, ``out_of_range`` for an expert that does not exist.
    """
    if x_TH.ndim != 2 or x_TH.shape[1] != weight.shape[2]:
        raise InvalidInputError(
            code="wrong_shape",
            argument="x",
            got=f"shape {list(x_TH.shape)}",
            expected=f"of width {weight.shape[2]}, as the weights have",
        )
    if expert_TK.shape != gate_TK.shape or expert_TK.ndim != 2 or len(expert_TK) != len(x_TH):
        raise InvalidInputError(
            code="wrong_shape",
            argument="router",
            got=f"gates {list(gate_TK.shape)} and experts {list(expert_TK.shape)}",
            expected=f"both [T, K], with T = {len(x_TH)} tokens",
        )
    if expert_TK.shape[1] == 0:
        raise InvalidInputError(
            code="wrong_shape",
            argument="router",
            got="no choices",
            expected="at least one of each token; -1 stands for none",
        )
    if x_TH.dtype != weight.dtype or gate_TK.dtype != weight.dtype:
        raise InvalidInputError(
            code="wrong_dtype",
            argument="x",
            got=f"tokens of {x_TH.dtype}, gates of {gate_TK.dtype}",
            expected=f"both of {weight.dtype}, as the weights are",
            hint="`.to(...)` before the layer",
        )
    if expert_TK.dtype not in {torch.int64, torch.int32}:
        raise InvalidInputError(
            code="wrong_dtype",
            argument="router",
            got=f"experts of {expert_TK.dtype}",
            expected="int64 or int32",
        )
    if not x_TH.device == gate_TK.device == expert_TK.device == weight.device:
        raise InvalidInputError(
            code="inconsistent",
            argument="x",
            got=f"tokens on {x_TH.device}, gates on {gate_TK.device}, experts on "
            f"{expert_TK.device}",
            expected=f"all on {weight.device}, where the weights are",
        )
    if expert_TK.device.type == "cpu" and expert_TK.numel():
        least, most = (int(one) for one in expert_TK.aminmax())
        if least < -1 or most >= num_experts:
            raise InvalidInputError(
                code="out_of_range",
                argument="router",
                got=f"experts {least} to {most}",
                expected=f"0 to {num_experts - 1}, or -1 for none",
            )
