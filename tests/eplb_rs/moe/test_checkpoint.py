"""Experts from checkpoints into slots, moved, and back: the same names, shapes and bytes."""

import json

import eplb_rs
import numpy as np
import pytest
import world

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from eplb_rs.moe import (  # noqa: E402
    Checkpoint,
    ExpertField,
    ExpertMover,
    ExpertWeights,
    slots_of,
    write_index,
)

NUM_EXPERTS, HIDDEN, INTER = 12, 8, 6
LAYER_IDS = (1, 2, 5)


def random_of(dtype, shape, rng):
    bits = torch.from_numpy(rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8))
    return bits.view(dtype).reshape(shape)


def expert_tensors(layout, rng):
    """What an expert of each family consists of, by the end of its name."""
    bf16, f8, f32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
    first, second, last = (
        ("w1", "w3", "w2") if layout == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    )
    wide, tall = (INTER, HIDDEN), (HIDDEN, INTER)
    if layout == "deepseek_v3":  # 8-bit blocks with scales
        made = {}
        for name, shape in ((first, wide), (second, wide), (last, tall)):
            made[f"{name}.weight"] = random_of(f8, shape, rng)
            made[f"{name}.weight_scale_inv"] = random_of(f32, (shape[0] // 2, shape[1] // 2), rng)
        return made
    if layout == "qwen3_moe":  # weights in four bits, with scales and zero points
        made = {}
        for name, (rows, columns) in ((first, wide), (second, wide), (last, tall)):
            made[f"{name}.qweight"] = random_of(torch.int32, (rows, columns // 2), rng)
            made[f"{name}.scales"] = random_of(torch.float16, (rows, 2), rng)
            made[f"{name}.qzeros"] = random_of(torch.int32, (rows, 1), rng)
        return made
    if layout == "mixtral":  # a scale for each tensor
        made = {}
        for name, shape in ((first, wide), (second, wide), (last, tall)):
            made[f"{name}.weight"] = random_of(f8, shape, rng)
            made[f"{name}.weight_scale"] = random_of(f32, (), rng)
        return made
    return {
        f"{name}.{kind}": random_of(bf16, shape if kind == "weight" else shape[:1], rng)
        for name, shape in ((first, wide), (second, wide), (last, tall))
        for kind in ("weight", "bias")
    }


def write_checkpoint(folder, layout, rng, num_files=3):
    """A checkpoint in several files, with tensors that are no experts among them."""
    between = "block_sparse_moe" if layout == "mixtral" else "mlp"
    tensors = {
        "model.embed_tokens.weight": torch.ones(3, HIDDEN),
        f"model.layers.0.{between}.gate_proj.weight": torch.ones(INTER, HIDDEN),
    }
    for layer in LAYER_IDS:
        inside = f"model.layers.{layer}.{between}"
        tensors[f"{inside}.gate.weight"] = torch.ones(NUM_EXPERTS, HIDDEN)
        tensors[f"{inside}.shared_experts.gate_proj.weight"] = torch.ones(INTER, HIDDEN)
        for expert in range(NUM_EXPERTS):
            for name, tensor in expert_tensors(layout, rng).items():
                tensors[f"model.layers.{layer}.{between}.experts.{expert}.{name}"] = tensor
    names = list(tensors)
    folder.mkdir()
    for part in range(num_files):
        here = {name: tensors[name] for name in names[part::num_files]}
        safetensors_torch.save_file(here, folder / f"model-{part}.safetensors")
    return {name: tensor for name, tensor in tensors.items() if ".experts." in name}


def random_plan(rng, topology, policy="balanced"):
    load = rng.lognormal(0, 1, (len(LAYER_IDS), NUM_EXPERTS))
    return eplb_rs.Planner(topology, policy=policy).plan(load, layer_ids=LAYER_IDS)


def same_bytes(left, right):
    return (
        left.shape == right.shape
        and left.dtype == right.dtype
        and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    )


LAYOUTS = ("deepseek_v3", "qwen3_moe", "mixtral", "olmoe")


class Counting:
    """Counts the bytes that are taken out of files; headers may be looked at."""

    opened = staticmethod(eplb_rs.moe.checkpoint.safe_open)
    bytes_read = 0

    def __init__(self, *args, **kwargs):
        self.file = self.opened(*args, **kwargs)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        class Header:
            tensor = self.file.get_slice(name)
            get_shape, get_dtype = tensor.get_shape, tensor.get_dtype

        return Header

    def get_tensor(self, name):
        tensor = self.file.get_tensor(name)
        Counting.bytes_read += tensor.nbytes
        return tensor


def load_move_twice_and_export(rank, size, folder):
    """For each layout, what this rank has read and what its slots hold, in bytes."""
    eplb_rs.moe.checkpoint.safe_open = Counting
    rng = np.random.default_rng(7)
    read = {}
    for layout in LAYOUTS:
        plans = [random_plan(rng, eplb_rs.Topology(2, 2, 5)) for _ in range(3)]
        checkpoint = Checkpoint(folder / layout)
        assert checkpoint.layer_ids == LAYER_IDS
        assert checkpoint.num_experts == NUM_EXPERTS
        weights = ExpertWeights(checkpoint.fields, num_layers=3, num_slots=5)
        Counting.bytes_read = 0
        checkpoint.load_into(weights, plans[0], rank)
        assert checkpoint.bytes_read == Counting.bytes_read
        read[layout] = Counting.bytes_read, 3 * 5 * weights.expert_bytes
        mover = ExpertMover(weights, limit_s=60, checksums=True)
        assert mover.apply(plans[0], plans[1]).received > 0
        assert mover.apply(plans[1], plans[2]).received > 0
        assert checkpoint.bytes_read == Counting.bytes_read, "moves read nothing"
        checkpoint.export(weights, plans[2], rank, folder / f"{layout}-out")
    return read


def test_load_move_twice_and_export(tmp_path):
    """In each layout, on four ranks: the same names, dtypes, shapes and bytes."""
    rng = np.random.default_rng(0)
    originals = {layout: write_checkpoint(tmp_path / layout, layout, rng) for layout in LAYOUTS}
    for read in world.run(load_move_twice_and_export, 4, tmp_path):
        assert all(0 < taken <= held for taken, held in read.values()), read
    for layout, original in originals.items():
        folder = tmp_path / f"{layout}-out"
        index = json.loads(write_index(folder).read_text())
        assert set(index["weight_map"]) == set(original)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in original.values())
        exported = {}
        for path in folder.glob("*.safetensors"):
            exported |= safetensors_torch.load_file(path)
        assert set(exported) == set(original)
        assert all(same_bytes(exported[name], tensor) for name, tensor in original.items())


def test_replicas_on_one_rank_are_read_once(tmp_path):
    write_checkpoint(tmp_path / "in", "olmoe", np.random.default_rng(0))
    checkpoint = Checkpoint(tmp_path / "in")
    topology = eplb_rs.Topology(1, 1, NUM_EXPERTS + 3)
    slots = np.tile([*range(NUM_EXPERTS), 0, 0, 1], (3, 1))
    plan = eplb_rs.Plan.from_phy2log(
        topology, slots, np.ones((3, NUM_EXPERTS)), layer_ids=LAYER_IDS
    )
    weights = ExpertWeights(checkpoint.fields, num_layers=3, num_slots=NUM_EXPERTS + 3)
    checkpoint.load_into(weights, plan, 0)
    assert checkpoint.bytes_read == 3 * NUM_EXPERTS * weights.expert_bytes
    for layer in range(3):
        sums = [weights.checksum(layer, slot) for slot in range(NUM_EXPERTS + 3)]
        assert sums[NUM_EXPERTS:] == [sums[0], sums[0], sums[1]]
        assert len(set(sums)) == NUM_EXPERTS


def test_one_expert_is_read_alone(tmp_path):
    written = whole(tmp_path / "in")
    checkpoint = Checkpoint(tmp_path / "in")
    weights = ExpertWeights(checkpoint.fields, num_layers=1, num_slots=1)
    checkpoint.read_expert(2, 3, weights.slot(0, 0))
    up = weights[0]["gate_up.weight"][0].chunk(2)[1]
    assert torch.equal(up, written[UP])
    assert checkpoint.bytes_read == weights.expert_bytes
    with pytest.raises(eplb_rs.InvalidInputError, match="experts that the checkpoint holds whole"):
        checkpoint.read_expert(2, 999, weights.slot(0, 0))


def test_dead_slots_stay_as_they_are(tmp_path):
    write_checkpoint(tmp_path / "in", "olmoe", np.random.default_rng(0))
    checkpoint = Checkpoint(tmp_path / "in")
    topology = eplb_rs.Topology(1, 3, NUM_EXPERTS).with_dead([1])
    plan = random_plan(np.random.default_rng(0), topology)
    weights = ExpertWeights(checkpoint.fields, num_layers=3, num_slots=NUM_EXPERTS)
    for layer in range(3):
        for tensor in weights[layer].values():
            tensor.fill_(3)
    before = [weights.checksum(layer, 0) for layer in range(3)]
    checkpoint.load_into(weights, plan, 1)
    assert [weights.checksum(layer, 0) for layer in range(3)] == before
    assert checkpoint.bytes_read == 0


def test_adopted_tensors_are_not_copied():
    layers = [{"w": torch.randn(4, 3, 2), "s": torch.randn(4)} for _ in range(2)]
    weights = ExpertWeights.adopt(layers)
    assert weights.fields == (
        ExpertField("w", (3, 2), torch.float32),
        ExpertField("s", (), torch.float32),
    )
    assert (weights.num_layers, weights.num_slots, weights.expert_bytes) == (2, 4, 28)
    weights.copy_slot(1, source=0, target=3)
    assert torch.equal(layers[1]["w"][3], layers[1]["w"][0])
    assert weights[0]["w"] is layers[0]["w"]


@pytest.mark.parametrize(
    ("layers", "code"),
    [
        ([], "empty"),
        ([{}], "empty"),
        ([{"w": [1.0]}], "wrong_type"),
        ([{"w": "scalar"}], "wrong_type"),
        ([{"w": "whole"}, {"v": "whole"}], "wrong_shape"),
        ([{"w": "whole"}, {"w": "short"}], "wrong_shape"),
        ([{"w": "whole"}, {"w": "half"}], "wrong_dtype"),
        ([{"w": "across"}], "not_contiguous"),
    ],
)
def test_what_cannot_be_adopted(layers, code):
    kinds = {
        "scalar": torch.zeros(()),
        "whole": torch.zeros(4, 3),
        "short": torch.zeros(3, 3),
        "half": torch.zeros(4, 3, dtype=torch.float16),
        "across": torch.zeros(3, 4).T,
    }
    layers = [
        {n: kinds.get(k, k) if isinstance(k, str) else k for n, k in layer.items()}
        for layer in layers
    ]
    with pytest.raises(eplb_rs.InvalidInputError) as caught:
        ExpertWeights.adopt(layers)
    assert caught.value.code == code


def test_fields_need_names_of_their_own():
    field = ExpertField("w", (2,), torch.float32)
    with pytest.raises(eplb_rs.InvalidInputError, match="twice"):
        ExpertWeights([field, field], num_layers=1, num_slots=1)
    with pytest.raises(eplb_rs.InvalidInputError, match="nothing"):
        ExpertWeights([], num_layers=1, num_slots=1)


def whole(folder):
    return write_checkpoint(folder, "olmoe", np.random.default_rng(0), num_files=1)


def without(name):
    def spoil(folder):
        tensors = whole(folder)
        tensors.pop(name)
        safetensors_torch.save_file(tensors, folder / "model-0.safetensors")

    return spoil


def with_tensor(name, tensor):
    def spoil(folder):
        tensors = whole(folder) | {name: tensor}
        safetensors_torch.save_file(tensors, folder / "model-0.safetensors")

    return spoil


def cut(folder):
    whole(folder)
    path = folder / "model-0.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def doubled(folder):
    whole(folder)
    (folder / "again.safetensors").write_bytes((folder / "model-0.safetensors").read_bytes())


UP = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda folder: folder.mkdir(), "unreadable_file"),
        (cut, "unreadable_file"),
        (doubled, "repeated"),
        (without(UP), "missing_tensor"),
        (with_tensor(UP, torch.zeros(1, 1)), "wrong_shape"),
        (with_tensor(UP, torch.zeros(INTER, HIDDEN)), "wrong_dtype"),
    ],
)
def test_spoilt_checkpoints(tmp_path, spoil, code):
    spoil(tmp_path / "in")
    plan = random_plan(np.random.default_rng(0), eplb_rs.Topology(1, 2, 8))

    def load():
        checkpoint = Checkpoint(tmp_path / "in")
        weights = ExpertWeights(checkpoint.fields, num_layers=3, num_slots=8)
        for rank in range(2):
            checkpoint.load_into(weights, plan, rank)

    with pytest.raises(eplb_rs.InvalidInputError) as caught:
        load()
    assert caught.value.code == code


def test_what_does_not_fit(tmp_path):
    whole(tmp_path / "in")
    checkpoint = Checkpoint(tmp_path / "in")
    plan = random_plan(np.random.default_rng(0), eplb_rs.Topology(1, 2, 8))
    weights = ExpertWeights(checkpoint.fields, num_layers=3, num_slots=8)
    with pytest.raises(eplb_rs.InvalidInputError, match="rank of the plan, 0 to 1"):
        checkpoint.load_into(weights, plan, 2)
    few = ExpertWeights(checkpoint.fields[:1], num_layers=3, num_slots=8)
    with pytest.raises(eplb_rs.InvalidInputError, match=r"ExpertWeights\(checkpoint.fields"):
        checkpoint.load_into(few, plan, 0)
    with pytest.raises(eplb_rs.InvalidInputError, match="8 slots, as the plan has"):
        checkpoint.load_into(ExpertWeights(checkpoint.fields, num_layers=3, num_slots=9), plan, 0)
    with pytest.raises(eplb_rs.InvalidInputError, match="deepseek_v3"):
        Checkpoint(tmp_path / "in", layout="gpt2")
    with pytest.raises(eplb_rs.InvalidInputError, match="another `layout`"):
        Checkpoint(tmp_path / "in", layout="mixtral")
    with pytest.raises(eplb_rs.InvalidInputError, match="a rank of the plan"):
        slots_of(plan, -1)
