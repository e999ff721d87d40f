"""What the training examples share: a small transformer over characters, cut into stages, its
text, and a run in one process to compare with.

The text is Python's own documentation, as it comes with every Python (`pydoc_data`).

Letters: B sequences, T characters of a sequence, D width, V characters that there are.
"""

import itertools
import os
import sys
from collections.abc import Callable
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

VOCABULARY = 128
CONTEXT = 64
WIDTH = 64
HEADS = 4
LAYERS = 8
MICRO_BATCH = 4


class Block(nn.Module):
    """Attention to what came before, then a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x_BTD.shape
        qkv = self.qkv(self.norm_attention(x_BTD)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(attended.transpose(1, 2).flatten(2))
        return x_BTD + self.down(gelu(self.up(self.norm(x_BTD))))


class Embedding(nn.Module):
    """Characters and their places as vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.character = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(CONTEXT, WIDTH)

    def forward(self, text_BT: torch.Tensor) -> torch.Tensor:
        places = torch.arange(text_BT.shape[1], device=text_BT.device)
        return self.character(text_BT) + self.place(places)


class Head(nn.Module):
    """Scores of the next character."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.scores = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.scores(self.norm(x_BTD))


def make_stages(num_stages: int, device: torch.device) -> list[nn.Sequential]:
    """The whole model, the same in every process, cut into stages as even as can be."""
    if num_stages > LAYERS:
        raise SystemExit(f"{num_stages} stages, but the model has {LAYERS} layers: use fewer ranks")
    torch.manual_seed(1)
    blocks = [Block() for _ in range(LAYERS)]
    # Where each stage begins; the first stages are the longer ones.
    starts = [-(-LAYERS * stage // num_stages) for stage in range(num_stages + 1)]
    parts: list[list[nn.Module]] = [list(blocks[a:b]) for a, b in itertools.pairwise(starts)]
    parts[0].insert(0, Embedding())
    parts[-1].append(Head())
    return [nn.Sequential(*part).to(device) for part in parts]


def optimizer_of(modules: list[nn.Module]) -> torch.optim.Optimizer:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.AdamW(parameters, lr=3e-3)


def loss_of(scores_BTV: torch.Tensor, next_BT: torch.Tensor) -> torch.Tensor:
    return cross_entropy(scores_BTV.flatten(0, 1), next_BT.flatten())


def read_text() -> torch.Tensor:
    """The characters of Python's documentation; about 700,000, in a fixed order."""
    text = "".join(topics[name] for name in sorted(topics))
    return torch.tensor([min(ord(character), VOCABULARY - 1) for character in text])


def draw(text: torch.Tensor, step: int, count: int, device: torch.device) -> torch.Tensor:
    """The sequences of a step, `[count, T + 1]`, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - CONTEXT, (count, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)].to(device)


def entropy_of(text: torch.Tensor) -> float:
    """What guessing by how frequent characters are costs; context must do better."""
    frequencies = torch.bincount(text).float() / len(text)
    return float(-(frequencies * frequencies.clamp_min(1e-9).log()).sum())


class OneProcess:
    """The same training in one process.

    Args:
        directions: How many copies of the model share the micro-batches: their gradients are
            summed one by one, and then over the copies, which makes every bit the same.
    """

    def __init__(self, num_stages: int, directions: int, device: torch.device) -> None:
        self.model = nn.Sequential(*make_stages(num_stages, device))
        self.optimizer = optimizer_of([self.model])
        self.directions = directions

    def step(self, batch: torch.Tensor, num_micro_batches: int) -> torch.Tensor:
        """The losses of the micro-batches, `[num_micro_batches]`."""
        losses = []
        sums: dict[nn.Parameter, torch.Tensor] = {}
        micro_batches = batch.chunk(num_micro_batches)
        share = num_micro_batches // self.directions
        for direction in range(self.directions):
            self.optimizer.zero_grad()
            for part in micro_batches[direction * share : (direction + 1) * share]:
                loss = loss_of(self.model(part[:, :-1]), part[:, 1:])
                loss.backward()
                losses.append(loss.detach())
            for parameter in self.model.parameters():
                grad = parameter.grad
                assert grad is not None
                sums[parameter] = sums[parameter] + grad if direction else grad
        for parameter, total in sums.items():
            parameter.grad = total
        self.optimizer.step()
        return torch.stack(losses)


class Curve:
    """The losses of a pipeline, each of them compared with a run in one process.

    Args:
        num_stages: How many stages the pipeline has.
        directions: As for :class:`OneProcess`.
    """

    def __init__(self, num_stages: int, directions: int, device: torch.device) -> None:
        self.alone = OneProcess(num_stages, directions, device)
        self.means: list[float] = []

    def add(self, losses: torch.Tensor, batch: torch.Tensor) -> None:
        """Ends the program if they differ: on a CPU in any bit, on a GPU visibly."""
        ours, theirs = losses.flatten(), self.alone.step(batch, losses.numel())
        same = torch.equal(ours, theirs) if ours.is_cpu else torch.allclose(ours, theirs, rtol=1e-2)
        step = len(self.means)
        if not same:
            raise SystemExit(f"step {step}: {ours.tolist()}, but one process has {theirs.tolist()}")
        self.means.append(ours.mean().item())
        if step % 10 == 0:
            print(f"step {step:4d}   loss {self.means[-1]:.4f}", flush=True)

    def end(self, text: torch.Tensor) -> list[float]:
        """The mean loss of every step; says how the last compares with no context."""
        print(f"in the end, as in one process:   loss {self.means[-1]:.4f}")
        print(f"by the frequency of characters alone: {entropy_of(text):.4f}")
        return self.means


def launch(train: Callable[[int, torch.device], object]) -> None:
    """Runs ``train(steps, device)`` in the world that torchrun has made."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    train(int(sys.argv[1]) if len(sys.argv) > 1 else 100, device)
    dist.destroy_process_group()
