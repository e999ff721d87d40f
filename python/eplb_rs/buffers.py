"""Arrays that a planner writes placements into, for those who replan in a loop.

Letters: L layers, E logical experts, R slots, X the most replicas of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eplb_rs._inputs import as_count
from eplb_rs.errors import InvalidInputError

__all__ = ["PlanBuffers"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanBuffers:
    """Arrays that :meth:`Planner.plan_into` writes a placement into; all int64, C-contiguous.

    Attributes:
        phy2log: `[L, R]`, the expert in each slot.
        log2phy: `[L, E, X]` or wider, the slots of each expert, -1 pads; or ``None`` where
            nobody reads it, which saves most of the writing.
        logcnt: `[L, E]`, how many replicas each expert has.
    """

    phy2log: npt.NDArray[np.int64]
    log2phy: npt.NDArray[np.int64] | None
    logcnt: npt.NDArray[np.int64]

    @classmethod
    def _made(
        cls, num_slots: int, num_layers: int, num_experts: int, max_replicas: int | None
    ) -> PlanBuffers:
        """Arrays for so many slots, filled as if nothing were planned."""
        num_layers = as_count(num_layers, "num_layers")
        num_experts = as_count(num_experts, "num_experts")
        if num_experts > num_slots:
            raise InvalidInputError(
                code="too_large",
                argument="num_experts",
                got=str(num_experts),
                expected=f"at most the number of slots ({num_slots})",
            )
        width = num_slots - num_experts + 1
        if max_replicas is not None:
            width = as_count(max_replicas, "max_replicas", least=0)
        try:
            return cls(
                phy2log=np.zeros((num_layers, num_slots), dtype=np.int64),
                log2phy=np.full((num_layers, num_experts, width), -1, dtype=np.int64)
                if width
                else None,
                logcnt=np.zeros((num_layers, num_experts), dtype=np.int64),
            )
        except (MemoryError, ValueError) as error:
            raise InvalidInputError(
                code="too_large",
                argument="num_layers",
                got=str(num_layers),
                expected=f"small enough for buffers of {num_slots} slots and {num_experts} x "
                f"{width} values a layer to fit in memory",
            ) from error
