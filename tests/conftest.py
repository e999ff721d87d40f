"""What all tests share."""

import importlib.util
import re
from pathlib import Path

from hypothesis import HealthCheck, settings

# Failures print how to reproduce them; machines are shared, so time is not a failure.
settings.register_profile(
    "eplb_rs",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("eplb_rs")

HAS_TORCH = importlib.util.find_spec("torch") is not None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out what cannot be imported without torch, where there is none."""
    if HAS_TORCH or not re.fullmatch(r"test_.*\.py", collection_path.name):
        return None
    needs = re.search(r"^import torch$", collection_path.read_text(encoding="utf-8"), re.MULTILINE)
    return True if needs else None


def pytest_report_header() -> str:
    return "" if HAS_TORCH else "without torch: tests that import it are left out"
