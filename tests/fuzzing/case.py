"""One case: its random numbers, what it was given and what came out."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from eplb_rs import PlanError

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Sequence

__all__ = ["ANSWERED", "Case", "FuzzError", "Summary"]

T = TypeVar("T")

LIMIT_SECONDS = 5.0
"""How long a single call may take; a thousand times what the slowest takes on an idle machine."""

ANSWERED = "answered"


class FuzzError(Exception):
    """A case in which the planner did something that it must not do."""


@dataclass
class Summary:
    """What came out, counted: by target, and there by answer or code of refusal."""

    cases: int = 0
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    compared: int = 0
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.cases:,} cases in {self.seconds:.1f} s, the slowest call "
            f"{self.slowest_seconds * 1e3:.1f} ms; {self.compared:,} answers equal the reference"
        ]
        for target, outcomes in self.outcomes.items():
            counts = ", ".join(f"{name} {count:,}" for name, count in outcomes.most_common())
            lines.append(f"  {target}: {counts}")
        return "\n".join(lines)


class Case:
    """One case."""

    def __init__(self, seed: int, index: int, summary: Summary) -> None:
        self.random = random.Random(seed * 2**40 + index)
        self.summary = summary
        self.outcome = ANSWERED
        self.given: dict[str, Any] = {}
        # The caller's settings of NumPy are no business of the planner.
        self.numpy: Literal["raise", "warn"] = "raise" if self.chance(0.1) else "warn"

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random.random() * len(options))]

    def upto(self, largest: int) -> int:
        """A number from 1 to `largest`."""
        return 1 + int(self.random.random() * largest)

    def attempt(self, call: Callable[[], T], **given: Any) -> T | None:
        """The answer of a call, or None where it was refused as it should be."""
        self.given = given
        start = time.perf_counter()
        try:
            with np.errstate(all=self.numpy):
                return call()
        except PlanError as error:
            self.outcome = error.code
            parts: list[Any] = [error.code, error.argument, error.got, error.expected, str(error)]
            for part in parts:
                if not isinstance(part, str) or not part:
                    raise FuzzError(f"a refusal with a part missing: {error!r}") from error
            return None
        finally:
            seconds = time.perf_counter() - start
            self.summary.slowest_seconds = max(self.summary.slowest_seconds, seconds)
            if seconds > LIMIT_SECONDS:
                raise FuzzError(f"the call took {seconds:.1f} s")
