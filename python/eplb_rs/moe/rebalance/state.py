"""What a loop needs to go on after a restart: the placement in force, and the load so far."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from eplb_rs._files import write_whole
from eplb_rs._inputs import as_load
from eplb_rs.errors import InvalidInputError
from eplb_rs.plan import Plan

if TYPE_CHECKING:
    import os

    from eplb_rs._inputs import Load

__all__ = ["RebalancerState"]

_FORMAT, _VERSION = "eplb-rs rebalancer", 1


@dataclass(frozen=True, eq=False)
class RebalancerState:
    """What :meth:`eplb_rs.moe.Rebalancer.state` keeps.

    Attributes:
        plan: The placement in force: weights are to be loaded by it.
        windows: `[T, L, E]` float32, the load of the last windows; T may be 0.
    """

    plan: Plan
    windows: Load

    def to_json(self) -> str:
        """As JSON."""
        fields = {
            "format": _FORMAT,
            "version": _VERSION,
            "plan": json.loads(self.plan.to_json()),
            "windows": [
                [[_number(value) for value in row] for row in window]
                for window in self.windows.tolist()
            ],
        }
        return json.dumps(fields, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The state in a text that :meth:`to_json` wrote.

        Raises:
            InvalidInputError: ``not_json`` or ``wrong_format``; as :meth:`eplb_rs.Plan.from_json`
                for the plan.
        """
        try:
            fields = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise _no_state("not_json", str(error)) from None
        if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
            raise _no_state("wrong_format", "JSON of another kind")
        if fields.get("version") != _VERSION:
            raise _no_state("wrong_format", f"version {fields.get('version')!r}")
        plan = Plan.from_json(json.dumps(fields.get("plan")))
        shape = (plan.num_layers, plan.num_experts)
        windows = fields.get("windows")
        if not isinstance(windows, list):
            raise _no_state("wrong_format", "no windows")
        loads = [as_load(window, "windows") for window in windows]
        if any(load.shape != shape for load in loads):
            raise _no_state("wrong_format", f"windows unlike the plan's {shape}")
        return cls(plan, np.stack(loads) if loads else np.zeros((0, *shape), dtype=np.float32))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`to_json` to a file, wholly or not at all. One rank's is enough.

        Raises:
            InvalidInputError: ``unwritable_file``.
        """
        write_whole(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The state in a file that :meth:`save` wrote; the same file on all ranks.

        Raises:
            InvalidInputError: ``missing_file`` or ``unreadable_file``, else as :meth:`from_json`.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise _no_state("missing_file", str(path)) from None
        except (OSError, ValueError) as error:
            raise _no_state("unreadable_file", f"{path}: {error}") from None
        return cls.from_json(text)


def _number(value: float) -> int | float:
    """Whole numbers, which tokens are, without a fraction."""
    return int(value) if value.is_integer() else value


def _no_state(code: str, got: str) -> InvalidInputError:
    return InvalidInputError(
        code=code, argument="state", got=got, expected="a state that RebalancerState.save wrote"
    )
