"""Seeds that do not depend on who computes what when."""

from __future__ import annotations

import hashlib
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["seed_of", "unseeded"]


def seed_of(seed: int, step: int, stage: int, micro_batch: int) -> int:
    """The seed of one forward: a number below 2**63 that follows from these four alone.

    A sequential run that calls ``torch.manual_seed(seed_of(...))`` before each stage's forward
    draws the same dropout masks as any schedule on any number of ranks.

    Args:
        seed: The executor's ``seed``.
        step: Training steps and others that the executor has run, from 0.
        stage: The stage.
        micro_batch: The micro-batch, counted over all copies: those of copy 0 first.
    """
    key = struct.pack("<4q", seed, step, stage, micro_batch)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


@contextmanager
def unseeded(seeded: bool, device: torch.device) -> Iterator[None]:
    """Leaves the caller's random generators as they are, where what runs inside is seeded."""
    if not seeded:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
