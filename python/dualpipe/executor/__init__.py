"""Runs the instruction streams of a :class:`~dualpipe.Schedule` on ``torch.distributed``."""

from dualpipe.executor.checkpoint import layers_of, load_checkpoint, save_checkpoint
from dualpipe.executor.executor import PipelineExecutor
from dualpipe.executor.microbatches import MicroBatches
from dualpipe.executor.pair import OverlappedPair
from dualpipe.executor.result import StepResult
from dualpipe.executor.seeds import seed_of
from dualpipe.executor.transport.base import TensorSpec, Transport

__all__ = [
    "MicroBatches",
    "OverlappedPair",
    "PipelineExecutor",
    "StepResult",
    "TensorSpec",
    "Transport",
    "layers_of",
    "load_checkpoint",
    "save_checkpoint",
    "seed_of",
]
