"""Who computes what when: bidirectional and zero-bubble pipeline schedules.

:class:`Schedule` holds the instruction stream of every pipeline rank as data: generated for any
schedule of the field, proved free of deadlock, simulated, drawn, and exchanged with PyTorch.

>>> from dualpipe import Schedule
>>> schedule = Schedule.generate("dualpipev", num_ranks=8, num_micro_batches=16)
>>> schedule.simulate().makespan
110.0
"""

from eplb_rs._core import __version__

from dualpipe.choice import Candidate, Layers, Machine, Partition, partition, search
from dualpipe.errors import DeadlockError, ScheduleError
from dualpipe.instruction import Instruction, Kind
from dualpipe.schedule import METHODS, Costs, Schedule, Timeline

__all__ = [
    "METHODS",
    "Candidate",
    "Costs",
    "DeadlockError",
    "Instruction",
    "Kind",
    "Layers",
    "Machine",
    "Partition",
    "Schedule",
    "ScheduleError",
    "Timeline",
    "__version__",
    "partition",
    "search",
]
