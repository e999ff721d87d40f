"""Checkpoints by layer: another cut, another number of ranks, ranks that die while they save."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from dualpipe import PipelineError
from dualpipe.executor.checkpoint import layers_of, load_checkpoint, save_checkpoint
from pipelines import Momentum
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

NUM_LAYERS = 6


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


class Rank:
    """The layers of some stages, and their optimizer."""

    def __init__(self, stages: list[int], bounds: list[int]) -> None:
        sizes = [end - start for start, end in pairwise(bounds)]
        modules = {
            stage: nn.Sequential(*(layer() for _ in range(sizes[stage]))) for stage in stages
        }
        self.layers = layers_of(modules, bounds)
        self.optimizer = Momentum(p for m in modules.values() for p in m.parameters())

    def train(self, seed: int) -> None:
        torch.manual_seed(seed)
        x = torch.randn(8, 4)
        for number in sorted(self.layers):
            self.layers[number](x * (number + 1)).square().mean().backward()
        self.optimizer.step()

    def save(self, folder: Path, step: int, **options: Any) -> None:
        save_checkpoint(folder, step, self.layers, NUM_LAYERS, optimizer=self.optimizer, **options)

    def load(self, folder: Path) -> int:
        return load_checkpoint(folder, self.layers, NUM_LAYERS, optimizer=self.optimizer)

    def state(self, number: int) -> list[Any]:
        module = self.layers[number]
        kept = [self.optimizer.state[p]["momentum"] for p in module.parameters()]
        return [value.clone() for value in [*module.state_dict().values(), *kept]]


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_another_cut_and_number_of_ranks(tmp_path: Path) -> None:
    two = [Rank([0, 3], [0, 1, 3, 5, 6]), Rank([1, 2], [0, 1, 3, 5, 6])]
    for number, rank in enumerate(two):
        rank.train(number)
        rank.save(tmp_path, 7)
    three = [Rank([stage], [0, 2, 4, 6]) for stage in range(3)]
    for rank in three:
        assert rank.load(tmp_path) == 7
        for number in rank.layers:
            source = next(other for other in two if number in other.layers)
            assert same(rank.state(number), source.state(number))
    # What was loaded is no view of the files: they can be written again.
    alone, again = Rank([0], [0, 6]), Rank([0], [0, 6])
    alone.load(tmp_path)
    before = [alone.state(number) for number in range(NUM_LAYERS)]
    again.train(4)
    again.save(tmp_path, 7)
    assert all(same(alone.state(number), before[number]) for number in range(NUM_LAYERS))


def test_a_step_that_is_not_complete_does_not_count(tmp_path: Path) -> None:
    two = [Rank([0], [0, 3, 6]), Rank([1], [0, 3, 6])]
    with pytest.raises(PipelineError, match="all 6 layers") as error:
        two[0].load(tmp_path / "nowhere")
    assert error.value.code == "no_checkpoint"
    for rank in two:
        rank.train(1)
        rank.save(tmp_path, 1)
    two[0].train(2)
    two[0].save(tmp_path, 2)
    (tmp_path / "step-00000002" / "layer-00003.pt.1234").write_bytes(b"half")
    (tmp_path / "step-other").mkdir()
    before = [two[1].state(number) for number in (3, 4, 5)]
    two[1].train(2)
    assert not same(two[1].state(3), before[0])
    assert two[1].load(tmp_path) == 1
    assert all(same(two[1].state(3 + at), state) for at, state in enumerate(before))
    assert two[0].load(tmp_path) == 1


def test_old_steps_are_removed_when_enough_newer_ones_are_complete(tmp_path: Path) -> None:
    two = [Rank([0], [0, 3, 6]), Rank([1], [0, 3, 6])]
    for step in range(5):
        for rank in two:
            rank.save(tmp_path, step, keep=2)
    two[0].save(tmp_path, 5, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000003",
        "step-00000004",
        "step-00000005",
    ]
    assert two[0].load(tmp_path) == 4


def test_what_does_not_fit_loads_nothing(tmp_path: Path) -> None:
    rank = Rank([0], [0, 6])
    rank.save(tmp_path, 0)
    other = Rank([0], [0, 6])
    other.layers[5] = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(4))
    before = [value.clone() for value in other.layers[0].state_dict().values()]
    with pytest.raises(PipelineError, match=r"layer 5 with '0.bias' of shape torch.Size\(\[5\]\)"):
        load_checkpoint(tmp_path, other.layers, NUM_LAYERS)
    assert same(before, list(other.layers[0].state_dict().values()))


def test_stages_must_have_the_layers_of_the_cut() -> None:
    with pytest.raises(PipelineError, match="stage 1 with 2 children") as error:
        layers_of({(1, 0): nn.Sequential(layer(), layer())}, [0, 3, 6])
    assert error.value.code == "layers"


def test_wrong_use_is_refused_by_name(tmp_path: Path) -> None:
    rank = Rank([0], [0, NUM_LAYERS])
    uses = {
        "step": lambda: rank.save(tmp_path, -1),
        "keep": lambda: rank.save(tmp_path, 1, keep=0),
        "bounds": lambda: layers_of({3: nn.Sequential(layer())}, [0, 1, 2]),
        "layers": lambda: save_checkpoint(tmp_path, 1, {9: layer()}, NUM_LAYERS),
    }
    for argument, use in uses.items():
        with pytest.raises(PipelineError) as caught:
            use()
        assert caught.value.argument == argument
    assert not any(tmp_path.iterdir())
