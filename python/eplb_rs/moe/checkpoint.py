"""Experts from safetensors checkpoints into slots, and back.

Checkpoints have one tensor for each expert and projection; kernels take gate and up projection as
one. So a rank reads, expert by expert, just what its slots hold, straight into its place, and
writes it back under the names it came from.

Letters: L layers, S slots of this rank.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eplb_rs._files import write_whole
from eplb_rs.errors import InvalidInputError
from eplb_rs.moe.weights import ExpertField, ExpertWeights, slots_of

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping

    from eplb_rs.plan import Plan

__all__ = ["LAYOUTS", "Checkpoint", "Layout", "write_index"]

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Layout:
    """How a family of models names its experts' tensors.

    Attributes:
        experts: The name up to the projection, with `{layer}` and `{expert}`.
        gate: The gate projection.
        up: The up projection.
        down: The down projection.
    """

    experts: str
    gate: str
    up: str
    down: str

    def name(self, layer: int, expert: int, projection: str, kind: str) -> str:
        """A tensor's name in the checkpoint; `kind` is ``"weight"``, ``"bias"`` and the like."""
        return f"{self.experts.format(layer=layer, expert=expert)}.{projection}.{kind}"

    def parts(self, field: str) -> tuple[tuple[str, ...], str]:
        """The projections that a field is made of, and its kind."""
        projection, _, kind = field.partition(".")
        return (((self.gate, self.up) if projection == "gate_up" else (self.down,)), kind)

    def field(self, projection: str, kind: str) -> str:
        """The field that a projection's tensor goes to."""
        return f"{'down' if projection == self.down else 'gate_up'}.{kind}"

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the names of experts' tensors."""
        number = {"layer": r"(?P<layer>\d+)", "expert": r"(?P<expert>\d+)"}
        before = re.escape(self.experts).replace(r"\{", "{").replace(r"\}", "}")
        projections = "|".join(map(re.escape, (self.gate, self.up, self.down)))
        return re.compile(
            rf"{before.format(**number)}\.(?P<projection>{projections})\.(?P<kind>.+)"
        )


_HUGGING_FACE = Layout(
    "model.layers.{layer}.mlp.experts.{expert}", "gate_proj", "up_proj", "down_proj"
)

LAYOUTS: Mapping[str, Layout] = {
    "deepseek_v3": _HUGGING_FACE,
    "qwen3_moe": _HUGGING_FACE,
    "olmoe": _HUGGING_FACE,
    "mixtral": Layout("model.layers.{layer}.block_sparse_moe.experts.{expert}", "w1", "w3", "w2"),
}
"""Layouts by Hugging Face's ``model_type``."""


class Checkpoint:
    """The experts of a checkpoint in safetensors files.

    Opening reads headers only. Fields are called ``gate_up.weight`` (gate above up, one tensor),
    ``down.weight``, and so for every other tensor of the projections: ``gate_up.bias``,
    ``down.weight_scale_inv``.

    Args:
        path: A folder with ``*.safetensors`` files, or one such file.
        layout: One of :data:`LAYOUTS`, or a :class:`Layout`; by default what fits the names.

    Raises:
        InvalidInputError: ``unreadable_file``, ``unknown`` for a layout; ``missing_tensor`` if
            there are no experts, or one lacks a tensor that others have; ``wrong_shape`` or
            ``wrong_dtype`` for an expert whose tensor differs from those of the others;
            ``repeated`` for a tensor in two files.
    """

    def __init__(self, path: str | os.PathLike[str], *, layout: str | Layout | None = None) -> None:
        self.path = Path(path)
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        self._headers = _headers(self.path, files)
        self.layout = _layout(layout, self._headers)
        self._found: dict[tuple[int, int], set[tuple[str, str]]] = {}
        shapes: dict[tuple[str, str], _Header] = {}
        pattern = self.layout.pattern
        for name, header in self._headers.items():
            if (match := pattern.fullmatch(name)) is None:
                continue
            part = (match["projection"], match["kind"])
            self._found.setdefault((int(match["layer"]), int(match["expert"])), set()).add(part)
            first = shapes.setdefault(part, header)
            if not first.is_like(header):
                raise InvalidInputError(
                    code="wrong_shape" if first.shape != header.shape else "wrong_dtype",
                    argument="path",
                    got=f"{name} of shape {list(header.shape)}, {header.dtype}",
                    expected=f"{list(first.shape)}, {first.dtype}, as the other experts'",
                )
        self._shapes = shapes
        if not self._found:
            raise InvalidInputError(
                code="missing_tensor",
                argument="path",
                got=f"{self.path}, {len(self._headers)} tensors",
                expected=f"a checkpoint with experts named as {pattern.pattern}",
                hint="another `layout`?",
            )
        self.bytes_read = 0
        """Bytes of tensors read so far, headers apart."""

    @cached_property
    def layer_ids(self) -> tuple[int, ...]:
        """The layers that have experts, by their number in the model."""
        return tuple(sorted({layer for layer, _ in self._found}))

    @cached_property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return 1 + max(expert for _, expert in self._found)

    @cached_property
    def fields(self) -> tuple[ExpertField, ...]:
        """What an expert consists of."""
        made: dict[str, ExpertField] = {}
        for projection, kind in sorted(self._shapes):
            header = self._shapes[projection, kind]
            name = self.layout.field(projection, kind)
            parts, _ = self.layout.parts(name)
            for part in parts:
                if (part, kind) not in self._shapes or self._shapes[part, kind] != header:
                    raise InvalidInputError(
                        code="missing_tensor",
                        argument="path",
                        got=f"{projection}.{kind}, but no {part}.{kind} of its shape",
                        expected=f"both of {' and '.join(parts)} or neither",
                    )
            shape = header.shape
            if len(parts) == 2:
                shape = (2 * shape[0], *shape[1:]) if shape else (2,)
            made[name] = ExpertField(name, shape, header.dtype)
        return tuple(made.values())

    def load_into(self, weights: ExpertWeights, plan: Plan, rank: int) -> None:
        """Reads the experts that a rank holds under a plan into its slots.

        An expert in two slots of the rank is read once. Slots without an expert stay as they are.

        Args:
            weights: Where to, with the fields of this checkpoint (:attr:`fields`).
            plan: Which expert each slot holds; its ``layer_ids`` are the model's.
            rank: The rank.

        Raises:
            InvalidInputError: ``wrong_shape`` if the weights have other fields, layers or slots;
                ``missing_tensor``, ``out_of_range`` for a rank. Nothing is changed then.

        Cost: one read of each expert, one copy; no more memory than one tensor.
        """
        here = slots_of(plan, rank)
        self._check(weights, plan, here)
        held = [self._held(plan, layer, here, name) for layer, name in enumerate(plan.layer_ids)]
        with ExitStack() as files:
            opened: dict[Path, Any] = {}
            for layer, experts in enumerate(held):
                for expert, slots in experts.items():
                    for name, part in self._tensors(plan.layer_ids[layer], expert):
                        source = self._read(name, opened, files)
                        for slot in slots:
                            part.of_slot(weights[layer][part.field][slot]).copy_(source)

    def read_expert(self, layer_id: int, expert: int, into: Mapping[str, Tensor]) -> None:
        """Reads one expert: one that was lost with its rank, for a mover's ``load``.

        Args:
            layer_id: The layer, as the model counts.
            expert: The expert.
            into: What to fill, by field.

        Raises:
            InvalidInputError: ``missing_tensor``. Nothing is changed then.
        """
        self._check_held(layer_id, expert)
        with ExitStack() as files:
            opened: dict[Path, Any] = {}
            for name, part in self._tensors(layer_id, expert):
                part.of_slot(into[part.field]).copy_(self._read(name, opened, files))

    def _tensors(self, layer_id: int, expert: int) -> Iterator[tuple[str, _Part]]:
        for field in self.fields:
            projections, kind = self.layout.parts(field.name)
            for index, projection in enumerate(projections):
                name = self.layout.name(layer_id, expert, projection, kind)
                scalar = self._shapes[projection, kind].shape == ()
                yield name, _Part(field.name, index, len(projections), scalar)

    def _held(self, plan: Plan, layer: int, here: range, layer_id: int) -> dict[int, list[int]]:
        """The experts of a layer on a rank, and their slots there."""
        held: dict[int, list[int]] = {}
        for slot, expert in enumerate(plan.phy2log[layer, here.start : here.stop].tolist()):
            if expert >= 0:
                held.setdefault(expert, []).append(slot)
        for expert in held:
            self._check_held(layer_id, expert)
        return held

    def _check_held(self, layer_id: int, expert: int) -> None:
        lacking = sorted(set(self._shapes) - self._found.get((layer_id, expert), set()))
        if lacking:
            name = self.layout.name(layer_id, expert, *lacking[0])
            raise InvalidInputError(
                code="missing_tensor",
                argument="plan",
                got=f"expert {expert} of layer {layer_id}, but no {name}",
                expected="experts that the checkpoint holds whole",
                hint=f"it has {self.num_experts} experts in layers {_listed(self.layer_ids)}",
            )

    def _check(self, weights: ExpertWeights, plan: Plan, here: range) -> None:
        got = {field.name: field for field in weights.fields}
        if got != {field.name: field for field in self.fields}:
            raise InvalidInputError(
                code="wrong_shape",
                argument="weights",
                got=f"fields {_described(weights.fields)}",
                expected=f"those of the checkpoint, {_described(self.fields)}",
                hint="`ExpertWeights(checkpoint.fields, ...)`",
            )
        num_layers = len(plan.phy2log)
        if (weights.num_layers, weights.num_slots) != (num_layers, len(here)):
            raise InvalidInputError(
                code="wrong_shape",
                argument="weights",
                got=f"{weights.num_layers} layers, {weights.num_slots} slots",
                expected=f"{num_layers} layers, {len(here)} slots, as the plan has",
            )

    def _read(self, name: str, opened: dict[Path, Any], files: ExitStack) -> Tensor:
        path = self._headers[name].path
        if path not in opened:
            opened[path] = files.enter_context(safe_open(path, framework="pt"))
        tensor: Tensor = opened[path].get_tensor(name)
        self.bytes_read += tensor.nbytes
        return tensor

    def export(self, weights: ExpertWeights, plan: Plan, rank: int, folder: Path) -> list[Path]:
        """Writes experts under the names they had; see :func:`write_index` for what comes then.

        Each expert is written by one rank, that of its first replica: a file for each layer, with
        the rank in its name. Call it on every rank.

        Args:
            weights: The experts of this rank.
            plan: Which expert each slot holds.
            rank: This rank.
            folder: Where to; made if it is not there.

        Returns:
            The files written.

        Raises:
            InvalidInputError: ``wrong_shape``, ``out_of_range`` as :meth:`load_into`.
            OSError: A file cannot be written.

        Memory: one layer of what this rank writes, on the CPU.
        """
        here = slots_of(plan, rank)
        self._check(weights, plan, here)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for layer, layer_id in enumerate(plan.layer_ids):
            tensors: dict[str, Tensor] = {}
            for expert, slot in enumerate(plan.log2phy[layer, :, 0].tolist()):
                if slot not in here:
                    continue
                for name, part in self._tensors(layer_id, expert):
                    stacked = weights[layer][part.field][slot - here.start]
                    tensors[name] = part.of_slot(stacked).detach().to("cpu", copy=True)
            if tensors:
                path = folder / f"experts-layer-{layer_id:03}-rank-{rank:04}.safetensors"
                save_file(tensors, path, metadata={"format": "pt"})
                written.append(path)
        return written


def write_index(folder: str | os.PathLike[str]) -> Path:
    """Writes the index of all safetensors files in a folder: call it once, when all ranks are done.

    Raises:
        InvalidInputError: ``unreadable_file`` for a file, ``repeated`` for a tensor in two files.
    """
    folder = Path(folder)
    headers = _headers(folder, sorted(folder.glob("*.safetensors")))
    total = sum(math.prod(header.shape) * header.dtype.itemsize for header in headers.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: header.path.name for name, header in headers.items()},
    }
    path = folder / INDEX
    write_whole(path, (json.dumps(index, indent=2) + "\n").encode(), "folder")
    return path


@dataclass(frozen=True, slots=True)
class _Part:
    """Where a checkpoint's tensor lies in a field: the whole, or one of two halves."""

    field: str
    index: int
    of: int
    scalar: bool

    def of_slot(self, stacked: Tensor) -> Tensor:
        """A view of it in what a slot holds of the field."""
        if self.of == 1:
            return stacked
        return stacked[self.index] if self.scalar else stacked.chunk(self.of)[self.index]


@dataclass(frozen=True, slots=True)
class _Header:
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path

    def is_like(self, other: _Header) -> bool:
        """Whether shape and dtype are the same."""
        return (self.shape, self.dtype) == (other.shape, other.dtype)


# The names in the files' headers.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def _headers(path: Path, files: list[Path]) -> dict[str, _Header]:
    """What all files hold, by name."""
    if not files:
        raise InvalidInputError(
            code="unreadable_file",
            argument="path",
            got=str(path),
            expected="a .safetensors file, or a folder with some",
        )
    headers: dict[str, _Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                shapes = {
                    name: (tuple(tensor.get_shape()), tensor.get_dtype())
                    for name, tensor in found.items()
                }
        except (OSError, SafetensorError) as error:
            raise InvalidInputError(
                code="unreadable_file",
                argument="path",
                got=f"{file}: {error}",
                expected="a safetensors file",
                hint="is the download complete?",
            ) from error
        for name, (shape, dtype) in shapes.items():
            if name in headers:
                raise InvalidInputError(
                    code="repeated",
                    argument="path",
                    got=f"{name} in {headers[name].path.name} and {file.name}",
                    expected="files that hold each tensor once",
                )
            if dtype not in _DTYPES:
                raise InvalidInputError(
                    code="wrong_dtype",
                    argument="path",
                    got=f"{name} of {dtype}",
                    expected=f"one of {', '.join(_DTYPES)}",
                )
            headers[name] = _Header(shape, _DTYPES[dtype], file)
    return headers


def _layout(given: str | Layout | None, names: Iterable[str]) -> Layout:
    """The layout asked for, or the first that fits a name."""
    if isinstance(given, Layout):
        return given
    if given is not None:
        if given not in LAYOUTS:
            raise InvalidInputError(
                code="unknown",
                argument="layout",
                got=repr(given),
                expected=f"one of {', '.join(LAYOUTS)}, or a Layout",
            )
        return LAYOUTS[given]
    patterns = {layout: layout.pattern for layout in dict.fromkeys(LAYOUTS.values())}
    fitting = (
        layout for name in names for layout, pattern in patterns.items() if pattern.fullmatch(name)
    )
    return next(fitting, _HUGGING_FACE)


def _described(fields: Iterable[ExpertField]) -> str:
    return ", ".join(
        f"{field.name} {list(field.shape)} {str(field.dtype).removeprefix('torch.')}"
        for field in fields
    )


def _listed(numbers: tuple[int, ...]) -> str:
    first, last = numbers[0], numbers[-1]
    return f"{first} to {last}" if len(numbers) > 2 else ", ".join(map(str, numbers))
