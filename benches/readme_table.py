"""Writes the table of figures in README.md from benches/results/planner.json.

The file holds what a run of benches/planner.py measured:

    {"machine": {...}, "commit": "...", "cases": [{"name", "layers", "experts", "replicas", "gpus",
     "groups", "nodes", "median_us", "p99_us", "p999_us", "numpy_reference_us", "balance", "how"}]}

`python benches/readme_table.py` rewrites the block; with `--check` it only says whether the block
is what it would write.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benches" / "results" / "planner.json"
README = ROOT / "README.md"
BEGIN = "<!-- begin: figures (written by benches/readme_table.py) -->\n"
END = "<!-- end: figures -->"

NONE = "No figures have been recorded yet: `make bench` records them.\n"
HEAD = """\
| shape | GPUs | groups, nodes | median | p99 | p99.9 | plain NumPy | balance |
|---|---|---|---|---|---|---|---|
"""
LEGEND = """\
A shape is layers x experts -> slots. Times are milliseconds a call: {how}.
Measured on {machine}; commit {commit}.
"""


def table(results: dict[str, Any]) -> str:
    """The block in README.md, between its marks."""
    cases = results["cases"]
    hows = list(dict.fromkeys(case["how"] for case in cases))
    legend = LEGEND.format(
        how="; ".join(hows),
        machine=", ".join(str(value) for value in results["machine"].values()),
        commit=results["commit"][:10],
    )
    return HEAD + "".join(map(row, cases)) + "\n" + legend


def row(case: dict[str, Any]) -> str:
    times = [milliseconds(case[f"{name}_us"]) for name in ("median", "p99", "p999")]
    cells = [
        f"{case['layers']} x {case['experts']} -> {case['replicas']}",
        case["gpus"],
        f"{case['groups']}, {case['nodes']}" if case["groups"] > 1 else "global",
        *times,
        f"{milliseconds(case['numpy_reference_us'])} "
        f"({case['numpy_reference_us'] / case['median_us']:,.0f} x)",
        f"{case['balance']:.4f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |\n"


def milliseconds(microseconds: float) -> str:
    """Three significant digits."""
    value = microseconds / 1000
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> int:
    check = sys.argv[1:] == ["--check"]
    text = README.read_text(encoding="utf-8")
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        sys.exit(f"{README} lacks the marks of the table: {BEGIN.strip()} and {END}")
    recorded = RESULTS.exists()
    block = table(json.loads(RESULTS.read_text(encoding="utf-8"))) if recorded else NONE
    written = before + BEGIN + block + END + after
    if check:
        if written != text:
            sys.exit("README.md differs from benches/results: run python benches/readme_table.py")
        return 0
    README.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
