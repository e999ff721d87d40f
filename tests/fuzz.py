"""Random input, valid and not, through the Python face of the planner.

    python tests/fuzz.py --count 1000000 --seed 0
    python tests/fuzz.py --seconds 60
    python tests/fuzz.py --seed 0 --only 4711     # one case again, with all that it was given

Whatever comes in, a call answers or refuses with a `PlanError`, within a time limit. Every answer
passes the checks of `eplb_rs.testing`; some are compared with the plain NumPy reference. Each case
has random numbers of its own, so that it can be run alone.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
import traceback
import warnings
from collections import Counter

from fuzzing.case import ANSWERED, Case, FuzzError, Summary
from fuzzing.targets import TARGETS

__all__ = ["ANSWERED", "TARGETS", "Case", "FuzzError", "Summary", "run"]

HANG_SECONDS = 120.0
"""When a call is given up: the stack is printed and the program ends."""

BATCH = 1000
"""How many cases run between two looks at the clock."""


def run_case(seed: int, index: int, summary: Summary) -> None:
    """Runs one case.

    Raises:
        FuzzError: With the case, what it was given, and the traceback of what went wrong.
    """
    case = Case(seed, index, summary)
    name = case.random.choices(list(TARGETS), [weight for weight, _ in TARGETS.values()])[0]
    try:
        TARGETS[name][1](case)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic is no Exception
        given = "".join(f"\n  {key} = {value!r}" for key, value in case.given.items())
        raise FuzzError(
            f"case {index} of seed {seed}, {name}:{given}\n{traceback.format_exc()}"
        ) from error
    summary.outcomes.setdefault(name, Counter())[case.outcome] += 1
    summary.cases += 1


def run(
    *, count: int | None = None, seed: int = 0, seconds: float | None = None, alone: bool = False
) -> Summary:
    """Runs cases until there were `count`, or for so many seconds.

    `alone` says that this is all the process is there for: progress is written to stderr, and a
    call that hangs ends the process.

    Raises:
        FuzzError: For the first case in which something went wrong.
    """
    summary = Summary()
    start = said = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for first in range(0, sys.maxsize if count is None else count, BATCH):
            if alone:
                stderr = sys.__stderr__ or 2
                faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=stderr)
            last = first + BATCH if count is None else min(first + BATCH, count)
            for index in range(first, last):
                run_case(seed, index, summary)
            now = time.monotonic()
            summary.seconds = now - start
            if alone and now - said > 5:
                said = now
                share = f" of {count:,}" if count else ""
                say(f"{last:,}{share} cases, {summary.seconds:.0f} s")
            if seconds is not None and summary.seconds >= seconds:
                break
    if alone:
        faulthandler.cancel_dump_traceback_later()
    return summary


def say(text: str) -> None:
    """Writes a line that is no result."""
    sys.stderr.write(text + "\n")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, help="how many cases (default: 100,000)")
    parser.add_argument("--seed", type=int, default=0, help="where random numbers start")
    parser.add_argument("--seconds", type=float, help="for how long, instead of --count")
    parser.add_argument("--only", type=int, metavar="CASE", help="run this case alone")
    parser.add_argument("--without-torch", action="store_true", help="no tensors among the input")
    arguments = parser.parse_args()
    if not arguments.without_torch:
        try:
            import torch  # noqa: F401 - its being there is what is asked for
        except ImportError:
            say("no torch, so no tensors among the input")
    count = arguments.count
    if count is None and arguments.seconds is None:
        count = 100_000
    try:
        if arguments.only is not None:
            summary = Summary()
            run_case(arguments.seed, arguments.only, summary)
        else:
            summary = run(count=count, seed=arguments.seed, seconds=arguments.seconds, alone=True)
    except FuzzError as found:
        say(str(found))
        return 1
    sys.stdout.write(f"{summary}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
