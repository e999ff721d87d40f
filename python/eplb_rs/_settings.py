"""What a planner is told, checked."""

from __future__ import annotations

from eplb_rs._inputs import as_count, as_number, wrong_type
from eplb_rs.errors import InvalidInputError

_MOST_ITERATIONS = 2**31
_LONGEST_US = 24 * 3600 * 1e6


def reach_of(
    max_moves: int | None, move_cost: float, min_balance: float | None, repeats: bool
) -> tuple[int | None, float, float | None, bool]:
    """How far to go from the plan in force, as the native module takes it."""
    if min_balance is not None:
        min_balance = as_number(min_balance, "min_balance", above=True)
        if min_balance > 1.0:
            raise InvalidInputError(
                code="out_of_range",
                argument="min_balance",
                got=repr(min_balance),
                expected="above 0 and at most 1, which is even",
            )
    return (
        None if max_moves is None else as_count(max_moves, "max_moves", least=0),
        as_number(move_cost, "move_cost"),
        min_balance,
        repeats,
    )


def checked_cost(crossing_cost: float | None, rule: str) -> float:
    if crossing_cost is None:
        return 1.0
    if rule != "priced":
        raise InvalidInputError(
            code="inconsistent",
            argument="crossing_cost",
            got=repr(crossing_cost),
            expected="None unless the rule for groups is priced",
            hint='group_rule="priced"',
        )
    try:
        return float(crossing_cost)
    except (TypeError, ValueError, OverflowError):
        raise wrong_type("crossing_cost", crossing_cost, "a number or None") from None


def checked_budget(
    iterations: int | None, time_limit_us: float | None
) -> tuple[int | None, float | None]:
    """What the native module takes as a budget: 32 bits of steps, or a time of a day at most."""
    if iterations is not None:
        if time_limit_us is not None:
            raise InvalidInputError(
                code="inconsistent",
                argument="time_limit_us",
                got=repr(time_limit_us),
                expected="None where iterations are given",
                hint="limit one of the two",
            )
        iterations = min(as_count(iterations, "iterations", least=0), _MOST_ITERATIONS)
    if time_limit_us is not None:
        try:
            time_limit_us = float(time_limit_us)
        except (TypeError, ValueError):
            raise wrong_type("time_limit_us", time_limit_us, "a number or None") from None
        if not 0 < time_limit_us <= _LONGEST_US:
            raise InvalidInputError(
                code="out_of_range",
                argument="time_limit_us",
                got=repr(time_limit_us),
                expected="above 0 and at most a day",
            )
    return iterations, time_limit_us
