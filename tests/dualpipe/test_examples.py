"""The training examples: they compare every loss with one process themselves, and fail if it differs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import world

EXAMPLES = Path(__file__).parents[2] / "examples"


def train(rank: int, size: int, name: str) -> list[float]:
    sys.path.insert(0, str(EXAMPLES))
    return __import__(name).train(4, torch.device("cpu"))


def check(curve: list[float]) -> None:
    assert len(curve) == 4
    assert curve[-1] < curve[0] - 1


def test_train_dualpipe():
    check(world.run(train, 4, "train_dualpipe")[0])


def test_train_dualpipev():
    check(world.run(train, 2, "train_dualpipev")[0])
