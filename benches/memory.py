"""What the peak memory of a rank's step is made of, term by term.

Each term is measured alone, on one stage and one micro-batch; a walk through the rank's
instructions adds them up, and finds where the sum is greatest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from dualpipe import Kind
from torch.autograd.graph import get_gradient_edge
from transformer import loss_of

if TYPE_CHECKING:
    from transformer import Case

__all__ = ["terms_of"]

GIB = 2.0**30


class _Meter:
    """Allocated memory since it was set."""

    def __init__(self) -> None:
        self.set()

    def set(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._start = torch.cuda.memory_allocated()

    @property
    def now(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - self._start

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self._start


def _measured(stage: Any, case: Case, device: torch.device) -> dict[str, int]:
    """What one micro-batch takes on a stage: kept after F and after I, and at most in each."""
    shape = (1, case.sequence, case.hidden)
    made = (torch.randn(shape, dtype=case.dtype, device=device) for _ in range(3))
    given, target, grad = made
    given.requires_grad_(not stage.is_first)
    found = {}
    meter = _Meter()
    for split in (False, True):
        meter.set()
        output = stage.module(given)
        if stage.is_last:
            loss = loss_of(output, target)
            roots, grads = [get_gradient_edge(loss)], [torch.ones_like(loss.detach().clone())]
            del loss
        else:
            roots, grads = [get_gradient_edge(output)], [grad]
        del output
        found["F kept"], found["F peak"] = meter.now, meter.peak
        # From here on beside what F has kept.
        before = meter.now
        torch.cuda.reset_peak_memory_stats()
        if not split:
            stage.gradient.whole(roots, grads, [given])
            found["B peak"] = meter.peak - before
        else:
            _, rest = stage.gradient.input_part(roots, grads, [given])
            found["I peak"] = meter.peak - before
            roots.clear()
            del _
            found["I kept"] = meter.now
            torch.cuda.reset_peak_memory_stats()
            rest.run()
            found["W peak"] = meter.peak - found["I kept"]
        del roots
    return found


_SENDS = {Kind.SEND_F, Kind.SEND_B}
_LEFT = {Kind.WAIT_SEND_F, Kind.WAIT_SEND_B}
_PLAIN = {Kind.OVERLAP_F: Kind.F, Kind.OVERLAP_B: Kind.B}


def terms_of(contender: Any, rank: int, case: Case, device: torch.device) -> dict[str, Any]:
    """The terms of the peak, in GiB, and where it is; without CUDA graphs."""
    executor = contender.executor
    parameters = [p for s in executor.stages.values() for p in s.module.parameters()]
    own = {key: _measured(stage, case, device) for key, stage in executor.stages.items()}
    message = case.sequence * case.hidden * case.dtype.itemsize
    held: dict[tuple[int, int, int], int] = {}
    waiting: set[tuple[int, int, int]] = set()
    sent = 0
    best: tuple[int, dict[str, Any]] = (0, {})
    for kind, stage, m, copy in contender.schedule.place_transfers().instructions(rank):
        plain = _PLAIN.get(kind, kind)
        # What is sent is held until it has left.
        sent += message * ((kind in _SENDS) - (kind in _LEFT))
        if plain not in {Kind.F, Kind.B, Kind.I, Kind.W}:
            continue
        key, figures = (stage, m, copy), own[stage, copy]
        total = sum(held.values()) + figures[f"{plain.name} peak"] + sent
        if total > best[0]:
            kept = sum(size for at, size in held.items() if at in waiting)
            best = (
                total,
                {
                    "where": f"{stage}{chr(39) * copy}{plain.name}{m}",
                    "micro-batches in flight": len(held),
                    "activations": (sum(held.values()) - kept) / GIB,
                    "kept between I and W": kept / GIB,
                    "being sent": sent / GIB,
                    "used by the instruction itself": figures[f"{plain.name} peak"] / GIB,
                },
            )
        if plain == Kind.F:
            held[key] = figures["F kept"]
        elif plain == Kind.I:
            held[key] = figures["I kept"]
            waiting.add(key)
        else:
            del held[key]
            waiting.discard(key)
    fixed = {
        "parameters": sum(p.nbytes for p in parameters) / GIB,
        "gradients": sum(p.grad.nbytes for p in parameters) / GIB,
        "inputs and targets": contender.num_bytes / GIB,
        # cuBLAS takes 32 MiB for each thread that calls it: the caller's and autograd's.
        "workspaces": 2 * 32 / 1024,
    }
    numbers = [value for value in best[1].values() if isinstance(value, float)]
    return {
        **fixed,
        **best[1],
        "sum": sum(fixed.values()) + sum(numbers),
        "by stage": {f"{s}{chr(39) * c}": f for (s, c), f in own.items()},
        "beside torch's allocator, transfer buffers": getattr(executor.transport, "num_bytes", 0)
        / GIB,
        "graphs": executor.graphs.num_bytes / GIB,
    }
