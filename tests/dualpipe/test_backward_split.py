"""I and W together are B, bit for bit, whatever the module; what cannot be split says why."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from dualpipe.executor.backward import StageBackward, WeightPart
from dualpipe.utils import WeightGradStore
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WIDTH = 16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Run:
    """A module's gradients over some micro-batches, whole or split."""

    def __init__(
        self,
        module: nn.Module,
        *inputs: torch.Tensor,
        split: bool,
        micro_batches: int = 3,
        late: bool = False,
    ) -> None:
        self.module = copy.deepcopy(module)
        self.backward = StageBackward()
        self.input_grads: list[torch.Tensor | None] = []
        self.why: list[str | None] = []
        self.empty: list[bool] = []
        kept: list[WeightPart] = []
        for number in range(micro_batches):
            torch.manual_seed(number)
            given = [_another(tensor, number) for tensor in inputs]
            out = self.module(*given)
            outputs = list(out) if isinstance(out, tuple) else [out]
            grads = [torch.randn_like(o) if o.is_floating_point() else None for o in outputs]
            if split:
                found, rest = self.backward.input_part(outputs, grads, given)
                self.why.append(rest.why)
                self.empty.append(rest.empty)
                kept.append(rest)
                if not late:
                    kept.pop().run()
            else:
                found = self.backward.whole(outputs, grads, given)
            self.input_grads += found
        for rest in kept:
            rest.run()

    @property
    def grads(self) -> list[torch.Tensor | None]:
        weights = [parameter.grad for parameter in self.module.parameters()]
        return self.input_grads + weights


def _another(tensor: torch.Tensor, number: int) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor.roll(number, 0)
    return (tensor * (1 + number)).detach().requires_grad_(tensor.requires_grad)


def same_bits(one: list[torch.Tensor | None], other: list[torch.Tensor | None]) -> None:
    assert len(one) == len(other)
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        assert (a is None) == (b is None), f"gradient {index}: {a} and {b}"
        if a is None or b is None:
            continue
        assert a.layout == b.layout
        if a.is_sparse:
            a, b = a.coalesce(), b.coalesce()  # noqa: PLW2901
            assert torch.equal(a.indices(), b.indices())
            a, b = a.values(), b.values()  # noqa: PLW2901
        assert torch.equal(a, b), f"gradient {index} differs by {(a - b).abs().max()}"


def split_like_whole(module: nn.Module, *inputs: torch.Tensor, **options: Any) -> Run:
    whole = Run(module, *inputs, split=False, **options)
    split = Run(module, *inputs, split=True, **options)
    same_bits(split.grads, whole.grads)
    assert any(grad is not None for grad in whole.grads)
    return split


def x(*shape: int, grad: bool = True) -> torch.Tensor:
    torch.manual_seed(99)
    return torch.randn(*(shape or (32, WIDTH))).requires_grad_(grad)


class Apply(nn.Module):
    """A function of modules and parameters as a module."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, bias=bias)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*(shape or (WIDTH, WIDTH))))


def mlp() -> nn.Module:
    return nn.Sequential(linear(), nn.GELU(), nn.LayerNorm(WIDTH), linear(bias=False), nn.SiLU())


def experts() -> Apply:
    def run(m: Any, tokens: torch.Tensor) -> torch.Tensor:
        scores = m.gate(tokens).softmax(-1)
        top, chosen = scores.topk(2, -1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(m.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(tokens[rows]) * top[rows, place, None])
        return out

    return Apply(run, gate=nn.Linear(WIDTH, 4), experts=nn.ModuleList(mlp() for _ in range(4)))


def thrice(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.part(torch.relu(m.part(torch.relu(m.part(x)))))


def thrice_through(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.relu(torch.relu(x @ w) @ w) @ w


def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.qkv(x).view(4, 8, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return x + m.out(mixed.transpose(1, 2).reshape(4, 8, WIDTH))


PLAIN: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "mlp": (mlp, lambda: (x(),)),
    "one Linear": (linear, lambda: (x(),)),
    "three dimensions": (mlp, lambda: (x(2, 3, WIDTH),)),
    "attention": (
        lambda: Apply(attention, qkv=nn.Linear(WIDTH, 3 * WIDTH), out=linear(bias=False)),
        lambda: (x(4, 8, WIDTH),),
    ),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True),
        lambda: (x(2, 8, WIDTH),),
    ),
    "experts": (experts, lambda: (x(),)),
    "dropout": (lambda: nn.Sequential(linear(), nn.Dropout(0.3), linear()), lambda: (x(),)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        lambda: (x(2, 2, 8, 8),),
    ),
    "broadcast parameters": (
        lambda: Apply(
            lambda m, x: (x * m.scale + m.shift) * m.one,
            scale=weight(WIDTH),
            shift=weight(1, WIDTH),
            one=nn.Parameter(torch.tensor(2.0)),
        ),
        lambda: (x(),),
    ),
    "chunk": (lambda: Apply(lambda m, x: m.part(x).chunk(2, -1), part=linear()), lambda: (x(),)),
    "LSTM": (
        lambda: Apply(lambda m, x: m.part(x)[0], part=nn.LSTM(WIDTH, WIDTH, 2)),
        lambda: (x(5, 3, WIDTH),),
    ),
    "Flatten": (lambda: nn.Sequential(linear(), nn.Flatten()), lambda: (x(2, 3, WIDTH),)),
    "view of the input": (
        lambda: Apply(lambda m, x: (x.view(-1), m.part(x)), part=linear()),
        lambda: (x(),),
    ),
    "output is an input": (
        lambda: Apply(lambda m, x, y: (x, m.part(y)), part=linear()),
        lambda: (x(), x()),
    ),
    "tied weights": (lambda: nn.Sequential(part := linear(), nn.ReLU(), part), lambda: (x(),)),
    "used three times": (lambda: Apply(thrice, part=linear()), lambda: (x(),)),
    "a weight and its transpose": (
        lambda: Apply(lambda m, x: torch.relu(x @ m.w) @ m.w.t(), w=weight()),
        lambda: (x(),),
    ),
    "a transpose used three times": (
        lambda: Apply(lambda m, x: thrice_through(x, m.w.t()), w=weight()),
        lambda: (x(),),
    ),
    "weight_norm": (
        lambda: nn.utils.parametrizations.weight_norm(linear()),
        lambda: (x(),),
    ),
    "weights of weights": (
        lambda: Apply(lambda m, x: x @ (m.a @ m.b).softmax(-1) + x @ m.b, a=weight(), b=weight()),
        lambda: (x(),),
    ),
    "two branches in one product": (
        lambda: Apply(lambda m, x: x * (m.a * m.b + m.b), a=weight(WIDTH), b=weight(WIDTH)),
        lambda: (x(),),
    ),
    "several inputs and outputs": (
        lambda: Apply(
            lambda m, x, y: (m.a(x) + y, m.b(y) * x, torch.arange(3)), a=linear(), b=linear()
        ),
        lambda: (x(), x()),
    ),
    "an input without gradient": (
        lambda: Apply(lambda m, x, y: m.a(x) + m.b(y), a=linear(), b=linear()),
        lambda: (x(), x(grad=False)),
    ),
    "an unused input": (
        lambda: Apply(lambda m, x, y: m.a(x), a=linear()),
        lambda: (x(), x()),
    ),
    "positions": (
        lambda: Apply(
            lambda m, x: m.part(x + m.embed(torch.arange(32))),
            part=mlp(),
            embed=nn.Embedding(32, WIDTH),
        ),
        lambda: (x(),),
    ),
    "sparse positions": (
        lambda: Apply(
            lambda m, x: m.part(x + m.embed(torch.arange(32) // 2)),
            part=mlp(),
            embed=nn.Embedding(32, WIDTH, sparse=True),
        ),
        lambda: (x(),),
    ),
    "an output of parameters alone": (
        lambda: Apply(
            lambda m, x: (m.part(x), m.part.weight.square().sum(), m.w), part=linear(), w=weight()
        ),
        lambda: (x(),),
    ),
    "a parameter that meets no input": (
        lambda: Apply(lambda m, x: m.part(x).sum() + m.w.norm(), part=linear(), w=weight()),
        lambda: (x(),),
    ),
    "checkpoint": (
        lambda: Apply(lambda m, x: checkpoint(m.part, x, use_reentrant=False), part=mlp()),
        lambda: (x(),),
    ),
    "no input needs a gradient": (mlp, lambda: (x(grad=False),)),
    "embedding": (
        lambda: nn.Sequential(
            nn.Embedding(50, WIDTH), mlp(), nn.TransformerEncoderLayer(WIDTH, 2, 32)
        ),
        lambda: (torch.arange(40).view(5, 8),),
    ),
    "sparse embedding": (
        lambda: nn.Sequential(nn.Embedding(50, WIDTH, sparse=True), mlp()),
        lambda: (torch.arange(40).view(5, 8),),
    ),
}


@pytest.mark.parametrize("late", [False, True], ids=["W at once", "W late"])
@pytest.mark.parametrize("name", PLAIN)
def test_split_is_whole(name: str, late: bool) -> None:
    torch.manual_seed(0)
    module, inputs = PLAIN[name]
    run = split_like_whole(module(), *inputs(), late=late)
    assert run.why == [None] * 3
    assert run.empty == [False] * 3


# Where only a part can be left, or nothing.


class Scaled(torch.autograd.Function):
    """A product that counts its backwards."""

    backwards = 0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        Scaled.backwards += 1
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum(0)


def test_custom_functions_run_once() -> None:
    module = nn.Sequential(
        linear(), Apply(lambda m, x: Scaled.apply(x, m.w), w=weight(WIDTH)), linear()
    )
    Scaled.backwards = 0
    run = split_like_whole(module, x(), micro_batches=4)
    assert Scaled.backwards == 8
    # The first backward was whole: the function might have kept weight gradients of its own.
    assert run.empty == [True, False, False, False]
    assert "WeightGradStore" in (run.why[0] or "")
    assert run.why[1:] == ["1 parameters: Scaled can be run only once"] * 3


def test_custom_functions_without_weights() -> None:
    module = nn.Sequential(
        linear(), Apply(lambda m, x: Scaled.apply(x, torch.full((WIDTH,), 2.0))), linear()
    )
    run = split_like_whole(module, x())
    assert run.why[1:] == [None, None]


def test_custom_functions_over_weights_alone() -> None:
    scale = torch.full((WIDTH,), 2.0)
    module = Apply(lambda m, x: m.part(x) @ Scaled.apply(m.w, scale), part=linear(), w=weight())
    Scaled.backwards = 0
    run = split_like_whole(module, x())
    assert Scaled.backwards == 6
    assert run.why[1:] == [None, None]


class KeptLinear(torch.autograd.Function):
    """A Linear in the published style: its weight gradient goes to the store, if that is on."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return functional.linear(x, w)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, w = ctx.saved_tensors

        def weight_grad() -> torch.Tensor:
            return grad.t() @ x

        if not WeightGradStore.enabled:
            return grad @ w, weight_grad()

        def later() -> None:
            w.grad = weight_grad() if w.grad is None else w.grad.add_(weight_grad())

        WeightGradStore.put(later)
        return grad @ w, None


@pytest.mark.parametrize("late", [False, True])
def test_a_module_with_the_store_is_run_as_published(late: bool) -> None:
    module = nn.Sequential(
        linear(), Apply(lambda m, x: KeptLinear.apply(x, m.w), w=weight()), nn.LayerNorm(WIDTH)
    )
    WeightGradStore.cache = mine = [lambda: None]
    run = split_like_whole(module, x(), late=late)
    assert run.empty == [False] * 3
    assert WeightGradStore.cache is mine
    assert not WeightGradStore.enabled
    WeightGradStore.clear()


def test_reentrant_checkpoints_are_not_split() -> None:
    module = Apply(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=True)), a=mlp(), b=linear())
    run = split_like_whole(module, x())
    assert run.empty == [True] * 3
    assert "use_reentrant=False" in (run.why[2] or "")


def test_a_sum_in_another_order_is_made_whole() -> None:
    def run_module(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.other(torch.relu(torch.relu(x @ m.w) @ m.w.t()) @ m.w)

    run = split_like_whole(Apply(run_module, w=weight(), other=linear()), x())
    assert all("another order" in (why or "") for why in run.why)
    assert run.empty == [False] * 3  # other is left to W


def test_weights_in_place_through_views() -> None:
    def run_module(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        x[0] = m.w
        return m.part(x)

    run = split_like_whole(Apply(run_module, part=linear(), w=weight(WIDTH)), x())
    assert run.why == ["1 parameters: CopySlices can be run only once"] * 3


def test_nothing_to_do() -> None:
    frozen = linear().requires_grad_(False)
    backward = StageBackward()
    grads, rest = backward.input_part([frozen(x(grad=False))], [x()], [x(grad=False)])
    assert grads == [None]
    assert rest.empty
    run = split_like_whole(frozen, x())
    assert run.empty == [True] * 3
    assert run.why == [None] * 3


# Mixed precision, losses, edges


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_autocast(micro_batches: int) -> None:
    def run_module(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.part(x).float()

    split_like_whole(Apply(run_module, part=mlp()), x(), micro_batches=micro_batches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    split_like_whole(mlp().to(dtype), x().detach().to(dtype).requires_grad_())


def test_losses_and_edges() -> None:
    expected, module = mlp(), None
    module = copy.deepcopy(expected)
    given, same = x(), x()
    expected(same).square().mean().backward()
    loss = module(given).square().mean()
    (grad,), rest = StageBackward().input_part([loss], None, [given])
    rest.run()
    same_bits([grad, *(p.grad for p in module.parameters())],
              [same.grad, *(p.grad for p in expected.parameters())])  # fmt: skip

    module.zero_grad()
    given = x()
    out = module(given)
    edge, out_grad = torch.autograd.graph.get_gradient_edge(out), torch.ones_like(out)
    del out
    (grad,), rest = StageBackward().input_part([edge], [out_grad], [given])
    rest.run()
    expected.zero_grad()
    same = x()
    expected(same).backward(out_grad)
    same_bits([grad, *(p.grad for p in module.parameters())],
              [same.grad, *(p.grad for p in expected.parameters())])  # fmt: skip


# Hooks


def test_hooks_fire_as_often_as_in_a_whole_backward() -> None:
    def counted(split: bool) -> tuple[Counter[str], Run]:
        fired: Counter[str] = Counter()
        module = mlp()
        for name, parameter in module.named_parameters():
            parameter.register_hook(lambda grad, n=name: fired.update([n]) or grad * 2)
            parameter.register_post_accumulate_grad_hook(
                lambda p, n=name: fired.update([f"post {n}"])
            )

        def run_module(m: Any, x: torch.Tensor) -> torch.Tensor:
            y = m.parts[0](x)
            y.register_hook(lambda grad: fired.update(["inside"]) or grad * 3)
            w = m.parts[3].weight * 1.5
            w.register_hook(lambda grad: fired.update(["weights"]) or grad * 5)
            return functional.linear(m.parts[2](m.parts[1](y)), w)

        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        # No copy: hooks would be lost.
        run = Run.__new__(Run)
        run.module, run.backward, run.input_grads = (
            Apply(run_module, parts=module),
            StageBackward(),
            [],
        )
        for number in range(3):
            given = x()
            torch.manual_seed(number)
            out = run.module(given)
            if split:
                found, rest = run.backward.input_part([out], [torch.randn_like(out)], [given])
                assert fired["post 0.weight"] == number
                assert fired["inside"] == number + 1
                rest.run()
            else:
                found = run.backward.whole([out], [torch.randn_like(out)], [given])
            run.input_grads += found
        return fired, run

    fired, split = counted(True)
    expected, whole = counted(False)
    assert fired == expected
    assert set(fired.values()) == {3}
    assert len(fired) == 2 * 5 + 2
    same_bits(split.grads, whole.grads)


# Work and memory


class Count(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needs", [True, False])
def test_the_parts_share_the_work(needs: bool) -> None:
    module = nn.Sequential(*[nn.Sequential(linear(), nn.ReLU()) for _ in range(5)])
    given = x(grad=needs)
    out = module(given)
    with Count() as count:
        _, rest = StageBackward().input_part([out], [torch.ones_like(out)], [given])
    assert count.products == 5 - (not needs)
    with Count() as count:
        rest.run()
    assert count.products == 5


@pytest.mark.parametrize("inside", [mlp, lambda: nn.utils.parametrizations.weight_norm(linear())])
def test_checkpoints_recompute_once_in_each_part(inside: Callable[[], nn.Module]) -> None:
    forwards = 0

    def run_module(m: Any, x: torch.Tensor) -> torch.Tensor:
        nonlocal forwards

        def part(x: torch.Tensor) -> torch.Tensor:
            nonlocal forwards
            forwards += 1
            return m.two(torch.relu(m.one(x)))

        return checkpoint(part, x, use_reentrant=False)

    module = Apply(run_module, one=inside(), two=nn.Sequential(*(linear() for _ in range(6))))
    given = x()
    out = module(given)
    assert forwards == 1
    _, rest = StageBackward().input_part([out], [torch.ones_like(out)], [given])
    assert forwards == 2
    rest.run()
    assert forwards == 3


def test_what_only_the_input_part_needs_is_freed() -> None:
    kept: dict[str, weakref.ref[torch.Tensor]] = {}

    def run_module(m: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = m.gate(x), m.up(x)
        act = functional.silu(gate)
        product = act * up
        for name, tensor in {"gate": gate, "up": up, "act": act, "product": product}.items():
            kept[name] = weakref.ref(tensor.untyped_storage())
        return m.down(product)

    module = Apply(run_module, gate=linear(), up=linear(), down=linear())
    given = x()
    out = module(given)
    assert all(storage() is not None for storage in kept.values())
    edge, grad = torch.autograd.graph.get_gradient_edge(out), torch.ones_like(out)
    del out
    _, rest = StageBackward().input_part([edge], [grad], [given])
    del edge
    alive = {name for name, storage in kept.items() if storage() is not None}
    assert alive == {"product"}
    rest.run()
    assert all(storage() is None for storage in kept.values())


def test_a_graph_that_is_kept_can_be_run_again() -> None:
    module, backward = mlp(), StageBackward()
    given = x()
    out = module(given)
    grads = []
    for _ in range(2):
        module.zero_grad()
        found, rest = backward.input_part([out], [torch.ones_like(out)], [given], retain_graph=True)
        rest.run()
        grads.append([*found, *(p.grad for p in module.parameters())])
    same_bits(*grads)


def test_a_graph_that_is_not_kept_says_so() -> None:
    module, backward = mlp(), StageBackward()
    given = x()
    out = module(given)
    backward.input_part([out], [torch.ones_like(out)], [given])
    with pytest.raises(RuntimeError, match="input part of this backward has run"):
        backward.input_part([out], [torch.ones_like(out)], [given])


def test_accumulation_is_in_place() -> None:
    module = linear()
    module.weight.grad = before = torch.ones(WIDTH, WIDTH)
    given = x()
    out = module(given)
    StageBackward().input_part([out], [torch.ones_like(out)], [given])[1].run()
    assert module.weight.grad is before
    assert not torch.equal(before, torch.ones(WIDTH, WIDTH))


def test_large_gradients_do_not_wait_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualpipe.executor.backward._FLUSH_BYTES", 0)
    for name in ("mlp", "used three times", "weights of weights", "experts", "tied weights"):
        module, inputs = PLAIN[name]
        split_like_whole(module(), *inputs())
    module = nn.Sequential(*[linear(bias=False) for _ in range(4)])
    given = x()
    out = module(given)
    _, rest = StageBackward().input_part([out], [torch.ones_like(out)], [given])
    done = []
    module[3].weight.register_post_accumulate_grad_hook(
        lambda _: done.append(module[0].weight.grad is None)
    )
    rest.run()
    assert done == [True]
