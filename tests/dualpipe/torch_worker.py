"""One rank of a run in PyTorch: every CSV of a folder, compared with a sequential run.

Usage: torch_worker.py RANK WORLD STORE FOLDER; the files are METHOD-STAGES-MICROBATCHES-FORM.csv.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

WIDTH, ROWS = 8, 2


def model(num_stages: int) -> list[nn.Module]:
    torch.manual_seed(num_stages)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(num_stages)]


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - target) ** 2).mean()


def sequential(stages: list[nn.Module], x: torch.Tensor, y: torch.Tensor, m: int) -> list[float]:
    losses = []
    whole = nn.Sequential(*stages)
    for inputs, target in zip(x.chunk(m), y.chunk(m), strict=True):
        loss = loss_of(whole(inputs), target)
        loss.backward()
        losses.append(loss.item())
    return losses


def stages_of(path: Path, rank: int) -> list[int]:
    """The stages of the rank's row."""
    row = path.read_text().splitlines()[rank].split(",")
    actions = [_Action.from_str(cell) for cell in row]
    leaves = [leaf for action in actions for leaf in (action.sub_actions or [action])]
    return sorted({leaf.stage_index for leaf in leaves})


def run(path: Path, rank: int) -> None:
    _, stages, count, form = path.stem.split("-")
    num_stages, m = int(stages), int(count)
    torch.manual_seed(1)
    x, y = torch.randn(m * ROWS, WIDTH), torch.randn(m * ROWS, WIDTH)
    expected = model(num_stages)
    expected_losses = sequential(expected, x, y, m)

    modules = model(num_stages)
    held = stages_of(path, rank)
    device = torch.device("cpu")
    pipeline_stages = [PipelineStage(modules[s], s, num_stages, device) for s in held]
    runtime = _PipelineScheduleRuntime(
        pipeline_stages, n_microbatches=m, loss_fn=loss_of, scale_grads=False
    )
    runtime._load_csv(str(path), format=form)
    losses: list[torch.Tensor] = []
    inputs = (x,) if 0 in held else ()
    if num_stages - 1 in held:
        runtime.step(*inputs, target=y, losses=losses)
        got = [loss.item() for loss in losses]
        assert got == expected_losses, f"{path.name}: losses {got}, not {expected_losses}"
    else:
        runtime.step(*inputs)
    for s in held:
        pairs = zip(modules[s].parameters(), expected[s].parameters(), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=f"{path.name}: stage {s}")


def main() -> None:
    rank, world, store, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for path in sorted(Path(folder).glob("*.csv")):
        run(path, rank)
        dist.barrier()
        if rank == 0:
            sys.stdout.write(f"{path.stem}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
