"""When stages are captured, and which."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch

from dualpipe.executor.graphs.capture import captured
from dualpipe.executor.graphs.likeness import hooks_of, state_of
from dualpipe.executor.graphs.slots import Slots, share_slots
from dualpipe.executor.graphs.stage import GraphedStage, Probe
from dualpipe.executor.pair import has_hook
from dualpipe.instruction import Instruction, Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dualpipe.executor.graphs.likeness import Like
    from dualpipe.executor.plan import Plan
    from dualpipe.executor.stage import Settings, Stage

__all__ = ["Graphs"]

_LAUNCH_BOUND = 0.7
"""The part of a forward's time on the GPU from which launching it on the host is too slow."""


class _NotCapturable(Exception):  # noqa: N818 - a reason, not a fault
    """Why a stage is run without graphs."""


class Graphs:
    """Decides when a rank's stages are captured, and captures them.

    Args:
        stages: The rank's stages by stage and copy.
        device: Where they are.
        wanted: Whether to capture: True from the second training step on (the first warms up);
            ``"auto"`` from the third, where the second has shown that launches are the limit.

    Cost: a capture takes about as long as running the instruction without graphs. A slot holds
    what a micro-batch in flight holds without graphs. At a replay 2 us for each tensor copied in.
    """

    def __init__(
        self,
        stages: Mapping[tuple[int, int], Stage],
        device: torch.device,
        wanted: bool | str,
    ) -> None:
        self._stages = {k: s for k, s in stages.items() if isinstance(s, GraphedStage)}
        self._device = device
        self._wanted = wanted if device.type == "cuda" else False
        self._plan: Plan | None = None
        self._states: dict[tuple[int, int], Any] = {}
        self._num_eager = 0
        self._idle = False
        self._slots: dict[tuple[int, int], Slots] | None = None
        self._grads: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._fresh: list[torch.Tensor] = []
        """Parameters that the step which has begun gave a gradient, of zeros."""
        self.why: dict[tuple[int, int], str] = {}
        """Why stages run without graphs."""
        self.num_bytes = 0
        """Device memory that the graphs hold."""

    def begin(self, plan: Plan, instructions: Iterable[Instruction], settings: Settings) -> None:
        """Sets the stages up for a step, after their own begin."""
        self._fresh = []
        if not self._wanted:
            return
        if not settings.training:
            self._use({})
            return
        if self._idle and plan is self._plan:
            return
        states = {key: state_of(stage) for key, stage in self._stages.items()}
        if plan is not self._plan or states != self._states:
            self._drop()
            self._plan, self._states = plan, states
        if self._slots is None:
            if self._num_eager < 1 + (self._wanted == "auto"):
                self._watch()
                return
            computations = tuple(i for i in instructions if i.kind.computes)
            self._slots = self._capture_all(computations, settings)
            # Nothing that may change later would make graphs worth it.
            self._idle = all("no limit" in self.why.get(key, "") for key in self._stages)
        self._reattach()
        self._use(self._slots)

    def undo(self) -> None:
        """Takes back what :meth:`begin` has done to gradients."""
        for parameter in self._fresh:
            parameter.grad = None
        self._fresh = []

    def _use(self, slots: Mapping[tuple[int, int], Slots]) -> None:
        for key, stage in self._stages.items():
            stage.slots = slots.get(key)

    def _watch(self) -> None:
        """Lets a step run without graphs, to warm up and to see what micro-batches are like."""
        self._num_eager += 1
        for stage in self._stages.values():
            stage.seen = set()
            stage.probe = Probe() if self._num_eager > 1 else None

    def _drop(self) -> None:
        self._use({})
        self._slots = None
        self._num_eager = 0
        self._idle = False
        self._grads = []
        self.why = {}
        self.num_bytes = 0

    def _reattach(self) -> None:
        """Lets ``.grad`` be the memory that the graphs add to."""
        fresh = []
        for parameter, grad in self._grads:
            now = parameter.grad
            if now is grad:
                continue
            if now is None:
                self._fresh.append(parameter)
                fresh.append(grad)
            elif now.data_ptr() != grad.data_ptr():
                grad.copy_(now)
            parameter.grad = grad
        if fresh:
            torch._foreach_zero_(fresh)

    def _capture_all(
        self, computations: tuple[Instruction, ...], settings: Settings
    ) -> dict[tuple[int, int], Slots]:
        # An autograd graph of an earlier step that is still there would tie its stream in.
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        cached = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()
        # Weights cast once and kept would not follow the optimizer.
        torch.set_autocast_cache_enabled(False)
        slots = {}
        try:
            for key, stage in self._stages.items():
                try:
                    like = self._alike(stage, computations)
                    with torch.cuda.stream(stream):
                        slots[key] = self._capture(key, stage, like, computations, settings)
                except _NotCapturable as reason:
                    self.why[key] = str(reason)
                except RuntimeError as error:
                    text = str(error).partition("\n")[0]
                    self.why[key] = f"its capture failed: {text}"
                stage.seen = stage.probe = None
        finally:
            torch.set_autocast_cache_enabled(cached)
        torch.cuda.synchronize(self._device)
        self.num_bytes = torch.cuda.memory_reserved(self._device) - before
        return slots

    def _alike(self, stage: GraphedStage, computations: Sequence[Instruction]) -> Like:
        """What all micro-batches of a stage are like, if it can be captured."""
        paired = any(i.kind == Kind.OVERLAP_F for i in computations)
        if paired and any(has_hook(stage, other) for other in self._stages.values()):
            raise _NotCapturable("a hook interleaves its forwards with backwards of others")
        hooks = hooks_of(stage)
        if hooks:
            raise _NotCapturable(f"{hooks} would run at the capture only")
        if stage.seen is None or len(stage.seen) != 1:
            raise _NotCapturable("its micro-batches are not all alike")
        if stage.probe is not None and stage.probe.ratio < _LAUNCH_BOUND:
            percent = 100 * stage.probe.ratio
            raise _NotCapturable(f"its launches take {percent:.0f} % of its time, so are no limit")
        like: Like
        (like,) = stage.seen
        return like

    def _capture(
        self,
        key: tuple[int, int],
        stage: GraphedStage,
        like: Like,
        computations: Sequence[Instruction],
        settings: Settings,
    ) -> Slots:
        for parameter in stage.module.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    self._fresh.append(parameter)
                    parameter.grad = torch.zeros_like(parameter)
                self._grads.append((parameter, parameter.grad))
        places, kinds = share_slots(computations, key)
        return Slots(places, [captured(stage, like, of, settings) for of in kinds])
