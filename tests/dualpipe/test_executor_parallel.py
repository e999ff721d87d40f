"""Data parallelism beside the pipeline, and compiled stages."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import world
from dualpipe import PipelineError, PipelineExecutor, Schedule
from dualpipe.executor.backward import StageBackward
from pipelines import Part, perceptrons, published_difference, sequential, squared
from torch import nn

PRELOAD = ("torch.distributed.fsdp",)

WIDTH, MICRO_BATCHES = 8, 4


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of a row of ranks."""
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(2, 2 * MICRO_BATCHES, WIDTH, generator=generator)
    return x, y


def averages(num_stages: int) -> list[nn.Module]:
    """Stages with the mean of the gradients of both rows' batches."""
    stages = perceptrons(num_stages)
    for number in range(2):
        x, y = batch(number)
        parts = zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True)
        sequential(stages, [((x,), (y,), {}) for x, y in parts])
    for stage in stages:
        for parameter in stage.parameters():
            parameter.grad /= 2
    return stages


class Row:
    """Two ranks of four as a pipeline, beside the other two as another."""

    def __init__(self, method: str) -> None:
        self.schedule = Schedule.generate(method, 2, MICRO_BATCHES)
        self.number, self.rank = divmod(dist.get_rank(), 2)
        rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        self.group, self.column = rows[self.number], columns[self.rank]
        stages = perceptrons(self.schedule.num_stages)
        holders = self.schedule.placement[0].tolist()
        self.stages = {s: stages[s] for s, holder in enumerate(holders) if holder == self.rank}

    def executor(self) -> PipelineExecutor:
        return PipelineExecutor(self.stages, self.schedule, self.group)

    def step(self, executor: PipelineExecutor) -> None:
        x, y = batch(self.number)
        stages = executor.stages.values()
        executor.step(
            *(x for stage in stages if stage.is_first),
            labels=[y for stage in stages if stage.is_last],
            criterion=squared,
        )


def fully_sharded(rank: int, size: int) -> float:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    del rank, size
    worst = 0.0
    for method in ("1f1b", "zbv"):
        row = Row(method)
        mesh = DeviceMesh.from_group(row.column, "cpu")
        for stage in row.stages.values():
            fully_shard(stage[0], mesh=mesh)
            fully_shard(stage, mesh=mesh)
        expected = averages(row.schedule.num_stages)
        with row.executor() as executor:
            row.step(executor)
            left = [part.why_whole for part in (s.gradient for s in executor.stages.values())]
        assert all(left)
        for index, stage in row.stages.items():
            for ours, theirs in zip(stage.parameters(), expected[index].parameters(), strict=True):
                worst = max(worst, published_difference(ours.grad.full_tensor(), theirs.grad))
    return worst


def shared(rank: int, size: int) -> float:
    """Pipelines that have some ranks in common, which have made more groups than others."""
    del size
    schedule = Schedule.generate("zb_h1", 3, MICRO_BATCHES)
    x, y = batch(0)
    parts = zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True)
    rows = [((x,), (y,), {}) for x, y in parts]
    expected = perceptrons(3)
    losses, _ = sequential(expected, rows)
    groups = [dist.new_group(ranks) for ranks in ([0, 1, 2], [1, 2, 3])]
    parts = [
        Part(group.rank(), perceptrons(3), schedule, group=group)
        for group in groups
        if group is not dist.GroupMember.NON_GROUP_MEMBER
    ]
    worst = max(part.check(part.step(rows), losses, expected) for part in parts)
    for part in parts:
        part.executor.close()
    return worst


def in_turn(rank: int, size: int) -> float:
    return max(fully_sharded(rank, size), shared(rank, size))


def test_fully_sharded_stages_and_shared_ranks():
    assert max(world.run(in_turn, 4)) < 1e-13


def replicated(rank: int, size: int) -> float:
    del rank, size
    row = Row("zb_h1")
    ((index, module),) = row.stages.items()
    parallel = nn.parallel.DistributedDataParallel(module, process_group=row.column)
    row.stages = {index: parallel}
    expected = averages(2)[index]
    with row.executor() as executor:
        with pytest.raises(PipelineError, match="no_sync"):
            row.step(executor)
        with parallel.no_sync():
            row.step(executor)
    worst = 0.0
    for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
        dist.all_reduce(ours.grad, group=row.column)
        worst = max(worst, published_difference(ours.grad / 2, theirs.grad))
    return worst


@pytest.mark.slow  # 8 s of imports
def test_replicated_stages():
    assert max(world.run(replicated, 4)) < 1e-13


class Donor(torch.autograd.Function):
    """As a compiled function that computes in what it has saved: wants its graph freed."""

    class metadata:  # noqa: N801 - PyTorch's name
        bw_donated_idxs = (0,)

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        assert not torch._C._autograd._get_current_graph_task_keep_graph()
        return 2 * grad


def test_functions_that_overwrite_what_they_have_saved_are_not_split():
    linear, backward = nn.Linear(4, 4), StageBackward()
    x = torch.randn(2, 4, requires_grad=True)
    for number in range(1, 3):
        (grad,), rest = backward.input_part([Donor.apply(linear(x))], [torch.ones(2, 4)], [x])
        assert rest.empty
        assert torch.equal(grad, 2 * torch.ones(2, 4) @ linear.weight)
        assert torch.equal(linear.bias.grad, torch.full((4,), 4.0 * number))
    assert "donated_buffer" in rest.why


def compiled(rank: int, size: int) -> tuple[float, set[str | None]]:
    import warnings

    warnings.simplefilter("ignore")  # what the compiler says of itself
    schedule = Schedule.generate("zb_h1", size, MICRO_BATCHES)
    x, y = batch(0)
    parts = zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True)
    rows = [((x,), (y,), {}) for x, y in parts]
    stages, expected = perceptrons(size), perceptrons(size)
    part = Part(rank, [torch.compile(stage, backend="aot_eager") for stage in stages], schedule)
    for _ in range(2):
        losses, _ = sequential(expected, rows)
        worst = part.check(part.step(rows), losses, expected)
    (stage,) = part.executor.stages.values()
    part.executor.close()
    return worst, set(stage.not_left)


@pytest.mark.slow  # a minute of imports and compilation
def test_compiled_stages():
    for worst, not_left in world.run(compiled, 2):
        assert worst < 1e-13
        assert any("donated_buffer" in why for why in not_left)
