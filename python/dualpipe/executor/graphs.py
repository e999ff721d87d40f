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

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dualpipe.executor.boundary import as_outputs
from dualpipe.executor.pair import has_hook
from dualpipe.executor.stage import Stage
from dualpipe.instruction import Instruction, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import nn

    from dualpipe.executor.backward import WeightPart
    from dualpipe.executor.plan import Plan
    from dualpipe.executor.stage import Flight, Settings

__all__ = ["GraphedStage", "Graphs"]

_LAUNCH_BOUND = 0.7
"""The part of a forward's time on the GPU from which launching it on the host is too slow."""

_ENDS = {Kind.B, Kind.W, Kind.OVERLAP_B}
_OF_GRAPH = {Kind.OVERLAP_F: Kind.F, Kind.OVERLAP_B: Kind.B}


class _NotCapturable(Exception):  # noqa: N818 - a reason, not a fault
    """Why a stage is run without graphs."""


class GraphedStage(Stage):
    """A stage whose instructions are replayed once they have been captured."""

    @cached_property
    def modules(self) -> list[nn.Module]:
        """The stage's module and all that are in it."""
        return list(self.module.modules())

    slots: Slots | None = None
    """What has been captured; None runs the stage as it is."""
    seen: set[Any] | None = None
    """What micro-batches of the last steps were like."""
    probe: _Probe | None = None
    """How long the first forward of a step takes, on the host and on the GPU."""

    def forward(self, m: int) -> None:
        """F."""
        flight = self.flights[m]
        if self.slots is not None:
            slot = self.slots.forward(flight, m, self.open(flight, m))
            if flight.arrival is not None:
                # Copied into the slot.
                flight.arrival.release()
                flight.arrival = None
            self._keep(flight, m, slot)
            return
        inputs = self.open(flight, m)
        if self.settings.training and self.seen is not None:
            self.seen.add(_kind_of(inputs, flight))
        if self.probe is not None and m == 0:
            with self.probe:
                returned = self.module(*inputs, **flight.kwargs)
        else:
            returned = self.module(*inputs, **flight.kwargs)
        self.close(flight, m, returned)

    def backward(self, m: int) -> None:
        """B."""
        if self.slots is None:
            super().backward(m)
        else:
            self._backward(m, Kind.B)
            self.free(self.flights[m])

    def backward_input(self, m: int) -> None:
        """I."""
        if self.slots is None:
            super().backward_input(m)
        else:
            self._backward(m, Kind.I)

    def backward_weight(self, m: int) -> None:
        """W."""
        if self.slots is None:
            super().backward_weight(m)
        else:
            self.slots.backward_weight(m)
            self.free(self.flights[m])

    def _backward(self, m: int, kind: Kind) -> None:
        flight = self.flights[m]
        assert self.slots is not None
        if flight.grad_arrival is not None:
            flight.output_grads = flight.grad_arrival.ready()
        grads = self.slots.backward(flight, m, kind)
        if flight.grad_arrival is not None:
            flight.grad_arrival.release()
            flight.grad_arrival = None
        # What stays on this rank may be used after the slot has got another micro-batch.
        here = self.previous is not None or self.is_first
        flight.input_grads = [None if g is None else g.clone() for g in grads] if here else grads
        self.hand_back(flight, m)

    def _keep(self, flight: Flight, m: int, slot: Slot) -> None:
        """Hands on what a replay has computed."""
        if self.is_last:
            if slot.loss is not None:
                self.losses[m] = slot.loss.detach().clone()
            if self.settings.return_outputs:
                self.results[m] = tuple(
                    None if o is None else o.detach().clone() for o in slot.outputs
                )
        elif self.next is not None:
            self.next.flights[m].inputs = [
                None if o is None else o.detach().requires_grad_(o.requires_grad)
                for o in slot.outputs
            ]
        else:
            flight.outputs = [None if o is None else o.detach() for o in slot.outputs]


class Slot:
    """Memory and graphs for one micro-batch in flight."""

    def __init__(self, like: _Like) -> None:
        self.inputs = [_sample(part) for part in like.inputs]
        self.kwargs = {name: _sample(part) for name, part in like.kwargs}
        self.labels = [_sample(part) for part in like.labels]
        self.graphs: dict[Kind, torch.cuda.CUDAGraph] = {}
        self.outputs: tuple[torch.Tensor | None, ...] = ()
        self.loss: torch.Tensor | None = None
        self.sources: list[torch.Tensor | None] = []
        """The outputs whose gradients come back; None where they lead nowhere."""
        self.output_grads: list[torch.Tensor | None] = []
        self.input_grads: dict[Kind, list[torch.Tensor | None]] = {}
        self.weight_part: WeightPart | None = None
        self.flight: Flight | None = None
        """The micro-batch that was here last."""

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The inputs that need a gradient."""
        return [t for t in self.inputs if isinstance(t, torch.Tensor) and t.requires_grad]

    def fill(self, flight: Flight, inputs: Sequence[Any]) -> None:
        """Takes a micro-batch in, once what the last one gave has left."""
        self.settle()
        self.flight = flight
        with torch.no_grad():
            for own, given in _tensor_pairs(self.inputs, inputs):
                own.copy_(given)
            for own, given in _tensor_pairs(self.labels, flight.labels):
                own.copy_(given)
            for name, own in self.kwargs.items():
                if isinstance(own, torch.Tensor):
                    own.copy_(flight.kwargs[name])

    def settle(self) -> None:
        """Lets the stream wait until everything that was sent from here has been read."""
        if self.flight is not None:
            for departure in (self.flight.departure, self.flight.grad_departure):
                if departure is not None:
                    departure.done()


class Slots:
    """A stage's slots, and which micro-batch uses which."""

    def __init__(self, places: Mapping[int, int], slots: list[Slot]) -> None:
        self._places = places
        self._slots = slots

    def forward(self, flight: Flight, m: int, inputs: Sequence[Any]) -> Slot:
        """Replays F; the slot has the results."""
        slot = self._slots[self._places[m]]
        slot.fill(flight, inputs)
        slot.graphs[Kind.F].replay()
        return slot

    def backward(self, flight: Flight, m: int, kind: Kind) -> Sequence[torch.Tensor | None]:
        """Replays B or I; the gradients of the inputs."""
        slot = self._slots[self._places[m]]
        slot.settle()
        given = flight.output_grads
        for own, grad in zip(slot.output_grads, given, strict=bool(slot.output_grads)):
            if own is not None:
                own.zero_() if grad is None else own.copy_(grad)
        slot.graphs[kind].replay()
        return slot.input_grads[kind]

    def backward_weight(self, m: int) -> None:
        """Replays W."""
        self._slots[self._places[m]].graphs[Kind.W].replay()


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
        self.why: dict[tuple[int, int], str] = {}
        """Why stages run without graphs."""
        self.num_bytes = 0
        """Device memory that the graphs hold."""

    def begin(self, plan: Plan, instructions: Iterable[Instruction], settings: Settings) -> None:
        """Sets the stages up for a step, after their own begin."""
        if not self._wanted:
            return
        if not settings.training:
            self._use({})
            return
        if self._idle and plan is self._plan:
            return
        states = {key: _state(stage) for key, stage in self._stages.items()}
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

    def _use(self, slots: Mapping[tuple[int, int], Slots]) -> None:
        for key, stage in self._stages.items():
            stage.slots = slots.get(key)

    def _watch(self) -> None:
        """Lets a step run without graphs, to warm up and to see what micro-batches are like."""
        self._num_eager += 1
        for stage in self._stages.values():
            stage.seen = set()
            stage.probe = _Probe() if self._num_eager > 1 else None

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

    def _alike(self, stage: GraphedStage, computations: Sequence[Instruction]) -> _Like:
        """What all micro-batches of a stage are like, if it can be captured."""
        paired = any(i.kind == Kind.OVERLAP_F for i in computations)
        if paired and any(has_hook(stage, other) for other in self._stages.values()):
            raise _NotCapturable("a hook interleaves its forwards with backwards of others")
        hooks = _hooks(stage)
        if hooks:
            raise _NotCapturable(f"{hooks} would run at the capture only")
        if stage.seen is None or len(stage.seen) != 1:
            raise _NotCapturable("its micro-batches are not all alike")
        if stage.probe is not None and stage.probe.ratio < _LAUNCH_BOUND:
            percent = 100 * stage.probe.ratio
            raise _NotCapturable(f"its launches take {percent:.0f} % of its time, so are no limit")
        like: _Like
        (like,) = stage.seen
        return like

    def _capture(
        self,
        key: tuple[int, int],
        stage: GraphedStage,
        like: _Like,
        computations: Sequence[Instruction],
        settings: Settings,
    ) -> Slots:
        for parameter in stage.module.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self._grads.append((parameter, parameter.grad))
        places, kinds = _slots_of(computations, key)
        return Slots(places, [_captured(stage, like, of, settings) for of in kinds])


class _Probe:
    """Times a forward on the host and on the GPU, from an empty queue on."""

    def __init__(self) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._host_s = 0.0

    def __enter__(self) -> None:
        self._events[0].record()
        self._host_s = -time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._host_s += time.perf_counter()
        self._events[1].record()

    @property
    def ratio(self) -> float:
        """The host's part of the GPU's time."""
        gpu_ms: float = self._events[0].elapsed_time(self._events[1])
        return 1e3 * self._host_s / max(gpu_ms, 1e-3)


def _slots_of(
    computations: Iterable[Instruction], key: tuple[int, int]
) -> tuple[dict[int, int], list[set[Kind]]]:
    """Which slot each micro-batch of a stage uses, and which graphs each slot needs."""
    places: dict[int, int] = {}
    kinds: list[set[Kind]] = []
    free: list[int] = []
    for kind, stage, m, copy in computations:
        if (stage, copy) != key:
            continue
        plain = _OF_GRAPH.get(kind, kind)
        if plain == Kind.F:
            if not free:
                free.append(len(kinds))
                kinds.append(set())
            places[m] = free.pop()
        kinds[places[m]].add(plain)
        if kind in _ENDS:
            free.append(places[m])
    return places, kinds


def _captured(stage: GraphedStage, like: _Like, kinds: set[Kind], settings: Settings) -> Slot:
    """A slot with its graphs: F first, and from its autograd graph the others."""
    slot = Slot(like)
    pool = torch.cuda.graph_pool_handle()

    boundary = None if stage.is_last else stage.flights[0].boundary_out

    def forward() -> None:
        slot.outputs = as_outputs(stage.module(*slot.inputs, **slot.kwargs))
        if stage.is_last:
            if settings.criterion is not None:
                slot.loss = settings.criterion(*slot.outputs, *slot.labels)
            return
        # As the gradients come back: one for each place of the boundary, or of what goes on here.
        found = (
            [o for o in slot.outputs if o is not None and o.requires_grad]
            if boundary is None
            else [slot.outputs[at] for at in boundary.grad_places]
        )
        slot.sources = [o if o is not None and o.requires_grad else None for o in found]

    def roots_and_grads() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        if not stage.is_last:
            pairs = list(zip(slot.sources, slot.output_grads, strict=True))
            return [o for o, _ in pairs if o is not None], [g for _, g in pairs if g is not None]
        losses = [] if slot.loss is None or not slot.loss.requires_grad else [slot.loss]
        return losses, [stage.loss_grad(loss) for loss in losses]

    def backward() -> None:
        grads = stage.gradient.whole(*roots_and_grads(), slot.leaves, retain_graph=True)
        slot.input_grads[Kind.B] = grads

    def backward_input() -> None:
        slot.input_grads[Kind.I], slot.weight_part = stage.gradient.input_part(
            *roots_and_grads(), slot.leaves, retain_graph=True
        )

    def backward_weight() -> None:
        assert slot.weight_part is not None
        slot.weight_part.run()

    slot.graphs[Kind.F] = _graph_of(forward, pool)
    slot.output_grads = [None if o is None else torch.zeros_like(o) for o in slot.sources]
    if Kind.B in kinds:
        slot.graphs[Kind.B] = _graph_of(backward, pool)
    if Kind.I in kinds:
        slot.graphs[Kind.I] = _graph_of(backward_input, pool)
        slot.graphs[Kind.W] = _graph_of(backward_weight, pool)
    return slot


def _graph_of(work: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """The work as a graph; it is not run."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (autograd's own, NCCL's watchdog) go on as they do.
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        work()
    except BaseException:
        # The capture is broken off, which raises as well; the first fault is the one to tell.
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        raise
    with warnings.catch_warnings():
        # A weight part that is left empty is a graph without nodes.
        warnings.simplefilter("ignore", UserWarning)
        graph.capture_end()
    return graph


class _Like(NamedTuple):
    """What a micro-batch on a stage is like."""

    inputs: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    labels: tuple[Any, ...]


class _TensorLike(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


def _kind_of(inputs: Sequence[Any], flight: Flight) -> _Like:
    return _Like(
        tuple(map(_like, inputs)),
        tuple((name, _like(given)) for name, given in flight.kwargs.items()),
        tuple(map(_like, flight.labels)),
    )


def _like(given: Any) -> Any:
    if isinstance(given, torch.Tensor):
        return _TensorLike(given.shape, given.dtype, given.device, given.requires_grad)
    try:
        hash(given)
    except TypeError:
        # Of what cannot be compared, no two are alike.
        return object()
    return given


def _sample(like: Any) -> Any:
    if isinstance(like, _TensorLike):
        return torch.empty(like.shape, dtype=like.dtype, device=like.device).requires_grad_(
            like.requires_grad
        )
    return like


def _tensor_pairs(
    own: Sequence[Any], given: Sequence[Any]
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    return ((o, g) for o, g in zip(own, given, strict=True) if isinstance(o, torch.Tensor))


def _state(stage: GraphedStage) -> Any:
    """Everything that a capture depends on, cheap enough to ask for at every step."""
    found: list[Any] = []
    for module in stage.modules:
        found.append(module.training)
        found += map(id, module._modules.values())
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    found += (tensor.data_ptr(), tensor.requires_grad)
    settings = stage.settings
    given = [(f.kwargs, f.labels) for f in stage.flights if f.kwargs or f.labels]
    return (
        found,
        settings.criterion if stage.is_last else None,
        settings.loss_scale,
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        _hooks(stage),
        {
            (tuple(map(_like, kwargs.values())), tuple(map(_like, labels)))
            for kwargs, labels in given
        },
    )


_MODULE_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _hooks(stage: GraphedStage) -> str:
    """What the user has hung on a stage, in words; empty if nothing."""
    found = set()
    for module in stage.modules:
        if any(getattr(module, name) for name in _MODULE_HOOKS):
            found.add("module hooks")
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if parameter._post_accumulate_grad_hooks:
                found.add("post-accumulate hooks")
            if parameter._backward_hooks:
                found.add("tensor hooks")
    return " and ".join(sorted(found))
