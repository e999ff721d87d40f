"""Trains a small transformer on Python's documentation with DualPipe, and beside it in one process.

    torchrun --nproc-per-node 4 examples/train_dualpipe.py [STEPS]

An even number of ranks, on GPUs with NCCL or on a CPU with gloo. Micro-batches enter at both ends:
the first rank gives the inputs of one half of a batch and gets the losses of the other, the last
rank the other way round. The program compares every loss with the run in one process and fails if
they differ.
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
from dualpipe import DualPipe, set_p2p_tensor_dtype, set_p2p_tensor_shapes


def train(num_steps: int, device: torch.device) -> list[float]:
    """The mean loss of every step, on the first rank."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    first, last = rank == 0, rank == num_ranks - 1
    num_micro_batches = 2 * num_ranks
    text = read_text()

    # Rank r holds stage r for one direction and stage P - 1 - r for the other.
    stages = make_stages(num_ranks, device)
    modules = [stages[rank], stages[num_ranks - 1 - rank]]
    model = DualPipe(modules, reduce_copies=True)
    optimizer = optimizer_of(modules)
    set_p2p_tensor_shapes([(MICRO_BATCH, CONTEXT, WIDTH)])
    set_p2p_tensor_dtype(torch.float32)

    curve = Curve(num_ranks, 2, device) if first else None
    for step in range(num_steps):
        batch = draw(text, step, num_micro_batches * MICRO_BATCH, device)
        half, other = batch.chunk(2)
        mine, theirs = (half, other) if first else (other, half)
        losses, _ = model.step(
            mine[:, :-1] if first or last else None,
            num_chunks=num_micro_batches,
            criterion=loss_of,
            labels=[theirs[:, 1:] if first or last else None],
        )
        optimizer.step()
        optimizer.zero_grad()

        # The first rank has the losses of the second half, the last rank those of the first.
        known = torch.zeros(2, num_micro_batches // 2, device=device)
        if losses is not None:
            known[int(first)] = losses
        dist.all_reduce(known)
        if curve is not None:
            curve.add(known, batch)
    model.executor.close()
    return curve.end(text) if curve is not None else []


if __name__ == "__main__":
    launch(train)
