"""Experts from one placement to another while they serve."""

from eplb_rs.moe.move.error import MoveError, StoreLostError
from eplb_rs.moe.move.mover import ExpertMover, MoveStats

__all__ = ["ExpertMover", "MoveError", "MoveStats", "StoreLostError"]
