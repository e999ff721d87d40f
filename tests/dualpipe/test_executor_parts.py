"""The executor's parts, each on its own."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys

import dualpipe
import pytest
import torch
from dualpipe import METHODS, Instruction, Kind, PipelineError, Schedule
from dualpipe.executor import MicroBatches, TensorSpec, seed_of
from dualpipe.executor.boundary import Boundary, as_outputs, dry_forward, given_boundaries
from dualpipe.executor.microbatches import merge, signature, split, split_mapping
from dualpipe.executor.pool import Pool
from dualpipe.executor.stage import Stage
from dualpipe.executor.stream import Stream
from torch import nn

CPU = torch.device("cpu")


def test_torch_is_imported_when_it_is_needed():
    code = (
        "import sys, dualpipe; assert 'torch' not in sys.modules; "
        "assert dualpipe.DualPipe.__module__ == 'dualpipe.drop_in'; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(hasattr(dualpipe, name) for name in dualpipe.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dualpipe.nothing


# Micro-batches


def test_tensors_are_cut_as_even_as_can_be():
    x = torch.arange(14).reshape(7, 2)
    rows = split([x, None, MicroBatches("abc")], 3, 0, "inputs")
    assert [len(row[0]) for row in rows] == [3, 2, 2]
    assert torch.equal(torch.cat([row[0] for row in rows]), x)
    assert [row[1:] for row in rows] == [(None, "a"), (None, "b"), (None, "c")]
    assert [row[0].shape for row in split([x], 2, -1, "inputs")] == [(7, 1), (7, 1)]
    assert split([], 2, 0, "inputs") == [(), ()]


def test_keyword_arguments_stay_whole_unless_they_are_tensors():
    x = torch.arange(4)
    rows = split_mapping({"x": x, "flag": True, "each": MicroBatches([1, 2])}, 2, 0)
    assert [row["x"].tolist() for row in rows] == [[0, 1], [2, 3]]
    assert [(row["flag"], row["each"]) for row in rows] == [(True, 1), (True, 2)]


def test_outputs_are_put_together_again():
    a, b = torch.ones(1, 2), torch.zeros(2, 2)
    assert merge([(a,), (b,)], 0).shape == (3, 2)
    both, nothing, scalar = merge([(a, None, a.sum()), (b, None, b.sum())], 0)
    assert both.shape == (3, 2)
    assert nothing is None
    assert scalar.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (torch.zeros(2), "batch_size"),
        (torch.tensor(1.0), "batch_dim"),
        ("text", "not_a_tensor"),
        (MicroBatches([1, 2]), "batch_size"),
    ],
)
def test_what_cannot_be_cut_is_refused(value, code):
    with pytest.raises(PipelineError) as caught:
        split([torch.zeros(3), value], 3, 0, "inputs")
    assert (caught.value.code, caught.value.argument) == (code, "inputs[1]")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_nothing_is_cut_where_there_are_no_micro_batches():
    assert split([None, torch.zeros(0, 2), MicroBatches()], 0, 0, "inputs") == []
    with pytest.raises(PipelineError, match="no micro-batches here"):
        split([torch.zeros(3)], 0, 0, "inputs")


def test_signatures_tell_shapes_apart():
    x = torch.zeros(2, 3)
    assert signature([x, {"a": 1}]) == signature((x + 1, {"a": 1}))
    assert signature(x) != signature(x.double())
    assert signature(x) != signature(x.clone().requires_grad_())
    assert pickle.loads(pickle.dumps(signature(x))) == signature(x)


# The pool


def test_a_buffer_is_used_again_when_nobody_holds_it():
    pool, spec = Pool(CPU), TensorSpec((2, 3), torch.float32)
    first = pool.take(spec)
    at = first.data_ptr()
    assert (tuple(first.shape), first.stride()) == ((2, 3), (3, 1))
    assert pool.take(spec).data_ptr() != at
    view = first[0]
    del first
    assert pool.take(spec).data_ptr() != at
    del view
    # Another shape of the same size will do.
    assert at in {pool.take(TensorSpec((6,), torch.int32)).data_ptr() for _ in range(1)}
    assert pool.bytes == 2 * 24


def test_a_buffer_that_a_graph_has_saved_is_not_used_again():
    pool, spec = Pool(CPU), TensorSpec((4,), torch.float32)
    x = pool.take(spec).fill_(2).requires_grad_()
    at, loss = x.data_ptr(), (x * x).sum()
    del x
    assert pool.take(spec).data_ptr() != at
    loss.backward()
    del loss
    assert {pool.take(spec).data_ptr() for _ in range(2)} & {at}
    pool.keep([TensorSpec((5,), torch.float32)])
    assert pool.bytes == 0


# Boundaries


def test_boundaries_as_given():
    spec = TensorSpec((2,), torch.float32)
    index = TensorSpec((2,), torch.int64)
    assert given_boundaries([spec, index], 3, training=True) == [Boundary((spec, index), (0,))] * 2
    assert given_boundaries([[spec], [index]], 3, training=False) == [
        Boundary((spec,), ()),
        Boundary((index,), ()),
    ]
    for wrong in ([[spec]], 3, [(2, "float32")], [["x"], ["y"]]):
        with pytest.raises(PipelineError, match="boundaries"):
            given_boundaries(wrong, 3, training=True)


def test_outputs_that_do_not_fit_a_boundary_are_refused():
    boundary = Boundary.of([torch.zeros(2), None])
    boundary.check([torch.ones(2), None])
    for wrong in ([torch.zeros(2)], [torch.zeros(3), None], [torch.zeros(2).double(), None]):
        with pytest.raises(PipelineError, match=r"\[2\] float32"):
            boundary.check(wrong)
    with pytest.raises(PipelineError, match="dict"):
        as_outputs({"x": torch.zeros(2)})


def test_a_dry_forward_leaves_no_traces():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    state = torch.get_rng_state()
    boundary = dry_forward(module, [torch.randn(4, 3)], {}, training=True)
    assert boundary == Boundary((TensorSpec((4, 3), torch.float32),), (0,))
    assert torch.equal(state, torch.get_rng_state()) is False
    torch.set_rng_state(state)
    dry_forward(module, [torch.zeros(4, 3)], {}, training=True)
    assert torch.equal(state, torch.get_rng_state())
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name])


class WritesInPlace(nn.Module):
    """Into its input, a keyword argument and a buffer, of which it replaces another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("late", None)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.mean = x.mean()
        self.late = self.mean
        return x.mul_(2) + mask.neg_()


def test_a_dry_forward_works_on_copies():
    module, x, mask = WritesInPlace(), torch.ones(2, 3), torch.ones(2, 3)
    mean = module.mean
    dry_forward(module, [x], {"mask": mask}, training=True)
    assert torch.equal(x + mask, torch.full((2, 3), 2.0))
    assert module.mean is mean
    assert module.late is None
    assert module.count.item() == module.mean.item() == 0


# Seeds


def test_seeds_differ_and_stay():
    seeds = {seed_of(*key) for key in itertools.product(range(3), repeat=4)}
    assert len(seeds) == 81
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, 1, 2, 3) == 8479124504904169328


# Streams


@pytest.mark.parametrize("method", METHODS)
def test_an_early_send_overtakes_no_other_message_to_the_same_peer(method):
    num_early = 0
    for micro_batches in (5, 8, 16):
        schedule = Schedule.generate(method, 4, micro_batches)
        held = schedule.placement
        peers = {
            (stage, copy): int(held[copy, stage])
            for copy in range(schedule.num_copies)
            for stage in range(schedule.num_stages)
        }
        for rank in range(4):
            given = schedule.instructions(rank)
            stages = {
                place: Stage(nn.Identity(), *place, schedule.num_stages)
                for place, holder in peers.items()
                if holder == rank
            }
            stream = Stream(given, stages, peers, None, None, None)
            assert sends(stream.instructions, peers) == sends(given, peers)
            plain = [i for i in given if i.kind not in {Kind.REDUCE_GRAD, Kind.WAIT_REDUCE_GRAD}]
            assert sorted(stream.instructions) == sorted(plain)
            num_early += sum(
                one.kind == Kind.OVERLAP_F and two.kind == Kind.SEND_F
                for one, two in itertools.pairwise(stream.instructions)
            )
    assert num_early > 0 or method not in {"dualpipe", "dualpipev"}


def sends(instructions: list[Instruction], peers) -> dict[int, list[Instruction]]:
    """What is sent to each peer, in its order."""
    found: dict[int, list[Instruction]] = {}
    for instruction in instructions:
        step = {Kind.SEND_F: 1, Kind.SEND_B: -1}.get(instruction.kind)
        if step is not None:
            peer = peers[instruction.stage + step, instruction.copy]
            found.setdefault(peer, []).append(instruction)
    return found
