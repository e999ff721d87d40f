"""CUDA graphs of stages: one launch for an F, B, I or W, where the host's launches are the limit.

A graph reads and writes the same memory every time, so a stage has as many *slots* as it has
micro-batches in flight at once, each with graphs, inputs and activations of its own. The autograd
graph that F's capture makes is kept with its slot: B, I and W are captured from it, and add to the
memory of the parameters' ``.grad``, which is therefore kept over ``zero_grad(set_to_none=True)``.

Each slot has a memory pool of its own, which its graphs share: they always run in the order of the
captures, while those of another slot may run at any time in between, and would write over what this
one keeps in memory that was scratch before.

What a stage does in Python runs at the capture and not at every replay.
"""

from dualpipe.executor.graphs.graphs import Graphs
from dualpipe.executor.graphs.stage import GraphedStage

__all__ = ["GraphedStage", "Graphs"]
