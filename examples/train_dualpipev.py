"""Trains a small transformer on Python's documentation with DualPipeV, and beside it in one process.

    torchrun --nproc-per-node 2 examples/train_dualpipev.py [STEPS]

Up to four ranks, on GPUs with NCCL or on a CPU with gloo. The stages form a V: the first rank holds
the first and the last, gives all inputs and gets all losses. The program compares every loss with
the run in one process and fails if they differ.
"""

import torch
import torch.distributed as dist
from characters import (
    CONTEXT,
    MICRO_BATCH,
    WIDTH,
    Curve,
    draw,
    launch,
    loss_of,
    make_stages,
    optimizer_of,
    read_text,
)
from dualpipe import DualPipeV, set_p2p_tensor_dtype, set_p2p_tensor_shapes


def train(num_steps: int, device: torch.device) -> list[float]:
    """The mean loss of every step, on the first rank."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    first = rank == 0
    num_micro_batches = 4 * num_ranks
    text = read_text()

    # Rank r holds stages r and 2P - 1 - r.
    stages = make_stages(2 * num_ranks, device)
    modules = [stages[rank], stages[2 * num_ranks - 1 - rank]]
    model = DualPipeV(modules)
    optimizer = optimizer_of(modules)
    set_p2p_tensor_shapes([(MICRO_BATCH, CONTEXT, WIDTH)])
    set_p2p_tensor_dtype(torch.float32)

    curve = Curve(2 * num_ranks, 1, device) if first else None
    for step in range(num_steps):
        batch = draw(text, step, num_micro_batches * MICRO_BATCH, device)
        losses, _ = model.step(
            batch[:, :-1] if first else None,
            num_chunks=num_micro_batches,
            criterion=loss_of,
            labels=[batch[:, 1:] if first else None],
        )
        optimizer.step()
        optimizer.zero_grad()
        if curve is not None and losses is not None:
            curve.add(losses, batch)
    model.executor.close()
    return curve.end(text) if curve is not None else []


if __name__ == "__main__":
    launch(train)
