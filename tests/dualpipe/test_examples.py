"""The training examples: they compare every loss with one process themselves, and fail if it differs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import world

EXAMPLES = Path(__file__).parents[2] / "examples"
PRELOAD = ["torch._dynamo"]
"""The first step of an optimizer imports it."""


def train(rank: int, size: int, num_steps: int) -> list[list[float]]:
    sys.path.insert(0, str(EXAMPLES))
    names = ("train_dualpipe", "train_dualpipev")
    return [__import__(name).train(num_steps, torch.device("cpu")) for name in names]


def check(curves: list[list[float]], num_steps: int) -> None:
    for curve in curves:
        assert len(curve) == num_steps
        assert curve[-1] < curve[0] - 0.3


def test_training_examples():
    check(world.run(train, 2, 3)[0], 3)


@pytest.mark.slow
def test_training_examples_on_more_ranks():
    check(world.run(train, 4, 60, limit_s=1800)[0], 60)
