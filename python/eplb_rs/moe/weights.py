"""The experts that one rank holds, stacked by slot.

Letters: L layers, S slots of this rank.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from eplb_rs._inputs import as_count
from eplb_rs.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from eplb_rs.plan import Plan

__all__ = ["ExpertField", "ExpertWeights", "checksum", "slots_of"]


@dataclass(frozen=True, slots=True)
class ExpertField:
    """One tensor that every expert has: a weight, a bias, a scale, a zero point.

    Attributes:
        name: What it is called, unlike all others of the expert.
        shape: Its shape for a single expert.
        dtype: Its dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes for one expert."""
        return math.prod(self.shape) * self.dtype.itemsize


class ExpertWeights:
    """Everything that belongs to the experts of one rank, described once.

    All tensors of an expert live in the same slot and move together: quantised weights never part
    with their scales. For each layer and field there is one contiguous tensor `[S, *shape]`, which
    grouped kernels take as it is.

    Args:
        fields: What an expert consists of.
        num_layers: L.
        num_slots: S.
        device: Where the tensors live.

    Raises:
        InvalidInputError: ``not_positive`` for a count, ``empty`` without fields, ``repeated`` for
            two fields of one name.

    Memory: `num_layers * num_slots * expert_bytes`, not initialised.
    """

    def __init__(
        self,
        fields: Sequence[ExpertField],
        *,
        num_layers: int,
        num_slots: int,
        device: torch.device | str = "cpu",
    ) -> None:
        fields = _checked_fields(fields)
        num_slots = as_count(num_slots, "num_slots")
        self._set(
            fields,
            [
                {
                    field.name: torch.empty(
                        (num_slots, *field.shape), dtype=field.dtype, device=device
                    )
                    for field in fields
                }
                for _ in range(as_count(num_layers, "num_layers"))
            ],
        )

    @classmethod
    def adopt(cls, layers: Sequence[Mapping[str, Tensor]]) -> Self:
        """The tensors of an engine or a model, as they are, without a copy.

        Args:
            layers: For each layer, by name, contiguous tensors `[S, *shape]`; the same names,
                shapes and dtypes in every layer.

        Raises:
            InvalidInputError: ``empty`` without layers or fields, ``wrong_shape`` or
                ``wrong_dtype`` for a tensor unlike those of the first layer, ``inconsistent`` for
                one on another device, ``not_contiguous``, ``wrong_type`` for what is no tensor.
        """
        if not layers or not layers[0]:
            raise InvalidInputError(
                code="empty",
                argument="layers",
                got="nothing",
                expected="at least one layer with at least one tensor",
            )
        for name, tensor in layers[0].items():
            _check_tensor(0, name, tensor)
        first = next(iter(layers[0].values()))
        fields = tuple(
            ExpertField(name, tuple(tensor.shape[1:]), tensor.dtype)
            for name, tensor in layers[0].items()
        )
        for layer, tensors in enumerate(layers):
            if set(tensors) != {field.name for field in fields}:
                raise InvalidInputError(
                    code="wrong_shape",
                    argument="layers",
                    got=f"{sorted(tensors)} in layer {layer}",
                    expected=f"the tensors of layer 0, {sorted(layers[0])}",
                )
            for field in fields:
                tensor = tensors[field.name]
                _check_tensor(layer, field.name, tensor)
                wanted = (len(first), *field.shape)
                if tuple(tensor.shape) != wanted or tensor.dtype != field.dtype:
                    same_shape = tuple(tensor.shape) == wanted
                    raise InvalidInputError(
                        code="wrong_dtype" if same_shape else "wrong_shape",
                        argument="layers",
                        got=f"{field.name} of layer {layer}, {tuple(tensor.shape)} {tensor.dtype}",
                        expected=f"{wanted} {field.dtype}, as in layer 0",
                    )
                if tensor.device != first.device:
                    raise InvalidInputError(
                        code="inconsistent",
                        argument="layers",
                        got=f"{field.name} of layer {layer} on {tensor.device}",
                        expected=f"all on {first.device}, as the first",
                    )
        weights = object.__new__(cls)
        # Of parameters the same memory, but as plain tensors: moving is no step of autograd.
        weights._set(
            fields,
            [
                {name: one.detach() if one.requires_grad else one for name, one in tensors.items()}
                for tensors in layers
            ],
        )
        return weights

    def _set(self, fields: Sequence[ExpertField], layers: list[dict[str, Tensor]]) -> None:
        self._fields = tuple(fields)
        self._layers = layers

    @property
    def fields(self) -> tuple[ExpertField, ...]:
        """What an expert consists of."""
        return self._fields

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self._layers)

    @property
    def num_slots(self) -> int:
        """S."""
        return len(next(iter(self._layers[0].values())))

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return next(iter(self._layers[0].values())).device

    @property
    def expert_bytes(self) -> int:
        """The bytes of one expert of one layer, everything that belongs to it."""
        return sum(field.num_bytes for field in self._fields)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> Mapping[str, Tensor]:
        """The tensors of a layer by name, each `[S, *shape]`."""
        return self._layers[layer]

    def slot(self, layer: int, slot: int) -> dict[str, Tensor]:
        """Everything in one slot by name, each `[*shape]`; views, not copies."""
        return {name: tensor[slot] for name, tensor in self._layers[layer].items()}

    @torch.no_grad()
    def copy_slot(self, layer: int, source: int, target: int) -> None:
        """Copies what is in one slot of a layer into another."""
        for tensor in self._layers[layer].values():
            tensor[target].copy_(tensor[source], non_blocking=True)

    def checksum(self, layer: int, slot: int) -> int:
        """CRC-32 of all bytes in a slot, fields in order. Waits for the device, copies to the CPU.

        Cost: about 1 GB/s; for tests and after faults, not for every pass.
        """
        return checksum(self.slot(layer, slot).values())

    def version(self, layer: int) -> int:
        """A number that changes when a tensor of the layer is written to, as far as torch knows of
        it: not through ``.data``, nor in inference mode."""
        tensors = self._layers[layer].values()
        return sum(one._version for one in tensors if not one.is_inference())

    def __repr__(self) -> str:
        return (
            f"<experts of {self.num_layers} layers in {self.num_slots} slots, "
            f"{self.expert_bytes:,} bytes each, on {self.device}>"
        )


def checksum(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of the bytes of tensors, one after the other."""
    crc = 0
    for tensor in tensors:
        as_bytes = tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy()
        crc = zlib.crc32(as_bytes.data, crc)
    return crc


def slots_of(plan: Plan, rank: int) -> range:
    """The slots of a rank, in the numbering of the whole plan.

    Raises:
        InvalidInputError: ``out_of_range`` for a rank that does not exist.
    """
    slots = plan.topology.slots
    if not 0 <= rank < len(slots):
        raise InvalidInputError(
            code="out_of_range",
            argument="rank",
            got=str(rank),
            expected=f"a rank of the plan, 0 to {len(slots) - 1}",
        )
    first = sum(slots[:rank])
    return range(first, first + slots[rank])


def _checked_fields(fields: Sequence[ExpertField]) -> tuple[ExpertField, ...]:
    names = [field.name for field in fields]
    if not names:
        raise InvalidInputError(
            code="empty", argument="fields", got="nothing", expected="at least one field"
        )
    for name in names:
        if names.count(name) > 1:
            raise InvalidInputError(
                code="repeated",
                argument="fields",
                got=f"{name!r} twice",
                expected="a name for each field",
            )
    return tuple(fields)


def _check_tensor(layer: int, name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor) or tensor.ndim == 0:
        raise InvalidInputError(
            code="wrong_type",
            argument="layers",
            got=f"{name} of layer {layer}, {type(tensor).__name__}",
            expected="tensors, stacked by slot",
        )
    if not tensor.is_contiguous():
        raise InvalidInputError(
            code="not_contiguous",
            argument="layers",
            got=f"{name} of layer {layer}, strides {tensor.stride()}",
            expected="contiguous, so that what a slot holds lies in one piece",
            hint="`.contiguous()`, before the model takes it",
        )
