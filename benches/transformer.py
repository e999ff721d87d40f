"""The transformer that the executor's benchmark trains: RMSNorm, causal attention, gated SiLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Case", "Layer", "loss_of", "make_batch", "make_layers"]


@dataclass(frozen=True)
class Case:
    """What is trained, and by how much at a time."""

    sequence: int
    num_micro_batches: int
    layers: int = 8
    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"sequence {self.sequence}, {self.num_micro_batches} micro-batches"


class Layer(nn.Module):
    """One block. `linear` makes its projections, none of which has a bias."""

    def __init__(self, case: Case, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.heads = case.heads
        self.norm0 = nn.RMSNorm(case.hidden)
        self.norm1 = nn.RMSNorm(case.hidden)
        for name, width, height in (
            ("query", case.hidden, case.hidden),
            ("key", case.hidden, case.hidden),
            ("value", case.hidden, case.hidden),
            ("out", case.hidden, case.hidden),
            ("gate", case.hidden, case.ffn),
            ("up", case.hidden, case.ffn),
            ("down", case.ffn, case.hidden),
        ):
            setattr(self, name, linear(width, height, bias=False))

    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        normed = self.norm0(x_BTH)
        heads = (
            project(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x_BTH = x_BTH + self.out(mixed.transpose(1, 2).flatten(2))
        normed = self.norm1(x_BTH)
        return x_BTH + self.down(F.silu(self.gate(normed)) * self.up(normed))


def make_layers(
    case: Case,
    numbers: Sequence[int],
    device: torch.device,
    linear: type[nn.Linear] = nn.Linear,
) -> nn.Sequential:
    """Layers by their numbers, with the same weights wherever they are made."""
    layers = []
    for number in numbers:
        torch.manual_seed(1000 + number)
        with torch.device(device):
            layers.append(Layer(case, linear).to(case.dtype))
    return nn.Sequential(*layers)


def make_batch(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """All micro-batches' inputs and targets, `[M, T, H]`; never zeros, which are faster."""
    shape = (case.num_micro_batches, case.sequence, case.hidden)
    source = torch.Generator(device).manual_seed(7)
    made = (torch.randn(shape, generator=source, device=device) for _ in range(2))
    inputs, targets = (values.to(case.dtype) for values in made)
    return inputs, targets


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error in float32."""
    return F.mse_loss(output.float(), target.float())
