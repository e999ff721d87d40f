"""Checkpoints by layer, so that they load under another schedule and another number of ranks.

A folder holds one folder for each step, `step-00000012`, and in it one file for each layer,
`layer-00003.pt`. A file appears under its name only when it is whole, and a step counts only
when all its layers are there, so a rank that dies while it saves leaves the step before it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dualpipe.errors import PipelineError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

__all__ = ["layers_of", "load_checkpoint", "save_checkpoint"]


def layers_of(stages: Mapping[Any, nn.Module], bounds: Sequence[int]) -> dict[int, nn.Module]:
    """The layers of a rank's stages by their number in the whole model.

    Args:
        stages: Modules by stage, or by stage and copy, whose children are the layers
            (``nn.Sequential``, ``nn.ModuleList``).
        bounds: Stage s holds layers ``bounds[s]`` to ``bounds[s + 1]``, `[S + 1]`; for example
            :attr:`dualpipe.choice.Partition.bounds`.

    Raises:
        PipelineError: ``layers``, where a stage has another number of children, or no bounds.
    """
    found: dict[int, nn.Module] = {}
    for key, module in stages.items():
        stage = key[0] if isinstance(key, tuple) else key
        if not 0 <= stage < len(bounds) - 1:
            raise PipelineError(
                code="layers",
                argument="bounds",
                got=f"{len(bounds)} bounds",
                expected=f"at least {stage + 2}, since there is a stage {stage}",
            )
        numbers = range(bounds[stage], bounds[stage + 1])
        children = list(module.children())
        if len(children) != len(numbers):
            raise PipelineError(
                code="layers",
                argument="stages",
                got=f"stage {stage} with {len(children)} children",
                expected=f"{len(numbers)}, for layers {numbers.start} to {numbers.stop - 1}",
            )
        found.update(zip(numbers, children, strict=True))
    return found


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    layers: Mapping[int, nn.Module],
    num_layers: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    keep: int = 2,
) -> None:
    """Saves this rank's layers, parameters and buffers; no rank waits for another.

    Of a layer that several ranks hold, any of them may save it, or all.

    Args:
        folder: For one run of training; all ranks see the same files.
        step: The number of the step, at least 0.
        layers: By their number in the whole model.
        num_layers: Of the whole model, on all ranks together.
        optimizer: Its state for these layers' parameters is saved as well. Options of its
            groups, such as the learning rate, are not.
        keep: How many steps that are complete to keep, at least 1.

    Raises:
        OSError: The folder cannot be written to.
        PipelineError: ``step``, ``keep``, ``layers``.
    """
    counts: list[tuple[str, object, int]] = [("step", step, 0), ("keep", keep, 1)]
    for name, value, least in counts:
        if not isinstance(value, Integral) or int(value) < least:
            raise PipelineError(
                code=name,
                argument=name,
                got=repr(value),
                expected=f"a whole number, {least} or more",
            )
    if not all(number in range(num_layers) for number in layers):
        raise PipelineError(
            code="layers",
            argument="layers",
            got=f"layers {sorted(layers)}",
            expected=f"some of 0 to {num_layers - 1}",
        )
    folder = Path(folder)
    target = _step_folder(folder, step)
    target.mkdir(parents=True, exist_ok=True)
    for number, layer in layers.items():
        content = {
            "module": layer.state_dict(),
            "optimizer": {} if optimizer is None else _state(layer, optimizer),
        }
        part = target / f"{_layer_file(number)}.{os.getpid()}"
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target / _layer_file(number))
    kept = _complete(folder, num_layers)[-keep:]
    old_steps = [old for old in _steps(folder) if len(kept) == keep and old < kept[0]]
    for old in old_steps:
        for number in layers:
            (_step_folder(folder, old) / _layer_file(number)).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others have yet to remove theirs
            _step_folder(folder, old).rmdir()


def load_checkpoint(
    folder: str | os.PathLike[str],
    layers: Mapping[int, nn.Module],
    num_layers: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    group: dist.ProcessGroup | None = None,
) -> int:
    """Loads the last step that is complete into this rank's layers, whichever they are.

    Args:
        folder: As for :func:`save_checkpoint`.
        layers: By their number in the whole model; need not be those that this rank saved.
        num_layers: Of the whole model.
        optimizer: Gets its state for these layers' parameters.
        group: The ranks that load together; they agree on the step, and later steps, which are
            not complete, are removed. None for this process alone, which removes nothing.

    Returns:
        The number of the step.

    Raises:
        PipelineError: ``no_checkpoint``, where no step is complete; ``checkpoint``, where a file
            does not fit a layer. Nothing is loaded then.
    """
    folder = Path(folder)
    steps = set(_complete(folder, num_layers))
    if group is not None:
        every: list[Any] = [None] * group.size()
        dist.all_gather_object(every, steps, group=group)
        steps = set.intersection(*every)
    if not steps:
        raise PipelineError(
            code="no_checkpoint",
            argument="folder",
            got=str(folder),
            expected=f"a folder with a step that has all {num_layers} layers",
        )
    step = max(steps)
    found = {}
    for number, layer in layers.items():
        path = _step_folder(folder, step) / _layer_file(number)
        found[number] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        _check(number, layer, found[number])
    for number, layer in layers.items():
        layer.load_state_dict(found[number]["module"])
        if optimizer is not None:
            _restore(layer, optimizer, found[number]["optimizer"])
    if group is not None:
        dist.barrier(group)
        if group.rank() == 0:
            for later in _steps(folder):
                if later > step:
                    shutil.rmtree(_step_folder(folder, later), ignore_errors=True)
        dist.barrier(group)
    return step


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _layer_file(number: int) -> str:
    return f"layer-{number:05d}.pt"


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted(int(name) for name in names if name.isdecimal())


def _complete(folder: Path, num_layers: int) -> list[int]:
    """The steps of which every layer is there."""
    names = {_layer_file(number) for number in range(num_layers)}
    return [
        step
        for step in _steps(folder)
        if names <= {path.name for path in _step_folder(folder, step).glob("layer-*.pt")}
    ]


def _state(layer: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimizer's state by parameter, with what lives on another device than it apart."""
    return {
        name: {
            key: (value, not isinstance(value, torch.Tensor) or value.device == parameter.device)
            for key, value in optimizer.state[parameter].items()
        }
        for name, parameter in layer.named_parameters()
        if parameter in optimizer.state
    }


def _restore(layer: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    for name, parameter in layer.named_parameters():
        if name not in saved:
            optimizer.state.pop(parameter, None)
            continue
        optimizer.state[parameter] = {
            key: _own(value, parameter.device if beside else torch.device("cpu"))
            for key, (value, beside) in saved[name].items()
        }


def _own(value: Any, device: torch.device) -> Any:
    """A copy of its own: what was loaded is a view of the file."""
    return value.to(device, copy=True) if isinstance(value, torch.Tensor) else value


def _check(number: int, layer: nn.Module, content: Any) -> None:
    def shapes(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {name: getattr(value, "shape", None) for name, value in tensors.items()}

    have, want = shapes(content["module"]), shapes(layer.state_dict())
    for name in sorted(have.keys() | want.keys()):
        if have.get(name, "nothing") != want.get(name, "nothing"):
            raise PipelineError(
                code="checkpoint",
                argument="layers",
                got=f"layer {number} with {name!r} of shape {want.get(name, 'nothing')}",
                expected=f"{have.get(name, 'nothing')}, as in the checkpoint",
            )
