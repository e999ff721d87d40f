"""The kernels for GPUs against the same steps in plain torch, on triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

TOKENS, TOP_K, HIDDEN, ROWS = 5, 3, 1030, 11


def compare(device):
    """Each step in both ways; the largest difference of each, by name."""
    from eplb_rs.moe import kernels, rows

    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    row_NH, x_TH, grad_TH = draw(ROWS, HIDDEN), draw(TOKENS, HIDDEN), draw(TOKENS, HIDDEN)
    gate_TK, inner, grad = draw(TOKENS, TOP_K), draw(ROWS, 2 * HIDDEN), draw(ROWS, HIDDEN)
    # The last places point behind the last row.
    place_TK = torch.randperm(TOKENS * TOP_K, generator=generator).view(TOKENS, TOP_K)
    sent = place_TK.flatten()

    def on(*tensors):
        return [tensor.to(device) for tensor in tensors]

    apart = {}

    def look(name, got, wanted):
        for part, (a, b) in enumerate(zip(got, wanted, strict=True)):
            apart[f"{name} {part}"] = float((a.cpu() - b).abs().max())

    look("gather", [kernels.gather(*on(x_TH, sent), gaps=True, share=TOP_K)],
         [rows.gather(x_TH, sent, gaps=True, share=TOP_K)])  # fmt: skip
    look("gather with gaps", [kernels.gather(*on(row_NH, place_TK), gaps=True)],
         [rows.gather(row_NH, place_TK, gaps=True)])  # fmt: skip
    for gates in (gate_TK, None):
        look(f"weighted_sum {gates is None}",
             [kernels.weighted_sum(*on(row_NH, place_TK), gates if gates is None else on(gates)[0],
                                   gaps=True)],
             [rows.weighted_sum(row_NH, place_TK, gates, gaps=True)])  # fmt: skip
    named = torch.zeros(ROWS + 1, dtype=torch.bool)
    named[place_TK.clamp(max=ROWS)] = True
    got = kernels.spread(*on(grad_TH, gate_TK, row_NH, place_TK), gaps=True)
    wanted = rows.spread(grad_TH, gate_TK, row_NH, place_TK, gaps=True)
    look("spread", (got[0].cpu()[named[:-1]], got[1]), (wanted[0][named[:-1]], wanted[1]))
    for activation in ("silu", "relu", "gelu"):
        look(activation, [kernels.gated(*on(inner), activation)], [rows.gated(inner, activation)])
        look(f"{activation} backward",
             kernels.gated_backward(*on(grad, inner), activation),
             rows.gated_backward(grad, inner, activation))  # fmt: skip
    nothing = torch.empty(0, TOP_K, dtype=torch.int64)
    assert kernels.weighted_sum(*on(row_NH, nothing), None, gaps=True).shape == (0, HIDDEN)
    assert kernels.gather(*on(row_NH, nothing), gaps=True).shape == (0, TOP_K, HIDDEN)
    return apart


def multiply(device):
    """Grouped products, of whole numbers that half precision can hold, against those slot by slot;
    the largest difference of each. Slots are filled up; some have no row, one has several tiles."""
    from eplb_rs.moe import products, rows
    from eplb_rs.moe.experts import Groups

    generator = torch.Generator().manual_seed(1)
    sizes = [64, 0, 320, 128, 0, 192]
    behind, height, width = 40, 256, 128
    groups = Groups(torch.tensor(sizes).cumsum(0).int().to(device), sizes, products.STEP)

    def draw(*shape):
        keep = torch.rand(shape, generator=generator) < 0.3
        return (torch.randint(-2, 3, shape, generator=generator) * keep).half().to(device)

    weight = draw(len(sizes), height, width)
    number = sum(sizes)
    left, right = draw(number + behind, height), draw(number + behind, width)
    apart = {}
    for name, given, transposed in (("forward", right, True), ("backward", left, False)):
        got = products.product(given, weight, groups, transposed=transposed)
        wanted = rows.product(given.float(), weight.float(), groups, transposed=transposed)
        apart[name] = float((got - wanted)[:number].abs().max())
    got = products.outer(left, right, groups)
    apart["weights"] = float((got - rows.outer(left.float(), right.float(), groups)).abs().max())
    none = Groups(torch.zeros_like(groups.end_S), [0] * len(sizes), products.STEP)
    assert products.product(left[:0], weight, none, transposed=False).shape == (0, width)
    assert not products.outer(left[:0], right[:0], none).any()
    assert not products.outer(left, right, none).any()
    return apart


def check(apart, exact):
    assert exact == {"forward": 0, "backward": 0, "weights": 0}
    assert len(apart) == 15
    assert max(apart.values()) < 2e-4, apart  # sums of 1,030 products in float32
    same = [v for name, v in apart.items() if "gather" in name or "weighted" in name]
    assert max(same) == 0, apart


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_do_as_plain_torch():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_kernels_do_as_plain_torch_on_a_gpu():
    check(compare("cuda"), multiply("cuda"))


if __name__ == "__main__":
    check(compare("cpu"), multiply("cpu"))
