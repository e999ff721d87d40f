"""What is decided about CUDA graphs, with graphs that run their work again instead of replaying.

Everything but the capture itself: slots and who uses them when, what is copied in, what stays in
place, when a capture is made, kept and dropped. tests/dualpipe/test_executor_gpu.py captures.
"""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
import world
from dualpipe import METHODS, Schedule
from dualpipe.executor.graphs import capture, graphs, likeness, slots
from dualpipe.instruction import Kind
from pipelines import Part, perceptrons, sequential

CAPTURED = capture.captured


class Again:
    """A graph that runs what was captured again, on the same inputs."""

    def __init__(self, work, _) -> None:
        self.replay = work
        work()


class NoCuda:
    """What is asked of torch.cuda around a capture."""

    graph_pool_handle = memory_reserved = staticmethod(lambda *_: 0)
    synchronize = empty_cache = Stream = staticmethod(lambda *_: None)
    stream = staticmethod(lambda _: contextlib.nullcontext())
    CUDAGraph = Again


def captured_without_a_trace(captured, stage, *rest):
    """A capture computes nothing, so the gradients are as they were."""
    kept = [parameter.grad.clone() for parameter in stage.module.parameters()]
    slot = captured(stage, *rest)
    for parameter, grad in zip(stage.module.parameters(), kept, strict=True):
        parameter.grad.copy_(grad)
    return slot


def rows_of(count: int, seed: int = 0) -> list:
    source = torch.Generator().manual_seed(seed)
    return [
        ((torch.randn((2, 8), generator=source),), (torch.randn((2, 8), generator=source),), {})
        for _ in range(count)
    ]


def faked(part: Part, *, auto: bool = False) -> graphs.Graphs:
    """The executor's graphs, which take the CPU for a GPU."""
    made = graphs.Graphs(part.executor.stages, torch.device("cuda"), "auto" if auto else True)
    part.executor.graphs = part.executor._runner._graphs = made
    no_cuda = type("torch", (), {"__getattr__": lambda _, name: getattr(torch, name)})()
    no_cuda.cuda = NoCuda
    graphs.torch = capture.torch = no_cuda
    capture._graph_of = Again
    graphs.captured = partial(captured_without_a_trace, CAPTURED)
    return made


def every_schedule(rank: int, size: int) -> dict[str, tuple[float, bool]]:
    """Four steps: the first without graphs; then with; gradients set to None and to zero."""
    found = {}
    for method in METHODS:
        schedule = Schedule.generate(method, size, 3 * size)
        expected, own = perceptrons(schedule.num_stages), perceptrons(schedule.num_stages)
        part = Part(rank, own, schedule, reduce_copies=False)
        made = faked(part)
        worst = 0.0
        for step in range(4):
            rows = rows_of(schedule.num_micro_batches, step)
            for module in own + expected:
                module.zero_grad(set_to_none=step % 2 == 1)
            losses, outputs = sequential(expected, rows)
            result = part.step(rows, return_outputs=True)
            difference = part.check(result, losses, expected)
            if schedule.num_copies == 1:
                worst = max(worst, difference)
            ours = part.rows_of(schedule.num_stages - 1, outputs)
            if ours:
                assert torch.equal(result.outputs, torch.cat([output for (output,) in ours]))
            captured = all(stage.slots is not None for stage in part.executor.stages.values())
            assert captured == (step > 0)
            with torch.no_grad():
                part.check(part.step(rows), losses, expected)
        assert not made.why
        found[method] = worst, captured
        part.executor.close()
    return found


def changes(rank: int, size: int) -> list[bool]:
    """What makes a capture worthless, and what forbids one."""
    schedule = Schedule.generate("1f1b", size, 4)
    expected, own = perceptrons(size), perceptrons(size)
    part = Part(rank, own, schedule)
    made = faked(part)
    (stage,) = part.executor.stages.values()
    seen = []

    def step(count_rows: list, note: str) -> None:
        for module in own + expected:
            module.zero_grad()
        losses, _ = sequential(expected, count_rows)
        part.check(part.step(count_rows), losses, expected)
        seen.append((note, stage.slots is not None))

    rows = rows_of(4)
    step(rows, "warm-up")
    step(rows, "captured")
    longer = [((torch.cat([x, x]),), (torch.cat([y, y]),), {}) for (x,), (y,), _ in rows]
    step(longer, "other shapes")
    step(longer, "captured")
    for module in own + expected:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.data = parameter.data + 0.5
    step(longer, "other memory")
    step(longer, "captured")
    for module in own + expected:
        module.eval()
    step(longer, "another mode")
    step(longer, "captured")
    handle = own[rank].register_forward_hook(lambda *_: None)
    step(longer, "a hook")
    step(longer, "a hook still")
    assert "module hooks" in made.why[rank, 0], made.why
    handle.remove()
    step(longer, "no hook")
    step(longer, "captured")
    uneven = [*rows[:3], longer[3]]
    step(uneven, "uneven")
    step(uneven, "uneven still")
    assert "not all alike" in made.why[rank, 0]
    part.executor.close()
    return seen


def test_every_schedule_equals_a_sequential_run() -> None:
    for found in world.run(every_schedule, 2):
        assert set(found) == set(METHODS)
        assert all(worst < 1e-13 and captured for worst, captured in found.values())


def test_a_capture_lasts_as_long_as_what_it_depends_on() -> None:
    for seen in world.run(changes, 2):
        assert [note for note, captured in seen if captured] == ["captured"] * 5
        assert all(captured == (note == "captured") for note, captured in seen)


@pytest.mark.parametrize("method", METHODS)
def test_slots_are_as_many_as_micro_batches_in_flight(method: str) -> None:
    schedule = Schedule.generate(method, 4, 12)
    peaks = schedule.verify().peaks.activations
    for rank in range(4):
        held = 0
        stream = [i for i in schedule.instructions(rank) if i.kind.computes]
        for key in {(i.stage, i.copy) for i in stream}:
            places, kinds = slots.share_slots(stream, key)
            assert sorted(places) == list(range(schedule.micro_batches[key[1]]))
            assert all(Kind.F in of for of in kinds)
            held += len(kinds)
        # A stage's own peak may lie elsewhere than the rank's.
        assert peaks[rank] <= held <= 2 * peaks[rank]


def test_tensors_that_graphs_need_are_not_shared_by_slots() -> None:
    like = likeness.Like((likeness._like(torch.ones(3)),), (), (7,))
    one, other = slots.Slot(like), slots.Slot(like)
    assert one.inputs[0].data_ptr() != other.inputs[0].data_ptr()
    assert one.labels == [7]
