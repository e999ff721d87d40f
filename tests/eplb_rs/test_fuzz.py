"""A short run of the fuzzer, and that it finds what it is there to find."""

import time
from collections.abc import Callable
from typing import Any

import eplb_rs
import fuzz
import numpy as np
import pytest
from eplb_rs import InvalidInputError


def test_random_input_is_answered_or_refused() -> None:
    summary = fuzz.run(count=12_000, seed=20_240_601)
    assert summary.cases == 12_000
    assert summary.compared > 100
    assert set(summary.outcomes) == set(fuzz.TARGETS)
    for name, outcomes in summary.outcomes.items():
        # The input is neither all valid nor all broken.
        share = outcomes[fuzz.ANSWERED] / outcomes.total()
        assert 0.02 < share < 0.95, name
        assert len(outcomes) > 8, name


@pytest.mark.slow
def test_a_million_random_inputs_are_answered_or_refused() -> None:
    assert fuzz.run(count=1_000_000, seed=0).cases == 1_000_000


def test_a_case_can_be_run_again_alone() -> None:
    whole, alone = fuzz.Summary(), fuzz.Summary()
    for index in range(200):
        fuzz.run_case(7, index, whole)
    for index in reversed(range(200)):
        fuzz.run_case(7, index, alone)
    assert whole.outcomes == alone.outcomes


class Panic(BaseException):
    """Like a panic of native code, which is no Exception."""


def misbehaving(fault: str) -> Callable[..., Any]:
    """`rebalance_experts` with a fault that shows once in a while."""
    sound = eplb_rs.rebalance_experts
    calls = 0

    def rebalance(weight: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        answer = sound(weight, *arguments)
        if calls < 50:
            return answer
        phy2log, log2phy, logcnt = (np.array(part) for part in answer)
        match fault:
            case "panic":
                raise Panic("index out of bounds")
            case "untyped":
                raise ValueError("what?")
            case "bare":
                raise InvalidInputError(code="", argument="weight", got="1", expected="2")
            case "slow":
                time.sleep(0.6)
            case "counts":
                logcnt[-1, -1] += 1
            case "slots":
                log2phy = log2phy[:, ::-1]
            case "other":  # valid, but not the reference's
                return sound(np.asarray(weight)[:, ::-1], *arguments)
            case "dtype":
                phy2log = phy2log.astype(np.int32)
        return phy2log, log2phy, logcnt

    return rebalance


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("panic", "index out of bounds"),
        ("untyped", "ValueError: what?"),
        ("bare", "a refusal with a part missing"),
        ("slow", "the call took"),
        ("counts", "logcnt: layer"),
        ("slots", "log2phy: layer"),
        ("other", "the answer is not the reference's"),
        ("dtype", "phy2log is int32"),
    ],
)
def test_a_fault_is_found_and_can_be_repeated(
    fault: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eplb_rs, "rebalance_experts", misbehaving(fault))
    if fault == "slow":
        monkeypatch.setattr("fuzzing.case.LIMIT_SECONDS", 0.5)
    with pytest.raises(fuzz.FuzzError) as caught:
        fuzz.run(count=20_000, seed=3)
    found = str(caught.value)
    assert message in found
    assert found.startswith("case ")
    assert " of seed 3, rebalance_experts:\n  weight = " in found


def test_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--count", "300", "--seed", "5", "--without-torch"])
    assert fuzz.main() == 0
    assert capsys.readouterr().out.startswith("300 cases in ")
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--seed", "5", "--only", "17", "--without-torch"])
    assert fuzz.main() == 0
    monkeypatch.setattr(eplb_rs, "rebalance_experts", misbehaving("untyped"))
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--seconds", "30", "--without-torch"])
    assert fuzz.main() == 1
    assert "ValueError: what?" in capsys.readouterr().err
