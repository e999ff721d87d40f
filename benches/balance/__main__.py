"""Times the balanced policy through Python beside the reference policy, and checks its answers.

    python benches/balance [TABLE ...] [--seconds 1] [--output benches/results/balance.json]

One thread, pinned to one core. Each table is a file of its own, beside this one; with none named,
all are made. What is written replaces these tables in the file and leaves its others, so that
tables may be made one at a time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).parents[1]))
import bounds
import even
import faults
import groups
import measuring
import moves
import steady

if TYPE_CHECKING:
    from collections.abc import Callable

TABLES: dict[str, Callable[[float], list[dict[str, Any]]]] = {
    "even": even.rows,
    "steady": steady.rows,
    "bounds": bounds.rows,
    "groups": groups.rows,
    "moves": moves.rows,
    "faults": faults.rows,
}


def shown(value: object) -> str:
    """A value as the printed table has it."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Makes the tables that are asked for."""
    parser = measuring.parser(__doc__ or "", "balance.json", seconds=1.0)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.tables) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(unknown))}: choose from {', '.join(TABLES)}")
    measuring.pin()
    output: Path = arguments.output
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    for name in arguments.tables or TABLES:
        results[name] = TABLES[name](arguments.seconds)
        print(f"\n{name}")
        for row in results[name]:
            print("  ".join(f"{key} {shown(value)}" for key, value in row.items()))
    known = {"machine", "commit"}
    kept = {name: table for name, table in results.items() if name not in known}
    measuring.write(output, kept, arguments.commit)


if __name__ == "__main__":
    main()
