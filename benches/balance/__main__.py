"""Times the balanced policy through Python beside the reference policy, and checks its answers.

    python benches/balance [TABLE ...] [--seconds 1] [--output benches/results/balance.json]

One thread. Each table is a file of its own, beside this one; with none named, all are made. What is
written replaces these tables in the file and leaves its others, so that tables may be made one at
a time.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import eplb_rs
import even
import moves

if TYPE_CHECKING:
    from collections.abc import Callable

TABLES: dict[str, Callable[[float], list[dict[str, Any]]]] = {
    "even": even.rows,
    "moves": moves.rows,
}


def shown(value: object) -> str:
    """A value as the printed table has it."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Makes the tables that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each measurement")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    if unknown := set(arguments.tables) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(unknown))}: choose from {', '.join(TABLES)}")
    output: Path | None = arguments.output
    results: dict[str, Any] = {}
    if output is not None and output.exists():
        results = json.loads(output.read_text())
    results |= {
        "machine": platform.processor() or platform.machine(),
        "version": eplb_rs.__version__,
    }
    for name in arguments.tables or TABLES:
        results[name] = TABLES[name](arguments.seconds)
        print(f"\n{name}")
        for row in results[name]:
            print("  ".join(f"{key} {shown(value)}" for key, value in row.items()))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
