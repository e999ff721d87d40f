"""Runs vLLM's own tests of its load balancer with eplb-rs in the place of its policy.

    .venv-engines/bin/python tests/engines/vllm_own_tests.py VLLM_SOURCES [RESULTS.json]

The sources are those of vLLM 0.33.0, kept outside of this project:

    VLLM_VERSION_OVERRIDE=0.33.0 VLLM_TARGET_DEVICE=empty \
        pip download --no-deps --no-binary vllm --no-build-isolation vllm==0.33.0

vLLM's tests name `DefaultEplbPolicy`, not the registry, so that name is given to our policy before
they are imported. They run once for each of our policies, and once with vLLM's own, to tell what
has to do with the policy from what needs a GPU or another package. What each test came to is written
down, with the reason where it did not pass.
"""

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

FILES = (
    "test_eplb_algo.py",
    "test_eplb_utils.py",
    "test_eplb_migration_scheduler.py",
    "test_eplb_events.py",
    "test_eplb_execute.py",
    "test_eplb_spec_decode.py",
    "test_eplb_quant_scale_consistency.py",
    "test_eplb_fused_moe_layer.py",
    "test_eplb_fused_moe_layer_dep_nvfp4.py",
)
POLICIES = {"vLLM's own": "", "deepseek": "deepseek", "balanced": "balanced"}


class Outcomes:
    """A pytest plug-in that puts the policy in place and writes down what tests come to."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_configure(self) -> None:
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        if not os.environ["EPLB_RS_POLICY"]:
            return
        from eplb_rs.integrations import vllm as plugin
        from vllm.distributed.eplb import policy
        from vllm.distributed.eplb.policy import default

        assert plugin.is_installed()
        default.DefaultEplbPolicy = policy.EPLB_POLICIES["default"]

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            name = report.nodeid.rpartition("/")[2]
            self.found[name] = f"not collected: {str(report.longrepr).splitlines()[-1]}"

    def pytest_runtest_logreport(self, report) -> None:
        name = report.nodeid.rpartition("/")[2]
        if report.skipped:
            self.found[name] = f"skipped: {report.longrepr[2].removeprefix('Skipped: ')}"
        elif report.failed:
            self.found[name] = f"failed: {str(report.longrepr).strip().splitlines()[-1]}"
        elif report.when == "call":
            self.found[name] = "passed"


def in_this_process(sources: str) -> None:
    import pytest

    outcomes = Outcomes()
    os.chdir(sources)
    sys.path.insert(0, sources)
    options = ["-q", "--noconftest", "--tb=short", "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors"]
    paths = [f"tests/distributed/{file}" for file in FILES]
    pytest.main([*options, *paths], plugins=[outcomes])
    sys.stdout.write("\noutcomes " + json.dumps(outcomes.found) + "\n")


def main() -> None:
    sources, *rest = sys.argv[1:]
    found: dict[str, dict[str, str]] = {}
    for name, policy in POLICIES.items():
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--here", sources],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"EPLB_RS_POLICY": policy, "CUDA_VISIBLE_DEVICES": ""},
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("outcomes ")]
        if not lines:
            raise SystemExit(done.stderr[-3000:])
        found[name] = json.loads(lines[-1].removeprefix("outcomes "))
        for file in FILES:
            outcomes = [told for test, told in found[name].items() if test.startswith(file)]
            counts = Counter(told.partition(":")[0] for told in outcomes)
            told = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
            sys.stdout.write(f"{name:<11} {file:<42} {told}\n")
            sys.stdout.flush()
    if rest:
        ran = {name: version(name) for name in ("vllm", "torch", "eplb-rs")}
        record = ran | {"python": platform.python_version(), "outcomes": found}
        Path(rest[0]).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        in_this_process(*sys.argv[2:])
    else:
        main()
