"""The figures in README.md are those that were recorded."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_is_what_the_results_say() -> None:
    command = [sys.executable, ROOT / "benches" / "readme_figures.py", "--check"]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
