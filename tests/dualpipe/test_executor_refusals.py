"""Wrong use: every rank is told which argument is wrong, nothing hangs, and the next step runs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import world
from dualpipe import DualPipe, PipelineError, PipelineExecutor, Schedule, ScheduleError
from pipelines import squared
from torch import nn

WIDTH = 4


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, WIDTH)


def refusals(rank: int, size: int) -> list[str]:
    schedule = Schedule.generate("1f1b", size, 4)
    codes = []

    def refused(run: Any) -> None:
        try:
            run()
        except (PipelineError, ScheduleError) as error:
            codes.append(f"{error.argument}: {error.code}")
        else:
            codes.append("none")

    def made(stages: Any = None, given: Any = schedule, **options: Any) -> PipelineExecutor:
        stages = {rank: linear()} if stages is None else stages
        return PipelineExecutor(stages, given, **options)

    # Of an executor
    refused(lambda: made(given="1f1b"))
    refused(lambda: made(group=dist.GroupMember.NON_GROUP_MEMBER))
    refused(lambda: made(limit_s=0))
    refused(lambda: made(linear()))
    refused(lambda: made({rank: len}))
    refused(lambda: made({rank: nn.Sequential(linear(), linear().to("meta"))}))
    refused(lambda: made(graphs="always"))
    refused(lambda: made(limit_s="10"))
    refused(lambda: made(seed=1.5))
    refused(lambda: made(batch_dim="0"))
    refused(lambda: made(device="gpu"))
    refused(lambda: made(store=3))
    refused(lambda: made(ranks=1))
    # One rank alone
    refused(lambda: made(given=schedule if rank else "1f1b"))
    refused(lambda: made(limit_s=0 if rank else 5))

    # Of a step
    executor = made()
    x = torch.ones(8, WIDTH)
    inputs, labels = [x] if rank == 0 else [], [x] if rank == size - 1 else []

    def step(*inputs: Any, **options: Any) -> Any:
        return executor.step(*inputs, **{"labels": labels, "criterion": squared, **options})

    refused(step)
    refused(lambda: step(None))
    refused(lambda: step(*inputs, labels=x))
    refused(lambda: step(*inputs, labels=[part[:3] for part in labels]))
    refused(lambda: step(*inputs, kwargs={size: {}}))
    refused(lambda: step(*inputs, kwargs={0: 3}))
    refused(lambda: step(*inputs, kwargs=[3]))
    refused(lambda: step(*inputs, criterion="mse"))
    refused(lambda: step(*inputs, schedule=8))
    refused(lambda: step(*inputs, schedule=Schedule.generate("1f1b", size + 2, 4)))
    refused(lambda: step(*inputs))
    executor.close()
    refused(lambda: step(*inputs))

    # In the place of the published one
    refused(lambda: DualPipe([linear()]))
    refused(lambda: DualPipe([linear(), linear()], rank_mapping=[0, 0]))
    model = DualPipe([linear(), linear()])
    for chunks in (0, "4"):
        refused(lambda chunks=chunks: model.step(x, num_chunks=chunks, labels=[x]))
    refused(lambda: model.step(x, num_chunks=4, criterion=squared, labels=[x]))
    model.executor.close()
    return codes


def test_wrong_use_is_refused_by_name():
    for codes in world.run(refusals, 2):
        assert codes == [
            "schedule: schedule",
            "group: no_group",
            "limit_s: limit_s",
            "stages: stages",
            "stages: stages",
            "stages: device",
            "graphs: graphs",
            "limit_s: limit_s",
            "seed: seed",
            "batch_dim: batch_dim",
            "device: device",
            "store: store",
            "ranks: ranks",
            "schedule: schedule",
            "limit_s: limit_s",
            "inputs: inputs",
            "inputs: inputs",
            "labels: labels",
            "labels[0]: batch_size",
            "kwargs: kwargs",
            "kwargs: kwargs",
            "kwargs: kwargs",
            "criterion: criterion",
            "schedule: schedule",
            "schedule: placement",
            "none",
            "executor: closed",
            "modules: stages",
            "ranks: ranks",
            "num_micro_batches: num_micro_batches",
            "num_micro_batches: num_micro_batches",
            "none",
        ]


UNPROVED = {
    # Both wait for what the other would send later.
    "deadlock": ("0F0 <0b0 0B0 0f0> 0f0!", "<1f0 1F0 1B0 1b0> 1b0!"),
    "twice": ("0F0 0f0> <0b0 0B0 0B0 0f0!", "<1f0 1F0 1B0 1b0> 1b0!"),
    "pairing": ("0F0 0f0> <0b0 0B0 0f0!", "1F0 1B0 1b0> 1b0!"),
}


def unproved(rank: int, size: int) -> list[str]:
    """Schedules that were read without a proof are proved before they are run."""
    codes = []
    x = torch.ones(1, WIDTH)
    executor = PipelineExecutor({rank: linear()}, Schedule.generate("1f1b", size, 1))
    for lines in (*UNPROVED.values(), None):
        schedule = None
        if lines is not None:
            ranks = "\n".join(f"rank {rank}: {line}" for rank, line in enumerate(lines))
            head = "ranks 2, stages 2\ncopy 0: 1 micro-batches through ranks 0 1"
            schedule = Schedule.parse(f"schedule s\n{head}\n{ranks}\n", check=False)
        try:
            executor.step(
                *([x] if rank == 0 else []), labels=[x], criterion=squared, schedule=schedule
            )
        except ScheduleError as error:
            codes.append(error.code)
    executor.close()
    return codes


def test_schedules_without_a_proof_are_refused():
    for codes in world.run(unproved, 2):
        assert codes == list(UNPROVED)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def hooks(rank: int, size: int) -> dict[str, Any]:
    """Hooks of modules and parameters fire, and inference leaves nothing behind."""
    schedule = Schedule.generate("zb_h1", size, 4)
    torch.manual_seed(0)
    expected = nn.Sequential(*(Hooked() for _ in range(size)))
    torch.manual_seed(0)
    module = [Hooked() for _ in range(size)][rank]
    fired = {"forward": 0, "backward": 0, "accumulate": 0}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            fired[name] += 1

        return hook

    module.up.register_forward_hook(count("forward"))
    module.down.register_full_backward_hook(count("backward"))
    module.up.weight.register_post_accumulate_grad_hook(count("accumulate"))
    with PipelineExecutor({rank: module}, schedule, boundaries=None) as executor:
        torch.manual_seed(1)
        x, y = torch.randn(2, 10, WIDTH)
        given = [x] if rank == 0 else []
        options = {"labels": [y] if rank == size - 1 else [], "criterion": squared}
        with torch.inference_mode():
            first = executor.step(*given, **options, return_outputs=True)
        dry = fired["forward"] - 4
        result = executor.step(*given, **options)
        for part_x, part_y in zip(x.tensor_split(4), y.tensor_split(4), strict=True):
            squared(expected(part_x), part_y).backward()
        pairs = zip(module.parameters(), expected[rank].parameters(), strict=True)
        same = all(torch.equal(ours.grad, theirs.grad) for ours, theirs in pairs)
        if rank == size - 1:
            assert torch.equal(first.losses, result.losses)
            assert torch.equal(first.outputs, expected(x))
    return {"same": same, "dry": dry, **fired}


def test_hooks_fire():
    for found in world.run(hooks, 2):
        assert found["same"]
        assert found["backward"] == 4
        assert found["accumulate"] == 4
        assert found["forward"] >= 8
