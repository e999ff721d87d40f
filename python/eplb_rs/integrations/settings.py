"""What the environment asks of the plug-ins."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from eplb_rs.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from eplb_rs.planner import GroupRule, PolicyName

__all__ = ["VARIABLES", "EngineSettings"]

_logger = logging.getLogger("eplb_rs")

VARIABLES = (
    "EPLB_RS_POLICY",
    "EPLB_RS_MAX_MOVES",
    "EPLB_RS_GROUP_RULE",
    "EPLB_RS_ITERATIONS",
    "EPLB_RS_SHARES",
)
"""What the environment may hold. Others that begin like these are refused: they are misspelt."""

_MOST_ITERATIONS = 2**31
_MOST_ENTRIES = 1024


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How plug-ins plan; the same settings and loads give the same plan in every process.

    Attributes:
        policy: As for :class:`eplb_rs.Planner`.
        max_moves: How many experts a replan may move to other ranks, as a part of all slots;
            ``None`` for any number.
        group_rule: As for :class:`eplb_rs.Planner`.
        iterations: As for :class:`eplb_rs.Planner`.
        share_width: How many entries of `log2phy` an expert may have; ``None`` splits evenly.
    """

    policy: PolicyName = "balanced"
    max_moves: float | None = None
    group_rule: GroupRule = "strict"
    iterations: int | None = None
    share_width: int | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self | None:
        """The settings that the environment names; ``None`` unless it chooses eplb-rs.

        Raises:
            InvalidInputError: ``unknown`` for a variable that there is not, or for the value of
                one; ``out_of_range`` for a number; ``inconsistent`` for one that the policy does
                not look at.
        """
        given = os.environ if environment is None else environment
        named = sorted(name for name in given if name.startswith("EPLB_RS_"))
        chosen = given.get("EPLB_RS_POLICY", "")
        if not chosen:
            if any(given[name] for name in named):
                _logger.warning("%s: without EPLB_RS_POLICY of no effect", ", ".join(named))
            return None
        for name in named:
            _one_of("environment", name, VARIABLES)
        policy: PolicyName = _one_of("EPLB_RS_POLICY", chosen, ("balanced", "deepseek"))
        rule: GroupRule = _one_of(
            "EPLB_RS_GROUP_RULE", given.get("EPLB_RS_GROUP_RULE") or "strict", ("strict", "free")
        )
        for name in ("EPLB_RS_MAX_MOVES", "EPLB_RS_ITERATIONS"):
            if policy == "deepseek" and given.get(name):
                raise InvalidInputError(
                    code="inconsistent",
                    argument=name,
                    got=repr(given[name]),
                    expected="left out where EPLB_RS_POLICY is deepseek, which does not look at it",
                )
        moves = _number(given, "EPLB_RS_MAX_MOVES", "0 to 1", lambda n: 0 <= n <= 1)
        steps = _count(given, "EPLB_RS_ITERATIONS", _MOST_ITERATIONS)
        width = _count(given, "EPLB_RS_SHARES", _MOST_ENTRIES)
        return cls(
            policy=policy,
            max_moves=moves,
            group_rule=rule,
            iterations=steps,
            share_width=width,
        )


def _one_of(name: str, value: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise InvalidInputError(
            code="unknown", argument=name, got=repr(value), expected=" or ".join(known)
        )
    return value


def _count(given: Mapping[str, str], name: str, most: int) -> int | None:
    def fits(number: float) -> bool:
        return 1 <= number <= most and number == int(number)

    number = _number(given, name, f"a whole number from 1 to {most}", fits)
    return None if number is None else int(number)


def _number(
    given: Mapping[str, str], name: str, wanted: str, fits: Callable[[float], bool]
) -> float | None:
    text = given.get(name, "")
    if not text:
        return None
    try:
        number = float(text)
        good = fits(number)
    except (ValueError, OverflowError):
        good = False
    if not good:
        raise InvalidInputError(code="out_of_range", argument=name, got=repr(text), expected=wanted)
    return number
