"""What can be held of the layer's ways on CUDA without a GPU.

The kernels compile for Hopper; a pass on fake CUDA tensors, of which no value can be read, comes to
its end but for the one read that it may have; and grouped products equal those slot by slot.
"""

import importlib.util
import subprocess
import sys

import eplb_rs
import numpy as np
import pytest

torch = pytest.importorskip("torch")

HIDDEN, INTER, TOKENS, TOP_K, EXPERTS, SLOTS = 256, 128, 64, 4, 16, 9


def compiled(kernel, types, constants, **options):
    """For compute capability 9.0, with addresses and counts that are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(names) == types.keys() | constants.keys(), kernel
    aligned = {
        (names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t[0] == "*"
    }
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compile_kernels():
    """Each kernel as DeepSeek-V3's sizes ask for."""
    from eplb_rs.moe import kernels

    rows, number = "*bf16", "i32"
    wide = {"WIDTH": 7168, "BLOCK": 1024}
    gates = {"rows": rows, "places": "*i64", "gates": rows, "out": rows, "num_rows": number}
    wanted = [
        (kernels._gather, {"rows": rows, "index": "*i64", "out": rows, "num_rows": number},
         {"SHARE": 8, **wide}),
        (kernels._weighted_sum, gates, {"K": 8, "GATED": True, **wide}),
        (kernels._weighted_sum, {k: v for k, v in gates.items() if k != "gates"},
         {"gates": None, "K": 8, "GATED": False, **wide}),
        (kernels._spread, {"grads": rows, "gate_grads": rows, **gates}, {"K": 8, **wide}),
    ]  # fmt: skip
    for activation in ("silu", "relu", "gelu"):
        constants = {"ACTIVATION": activation, "WIDTH": 2048, "BLOCK": 1024}
        wanted.append((kernels._gated, {"inner": rows, "out": rows}, constants))
        both = dict.fromkeys(("grads", "inner", "hidden", "grad_inner"), rows)
        wanted.append((kernels._gated_backward, both, constants))
    for kernel, types, constants in wanted:
        code = compiled(kernel, types, constants, num_warps=4, **kernels._ROUNDED).asm["ptx"]
        assert "v4.b32" in code, f"{kernel}: 16 bytes at a time"
        assert ".local" not in code, f"{kernel}: registers spill"


def compile_products():
    """Products keep tensor cores busy, through their own copies of tiles, without spilling."""
    from eplb_rs.moe import products

    def described(*block):
        return f"tensordesc<bf16[{', '.join(map(str, block))}]>"

    rows, columns, depth = products._ROWS, products._COLUMNS, products._DEPTH
    side, few = products._SIDE, products._FEW
    tiles = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "NEAR": products._NEAR}
    tiles |= {"FROM_END": products._FROM_END, "ON_GPU": True}
    wanted = []
    for transposed, width, deep in ((True, 4096, 7168), (False, 7168, 4096)):
        types = {
            "rows": described(rows, depth),
            "half_rows": described(rows // 2, depth),
            "weight": described(columns, depth) if transposed else described(depth, columns),
            "out": described(rows, columns),
            "half_out": described(rows // 2, columns),
            "listed": "*i32",
            "queue": "*i64",
        }
        constants = {"HEIGHT": 4096, "WIDTH": width, "DEEP": deep, "TRANSPOSED": transposed}
        wanted.append((products._product, types, constants | tiles, 8))
    types = {
        "left": described(few, side),
        "right": described(few, side),
        "out": described(side, side),
        **dict.fromkeys(("ends", "order"), "*i32"),
    }
    sizes = {"HEIGHT": 4096, "WIDTH": 7168, "SIDE": side, "FEW": few, "NEAR": products._NEAR}
    wanted.append((products._outer, types, sizes, 4))
    for kernel, types, constants, warps in wanted:
        code = compiled(kernel, types, constants, num_warps=warps, num_stages=4).asm["ptx"]
        assert "wgmma.mma_async" in code, kernel
        assert "wgmma.wait_group.sync.aligned 1" in code, f"{kernel}: products in flight"
        assert "cp.async.bulk.tensor" in code, kernel
        assert ".local" not in code, f"{kernel}: registers spill"


def read_nothing():
    """A pass on fake CUDA tensors; how often it reads from the device, with a capacity and without."""
    import torch.distributed as dist
    from eplb_rs.moe import ExpertParallelMoE
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    load = np.random.default_rng(0).lognormal(0, 1, (1, EXPERTS))
    plan = eplb_rs.Planner(eplb_rs.Topology(1, 2, SLOTS)).plan(load)
    # The layer asks this before it looks for rows that did not fit: a graph is captured.
    torch.cuda.is_current_stream_capturing = lambda: True
    reads = []

    def told(tensor):
        """The sizes, the one thing that is read: all rows go to the first slot and come from it."""
        assert tensor.shape == (4 * SLOTS,)
        reads.append(tensor)
        sizes = [0] * (4 * SLOTS)
        sizes[0] = sizes[2 * SLOTS] = TOKENS * TOP_K
        return sizes

    FakeTensor.tolist = told
    found = []
    for capacity in (TOKENS * TOP_K, None):
        reads.clear()
        with FakeTensorMode(allow_non_fake_inputs=True):
            kind = {"dtype": torch.bfloat16, "device": "cuda"}
            weights = {
                "gate_up.weight": torch.empty(SLOTS, 2 * INTER, HIDDEN, **kind),
                "down.weight": torch.empty(SLOTS, HIDDEN, INTER, **kind),
            }
            layer = ExpertParallelMoE(
                torch.nn.Identity(),
                weights,
                plan,
                capacity=capacity,
                fused=False,
                row_multiple=64,
            )
            x, grad = torch.randn(TOKENS, HIDDEN, **kind), torch.randn(TOKENS, HIDDEN, **kind)
            gates = torch.rand(TOKENS, TOP_K, **kind)
            ids = torch.randint(0, EXPERTS, (TOKENS, TOP_K), device="cuda")
            made = layer.begin(x, gates, ids)
            made.dispatch()
            made.experts()
            made.combine()
            assert made.output().shape == x.shape
            made.combine_backward(grad)
            made.experts_backward()
            made.dispatch_backward()
            assert [part.shape for part in made.weight_grads()] == [
                layer.gate_up.shape,
                layer.down.shape,
            ]
            assert [part.shape for part in made.input_grad()] == [x.shape, gates.shape]
        found.append(len(reads))
    assert found == [0, 1], found


def alone(function):
    """In a process of its own: these leave torch changed."""
    command = [sys.executable, __file__, function.__name__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("part", [compile_kernels, compile_products])
def test_kernels_compile_for_hopper(part):
    alone(part)


def test_a_pass_reads_the_sizes_and_nothing_else():
    alone(read_nothing)


@pytest.mark.parametrize("counts", [[16, 0, 48, 1, 0, 7], [0, 0, 0, 0, 0, 72]])
def test_grouped_products_equal_those_slot_by_slot(counts, monkeypatch):
    from eplb_rs.moe import experts, rows

    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randint(-2, 3, shape, generator=generator).bfloat16()

    num_rows = sum(counts)
    ends = torch.tensor(counts).cumsum(0).int()
    groups = experts.Groups(ends, counts)
    x, grad = draw(num_rows, 64), draw(num_rows, 64)
    gate_up, down = draw(len(counts), 64, 64), draw(len(counts), 64, 32)

    def computed():
        out, inner = experts.experts_forward(x, gate_up, down, groups, rows, "relu")
        half = experts.experts_backward(grad, x, inner, gate_up, down, groups, rows, "relu")
        return out, inner, half.grad_rows_NH, *half.weights()

    one_by_one = computed()
    monkeypatch.setattr(rows, "_in_one", lambda *_: True)
    together = computed()
    for number, (a, b) in enumerate(zip(together, one_by_one, strict=True)):
        # To what bfloat16 keeps of sums: integers of more than 8 bits are rounded.
        assert torch.allclose(a.float(), b.float(), rtol=2**-7, atol=0), number


if __name__ == "__main__":
    globals()[sys.argv[1]]()
