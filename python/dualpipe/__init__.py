"""Who computes what when: bidirectional and zero-bubble pipeline schedules.

This package is to generate the instruction stream of every pipeline rank, prove it free of
deadlock, simulate it, and execute it with torch.distributed. So far it has only its name and
version; the planner of expert placements, :mod:`eplb_rs`, comes first.
"""

from eplb_rs._core import __version__

__all__ = ["__version__"]
