"""The examples run, and print what they promise."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_plan_loop():
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / "plan_loop.py"],
        check=True,
        capture_output=True,
        text=True,
    )
    rows = re.findall(r"^ *\d+-\d+ +\w+ +([\d.]+) +([\d.]+)", done.stdout, re.MULTILINE)
    assert len(rows) == 32
    assert all(float(planned_on) > 0.98 for planned_on, _ in rows)
    assert re.search(r"planned 32 times: median \d+ us", done.stdout)
