"""Weight gradients that products add by themselves: as autograd's up to rounding, and for whom."""

from __future__ import annotations

import pytest
import torch
from dualpipe.executor import products
from dualpipe.executor.backward import StageBackward
from dualpipe.executor.parallel import hears_gradients
from pipelines import published_difference
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 16


@pytest.fixture(autouse=True)
def no_weight_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_MIN_BYTES", 0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, 3 * WIDTH)
        self.narrow = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.narrow(nn.functional.silu(self.wide(self.norm(x))))


class Plain(nn.Module):
    """A weight that is used as it is, not transposed, and one with a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.other = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        y = x.flatten(0, 1) @ self.weight
        return torch.addmm(y, y, self.other, beta=0.5, alpha=-3).view(x.shape)


class Tied(nn.Module):
    """A weight that is used twice: autograd adds up what comes from both."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return torch.tanh(self.linear(torch.tanh(self.linear(x))))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def whole(backward, output, grad, x):
    return backward.whole([output], [grad], [x])[0]


def in_parts(backward, output, grad, x):
    (found,), rest = backward.input_part([output], [grad], [x])
    rest.run()
    return found


MODULES = {
    # Which weights products add, of those that are there.
    "blocks": (lambda: nn.Sequential(Block(), Block(), nn.Linear(WIDTH, WIDTH)), 5),
    "plain": (Plain, 2),
    "tied": (Tied, 0),
    "checkpointed": (lambda: nn.Sequential(Block(), Checkpointed()), 2),
    "convolution": (lambda: nn.Conv1d(4, 4, 3, padding=1), 0),
}


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("run", [whole, in_parts])
@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_those_of_autograd(name: str, run, needs_grad: bool) -> None:
    make, count = MODULES[name]
    torch.manual_seed(0)
    module = make()
    xs = [torch.randn(2, 4, WIDTH, requires_grad=needs_grad) for _ in range(3)]
    grad = torch.randn(2, 4, WIDTH)
    for x in xs:
        module(x).backward(grad)
    wanted = {name: p.grad for name, p in module.named_parameters()}
    wanted_inputs = [x.grad for x in xs]
    for x in xs:
        x.grad = None
    module.zero_grad()

    backward = StageBackward(products=True)
    added: list = []
    backward.added = added.append
    found = [run(backward, module(x), grad, x) for x in xs]
    for name_, parameter in module.named_parameters():
        assert published_difference(parameter.grad, wanted[name_]) < 1e-13
    for own, theirs in zip(found, wanted_inputs, strict=True):
        assert own is theirs is None or torch.equal(own, theirs)
    if needs_grad:
        assert len(added) == 3 * count
        assert len(set(added)) == count


def test_one_graph_can_be_run_whole_and_in_parts() -> None:
    """As captures do: what a run has hung on the graph is gone after it."""
    torch.manual_seed(0)
    module = nn.Sequential(Block(), Block())
    x, grad = torch.randn(2, 4, WIDTH, requires_grad=True), torch.randn(2, 4, WIDTH)
    (3 * module(x)).backward(grad)
    wanted = [p.grad for p in module.parameters()]
    x.grad = None
    module.zero_grad()
    backward, output = StageBackward(products=True), module(x)
    for _ in range(2):
        backward.whole([output], [grad], [x], retain_graph=True)
    _, rest = backward.input_part([output], [grad], [x], retain_graph=True)
    rest.run()
    for parameter, theirs in zip(module.parameters(), wanted, strict=True):
        assert published_difference(parameter.grad, theirs) < 1e-13


@pytest.mark.parametrize("run", [whole, in_parts])
def test_who_listens_is_left_to_autograd(run) -> None:
    module = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)])
    heard = []
    module[1].weight.register_post_accumulate_grad_hook(lambda p: heard.append(1))
    module[2].weight.register_hook(lambda g: 2 * g)
    module[3].weight.grad = torch.zeros(WIDTH, WIDTH).to_sparse()
    backward, added = StageBackward(products=True), []
    backward.added = added.append
    x = torch.randn(3, WIDTH, requires_grad=True)
    run(backward, module(x), torch.ones(3, WIDTH), x)
    assert heard == [1]
    assert added == [module[0].weight]


@pytest.mark.parametrize("needs_grad", [True, False])
def test_vectors_are_left_to_the_input_part(needs_grad: bool) -> None:
    """Then it frees what it has used as it goes, and the weight part is products alone."""
    torch.manual_seed(0)
    module = nn.Sequential(Block(), Block())
    x, grad = torch.randn(2, 4, WIDTH, requires_grad=needs_grad), torch.randn(2, 4, WIDTH)
    module(x).backward(grad)
    wanted = {name: p.grad for name, p in module.named_parameters()}
    x.grad = None
    module.zero_grad()
    output = module(x)
    product = output.grad_fn.next_functions[1][0].next_functions[0][0]
    assert product._saved_self is not None
    _, rest = StageBackward(products=True).input_part([output], [grad], [x])
    assert rest.why is None
    late = {name for name, p in module.named_parameters() if p.grad is None}
    assert late == {f"{block}.{name}.weight" for block in (0, 1) for name in ("wide", "narrow")}
    # The graph has been let go of.
    with pytest.raises(RuntimeError, match="second time"):
        _ = product._saved_self
    rest.run()
    for name, parameter in module.named_parameters():
        assert published_difference(parameter.grad, wanted[name]) < 1e-13


@pytest.mark.parametrize("run", [whole, in_parts])
def test_an_input_that_was_overwritten_is_noticed(run) -> None:
    module = nn.Linear(WIDTH, WIDTH, bias=False)
    x = torch.randn(3, WIDTH, requires_grad=True)
    y = x + 0
    output = module(y)
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="inplace"):
        run(StageBackward(products=True), output, torch.ones(3, WIDTH), x)


@pytest.mark.parametrize("run", [whole, in_parts])
def test_rounds_once(run) -> None:
    """In bfloat16 the sum of many small gradients is better than autograd's."""
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH, bias=False).bfloat16()
    exact = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    pairs = [torch.randn(2, 64, WIDTH).bfloat16() for _ in range(64)]
    errors = {}
    for name in ("autograd", "products"):
        linear.zero_grad()
        backward = StageBackward(products=name == "products")
        for pair in pairs:
            x = pair[0].clone().requires_grad_()
            run(backward, linear(x), pair[1], x)
        errors[name] = linear.weight.grad.double()
    for x, grad in pairs:
        exact += grad.double().T @ x.double()
    distance = {name: (found - exact).norm().item() for name, found in errors.items()}
    assert distance["products"] <= distance["autograd"]


def test_data_parallel_modules_are_left_to_autograd() -> None:
    inner = nn.Linear(2, 2)
    parallel = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(parallel)
    assert hears_gradients(nn.Sequential(inner, parallel))
    assert not hears_gradients(inner)
