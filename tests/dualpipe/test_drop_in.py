"""DualPipe and DualPipeV in the place of the published ones."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import world
from dualpipe import (
    DualPipe,
    DualPipeV,
    PipelineError,
    ScheduleError,
    WeightGradStore,
    set_p2p_tensor_dtype,
    set_p2p_tensor_shapes,
)
from dualpipe.utils import run_backward
from pipelines import published_difference
from torch import nn

PUBLISHED = (20, 3, 256, 512)
"""Micro-batches, their size, sequence and hidden width of the published acceptance."""

SHORT = (20, 3, 64, 128)
"""The same at a sixty-fourth of the work."""

SMALL = (20, 3, 16, 32)


class _Kept(torch.autograd.Function):
    """A linear layer that leaves its weight's gradient to the store."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors

        def compute():
            found = grad.flatten(0, -2).T @ x.flatten(0, -2)
            weight.grad = found if weight.grad is None else weight.grad + found

        if WeightGradStore.enabled:
            WeightGradStore.put(compute)
        else:
            compute()
        return grad @ weight, None


class Block(nn.Module):
    """A perceptron whose weights' gradients go through the store."""

    calls = 0

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4 * hidden, hidden) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(hidden, 4 * hidden) / (4 * hidden) ** 0.5)

    def forward(self, x):
        return _Kept.apply(nn.functional.gelu(_Kept.apply(x, self.up)), self.down)


class Overlapped(Block):
    """With the published hook."""

    @classmethod
    def overlapped_forward_backward(
        cls, module0, inputs0, criterion0, labels0, module1, loss1, outputs1, output_grads1
    ):
        assert isinstance(module0, cls)
        assert isinstance(module1, cls)
        cls.calls += 1
        outputs0 = [module0(*inputs0)]
        loss0 = None if criterion0 is None else criterion0(*outputs0, *labels0)
        if loss1 is not None:
            assert not outputs1
            assert not output_grads1
            loss1.backward()
            loss1.detach_()
        else:
            run_backward(outputs1, output_grads1)
        return outputs0, loss0


class Interleaved(Block):
    """With the hook that has streams; W at different places inside the pair, or after it."""

    @classmethod
    def overlapped_forward_backward_streams(cls, pair):
        cls.calls += 1
        assert pair.communication is None
        assert pair.weight is None
        pair.backward_input()
        if cls.calls % 3 == 0:
            pair.backward_weight()
        outputs0, loss0 = pair.forward()
        if cls.calls % 3 == 1:
            pair.backward_weight()
        return outputs0, loss0


class Native(Block):
    """Plain layers, split natively."""

    def forward(self, x):
        return nn.functional.linear(nn.functional.gelu(nn.functional.linear(x, self.up)), self.down)


def criterion(output, target):
    return nn.functional.mse_loss(output, target).clone()


def reference(kind, num_stages: int, setting: tuple, rank: int):
    """Stages, input, labels, losses and outputs of a sequential run, made by rank 0 for all."""
    chunks, size, sequence, hidden = setting
    torch.manual_seed(233)
    stages = nn.Sequential(*(kind(hidden) for _ in range(num_stages)))
    x, y = (torch.randn(chunks * size, sequence, hidden) for _ in range(2))
    losses, outputs = torch.empty(chunks), torch.empty_like(x)
    if rank == 0:
        found = []
        for part_x, part_y in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
            out = stages(part_x)
            loss = criterion(out, part_y)
            loss.backward()
            found.append((loss.detach(), out.detach()))
        losses = torch.stack([loss for loss, _ in found])
        outputs = torch.cat([out for _, out in found])
    else:
        for parameter in stages.parameters():
            parameter.grad = torch.empty_like(parameter)
    for tensor in (losses, outputs, *(p.grad for p in stages.parameters())):
        dist.broadcast(tensor, 0)
    return stages, x, y, losses, outputs


def copy_of(stage):
    made = type(stage)(stage.up.shape[1])
    made.load_state_dict(stage.state_dict())
    return made


def both_halves(tensor, rank: int, last: int, *, own: bool):
    """A rank's half of what belongs to both directions: its own inputs' or the other's."""
    if rank not in {0, last}:
        return None
    return tensor.chunk(2)[(rank == last) == own]


def dualpipe(rank: int, size: int, kind, setting: tuple, *, given: bool, reduce: bool) -> float:
    """The published acceptance of DualPipe; returns the greatest difference of gradients."""
    chunks, micro_batch, sequence, hidden = setting
    last = size - 1
    stages, x, y, losses, outputs = reference(kind, size, setting, rank)
    local = nn.Sequential(stages[rank], stages[last - rank])
    model = DualPipe(nn.Sequential(*map(copy_of, local)), reduce_copies=reduce)
    set_p2p_tensor_shapes([(micro_batch, sequence, hidden)] if given else None)
    set_p2p_tensor_dtype(torch.float32 if given else None)
    arguments = {"num_chunks": chunks, "criterion": criterion}
    arguments["labels"] = (both_halves(y, rank, last, own=False),)
    inputs = both_halves(x, rank, last, own=True)
    loss, out = model.step(inputs, **arguments)
    expected = both_halves(losses, rank, last, own=False)
    assert loss is None if expected is None else torch.equal(loss, expected)
    assert out is None
    for ours, theirs in zip(
        model.module[0].parameters(), model.module[1].parameters(), strict=True
    ):
        if reduce:
            break
        every = torch.empty(2, size, *ours.shape)
        for mine, parts in zip((ours, theirs), every, strict=True):
            dist.all_gather(list(parts), mine.grad)
        ours.grad += every[1][last - rank]
        theirs.grad += every[0][last - rank]
    worst = compared(model, local)
    model.zero_grad()
    with torch.no_grad():
        loss, out = model.step(inputs, return_outputs=True, **arguments)
    for got, whole in ((loss, losses), (out, outputs)):
        wanted = both_halves(whole, rank, last, own=False)
        assert got is None if wanted is None else torch.equal(got, wanted)
    model.executor.close()
    return worst


def dualpipev(rank: int, size: int, kind, setting: tuple, *, given: bool) -> float:
    """Likewise of DualPipeV."""
    chunks, micro_batch, sequence, hidden = setting
    stages, x, y, losses, outputs = reference(kind, 2 * size, setting, rank)
    local = nn.Sequential(stages[rank], stages[2 * size - 1 - rank])
    model = DualPipeV(nn.Sequential(*map(copy_of, local)))
    set_p2p_tensor_shapes([(micro_batch, sequence, hidden)] if given else None)
    set_p2p_tensor_dtype(torch.float32 if given else None)
    first = rank == 0
    arguments = {"num_chunks": chunks, "criterion": criterion}
    arguments["labels"] = (y if first else None,)
    inputs = x if first else None
    loss, out = model.step(inputs, **arguments)
    assert torch.equal(loss, losses) if first else loss is None
    assert out is None
    worst = compared(model, local)
    model.zero_grad()
    with torch.no_grad():
        loss, out = model.step(inputs, return_outputs=True, **arguments)
    assert torch.equal(loss, losses) if first else loss is None
    assert torch.equal(out, outputs) if first else out is None
    model.executor.close()
    return worst


def compared(model, local) -> float:
    pairs = zip(model.module.parameters(), local.parameters(), strict=True)
    return max(published_difference(ours.grad, theirs.grad) for ours, theirs in pairs)


def published_acceptance(rank: int, size: int, setting: tuple) -> list[float]:
    """On any number of ranks; on four of them other forms too, if the setting is short."""
    found = [dualpipev(rank, size, Overlapped, setting, given=True)]
    if size % 2 == 0:
        found.append(dualpipe(rank, size, Overlapped, setting, given=True, reduce=False))
    return found + (variants(rank, size) if size == 4 and setting != PUBLISHED else [])


def variants(rank: int, size: int) -> list[float]:
    """Other hooks, none, shapes that are found out, copies that are reduced."""
    found = []
    for kind in (Block, Interleaved, Native):
        found.append(dualpipev(rank, size, kind, SMALL, given=False))
        found.append(dualpipe(rank, size, kind, SMALL, given=False, reduce=True))
        if kind is Interleaved:
            assert kind.calls > 10
    set_p2p_tensor_shapes(None)
    set_p2p_tensor_dtype(None)
    found += [two_in_turn(rank, size), mapped(rank, size)]
    refused(rank, size)
    return found


def two_in_turn(rank: int, size: int) -> float:
    """Two pipelines of one process, with shapes of their own, step in turn."""
    worst = 0.0
    made = []
    for setting in ((9, 2, 4, 8), (8, 1, 6, 12)):
        stages, x, y, losses, _ = reference(Overlapped, 2 * size, setting, rank)
        local = nn.Sequential(stages[rank], stages[2 * size - 1 - rank])
        made.append((DualPipeV([copy_of(s) for s in local]), setting, local, x, y, losses))
    for _ in range(2):
        for model, setting, local, x, y, losses in made:
            set_p2p_tensor_shapes([setting[1:]])
            set_p2p_tensor_dtype(torch.float32)
            model.zero_grad()
            loss, _ = model.step(
                x if rank == 0 else None, num_chunks=setting[0], criterion=criterion, labels=[y]
            )
            assert torch.equal(loss, losses) if rank == 0 else loss is None
            worst = max(worst, compared(model, local))
    for model, *_ in made:
        model.executor.close()
    set_p2p_tensor_shapes(None)
    set_p2p_tensor_dtype(None)
    return worst


def mapped(rank: int, size: int) -> float:
    """Pipeline ranks in another order than the group's, on a group that is not the default one."""
    group = dist.new_group(list(range(size)))
    mapping = [(r + 1) % size for r in range(size)]
    place = mapping[rank]
    stages, x, y, losses, outputs = reference(Native, size, SMALL, rank)
    local = nn.Sequential(stages[place], stages[size - 1 - place])
    model = DualPipe(
        [copy_of(s) for s in local],
        process_group=group,
        rank_mapping=mapping,
        reduce_copies=True,
    )
    assert model.is_first_rank == (place == 0)
    assert model.is_in_second_half == (place >= size // 2)
    assert model.is_middle_rank == (place in {size // 2 - 1, size // 2})
    loss, out = model.step(
        both_halves(x, place, size - 1, own=True),
        num_chunks=SMALL[0],
        criterion=criterion,
        labels=(both_halves(y, place, size - 1, own=False),),
        return_outputs=True,
    )
    for got, whole in ((loss, losses), (out, outputs)):
        wanted = both_halves(whole, place, size - 1, own=False)
        assert got is None if wanted is None else torch.equal(got, wanted)
    worst = compared(model, local)
    model.executor.close()
    dist.destroy_process_group(group)
    return worst


def refused(rank: int, size: int) -> None:
    """Bad arguments of one rank raise on all, and the next step runs."""
    model = DualPipeV([Native(8), Native(8)])
    x = torch.zeros(4, 2, 8) if rank == 0 else None
    arguments = {"criterion": criterion, "labels": [x]}
    with pytest.raises(ScheduleError if rank == 1 else PipelineError) as caught:
        model.step(x, num_chunks=4 if rank != 1 else 0, **arguments)
    assert caught.value.code == "num_micro_batches"
    set_p2p_tensor_shapes([(1, 2, 8)])
    with pytest.raises(PipelineError, match="neither"):
        model.step(x, num_chunks=4, **arguments)
    set_p2p_tensor_shapes(None)
    with pytest.raises(PipelineError, match="a loss function"):
        model.step(x, num_chunks=4)
    loss, _ = model.step(x, num_chunks=4, **arguments)
    assert (loss is not None) == (rank == 0)
    model.executor.close()


def check(found: dict[int, list]) -> None:
    for ranks in found.values():
        for values in ranks:
            assert max(values) < 1e-13


def test_published_acceptance_and_other_forms():
    check(world.run_each(published_acceptance, [1, 2, 4], SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[1, 2], [3, 4], [5, 6], [7, 8]], ids=str)
def test_published_acceptance_at_the_published_size(sizes):
    check(world.run_each(published_acceptance, sizes, PUBLISHED, limit_s=3000))
