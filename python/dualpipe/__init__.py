"""Who computes what when: bidirectional and zero-bubble pipeline schedules, and running them.

:class:`Schedule` holds the instruction stream of every pipeline rank as data: generated for any
schedule of the field, proved free of deadlock, simulated, drawn, and exchanged with PyTorch.

>>> from dualpipe import Schedule
>>> schedule = Schedule.generate("dualpipev", num_ranks=8, num_micro_batches=16)
>>> schedule.simulate().makespan
110.0

:class:`PipelineExecutor` runs any of them on ``torch.distributed``; :class:`DualPipe` and
:class:`DualPipeV` are drop-in replacements for DeepSeek's. These need torch, which is imported
when one of them is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from eplb_rs._core import __version__

from dualpipe.choice import Candidate, Layers, Machine, Partition, partition, search
from dualpipe.costs import Costs
from dualpipe.errors import (
    DeadlockError,
    MismatchError,
    PeerLostError,
    PipelineError,
    ScheduleError,
)
from dualpipe.instruction import Instruction, Kind
from dualpipe.schedule import METHODS, Schedule
from dualpipe.timeline import Timeline

if TYPE_CHECKING:
    from dualpipe.comm import set_p2p_tensor_dtype, set_p2p_tensor_shapes
    from dualpipe.drop_in import DualPipe, DualPipeV
    from dualpipe.executor import PipelineExecutor
    from dualpipe.utils import WeightGradStore

__all__ = [
    "METHODS",
    "Candidate",
    "Costs",
    "DeadlockError",
    "DualPipe",
    "DualPipeV",
    "Instruction",
    "Kind",
    "Layers",
    "Machine",
    "MismatchError",
    "Partition",
    "PeerLostError",
    "PipelineError",
    "PipelineExecutor",
    "Schedule",
    "ScheduleError",
    "Timeline",
    "WeightGradStore",
    "__version__",
    "partition",
    "search",
    "set_p2p_tensor_dtype",
    "set_p2p_tensor_shapes",
]

_NEEDS_TORCH = {
    "DualPipe": "dualpipe.drop_in",
    "DualPipeV": "dualpipe.drop_in",
    "PipelineExecutor": "dualpipe.executor",
    "WeightGradStore": "dualpipe.utils",
    "set_p2p_tensor_dtype": "dualpipe.comm",
    "set_p2p_tensor_shapes": "dualpipe.comm",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_NEEDS_TORCH[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
