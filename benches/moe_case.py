"""What is timed in `moe_layer.py`: DeepSeek-V3's experts on two ranks, and their right answers."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import eplb_rs
import measuring
import numpy as np
import torch
import torch.distributed as dist
from eplb_rs.moe import ExpertField, ExpertParallelMoE, ExpertWeights, TopK, predicted_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

RANKS = 2
MIB = 1 << 20


@dataclass(frozen=True)
class Sizes:
    hidden: int = 7168
    intermediate: int = 2048
    experts: int = 256
    top_k: int = 8
    tokens: int = 8192
    spare: int = 16
    message: int = 256 * MIB
    layers: int = 8
    """Into which the move of many layers divides the experts."""


FULL = Sizes()
TINY = Sizes(64, 32, 256, 8, 512, 16, MIB)


class Rank:
    """One process, its device and its clock."""

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self.rank, self.size = rank, size
        self.device, backend = torch.device("cpu"), "gloo"
        if torch.cuda.is_available():
            self.device, backend = torch.device("cuda", rank), "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(self.device)
        store = f"file://{folder}/store"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=size)
        self._side = dist.new_group(backend="gloo")

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def gathered(self, value: Any) -> list[Any]:
        """What every rank gives."""
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value, group=self._side)
        return every

    def timed(self, work: Callable[..., object], *args: Any) -> float:
        """Milliseconds from a common start to the end of the last rank."""
        self.wait()
        start = max(self.gathered(time.perf_counter())) + 1e-3
        while time.perf_counter() < start:
            pass
        work(*args)
        self.wait()
        return 1e3 * (max(self.gathered(time.perf_counter())) - start)


class Told(torch.nn.Module):
    """A router that chooses what it is told."""

    choice: TopK

    def forward(self, x: Tensor) -> TopK:
        del x
        return self.choice


def drawn(load: Any, sizes: Sizes, seed: int, device: torch.device) -> Tensor:
    """`[T, K]`, different experts for each token, each with a probability of K times its share.

    All experts in random order on a line, each as long as its probability; K points a unit apart.
    """
    generator = torch.Generator(device).manual_seed(seed)
    chance = torch.as_tensor(np.asarray(load, dtype=np.float64), device=device)
    chance = chance * (sizes.top_k / chance.sum())
    assert float(chance.max()) <= 1, "an expert is chosen once by a token"
    shape = (sizes.tokens, sizes.experts)
    order = torch.rand(shape, generator=generator, device=device).argsort(-1)
    line = chance[order].cumsum(-1)
    first = torch.rand((sizes.tokens, 1), generator=generator, device=device, dtype=torch.float64)
    points = first + torch.arange(sizes.top_k, device=device)
    place = torch.searchsorted(line, points, right=True).clamp_(max=sizes.experts - 1)
    chosen = order.gather(1, place)
    ordered = chosen.sort(-1).values
    assert bool((ordered[:, 1:] != ordered[:, :-1]).all())
    return chosen


@dataclass
class Experts:
    """The true weights: an expert's come from its number."""

    sizes: Sizes
    device: torch.device
    fields: list[ExpertField] = field(init=False)

    def __post_init__(self) -> None:
        hidden, inner = self.sizes.hidden, self.sizes.intermediate
        self.fields = [
            ExpertField("gate_up.weight", (2 * inner, hidden), torch.bfloat16),
            ExpertField("down.weight", (hidden, inner), torch.bfloat16),
        ]

    def of(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator(self.device).manual_seed(number)
        return {
            kind.name: torch.randn(
                kind.shape, generator=generator, device=self.device, dtype=torch.bfloat16
            )
            * kind.shape[1] ** -0.5
            for kind in self.fields
        }

    def _by_number(
        self, weights: ExpertWeights, phy2log: Any, rank: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each place on this rank, and what belongs there."""
        places: dict[int, list[tuple[int, int]]] = {}
        slots = weights.num_slots
        for layer, row in enumerate(phy2log):
            for slot, number in enumerate(row[rank * slots : (rank + 1) * slots].tolist()):
                places.setdefault(number, []).append((layer, slot))
        for number, held in places.items():
            right = self.of(number)
            for layer, slot in held:
                for name, part in weights.slot(layer, slot).items():
                    yield number, part, right[name]

    def fill(self, weights: ExpertWeights, phy2log: Any, rank: int) -> None:
        for _, part, right in self._by_number(weights, phy2log, rank):
            part.copy_(right)

    def check(self, weights: ExpertWeights, phy2log: Any, rank: int) -> None:
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        for _, part, right in self._by_number(weights, phy2log, rank):
            wrong += (part != right).sum()
        assert int(wrong) == 0, f"{int(wrong)} numbers of experts are wrong"


@dataclass
class Case:
    """A layer and what its router chooses."""

    layer: ExpertParallelMoE
    plan: eplb_rs.Plan
    """Of the one layer."""
    expert_TK: Tensor
    gate_TK: Tensor
    x: Tensor
    grad: Tensor

    def step(self) -> Tensor:
        """Forward and backward from no gradients."""
        self.x.grad = self.gate_TK.grad = None
        self.layer.gate_up.grad = self.layer.down.grad = None
        self.layer.router.choice = TopK(self.gate_TK, self.expert_TK)
        out: Tensor = self.layer(self.x)
        out.backward(self.grad)
        return out

    def forward(self) -> Tensor:
        self.layer.router.choice = TopK(self.gate_TK, self.expert_TK)
        with torch.no_grad():
            out: Tensor = self.layer(self.x)
        return out

    def forget(self) -> None:
        self.layer.gate_up.grad = self.layer.down.grad = None


def check(rank: Rank, case: Case, experts: Experts) -> dict[str, Any]:
    """Compares a step with what was predicted and with a direct computation."""
    sizes, layer = experts.sizes, case.layer
    slots = layer.sites.num_slots
    counts = torch.stack(rank.gathered(case.expert_TK.flatten().cpu().bincount(
        minlength=sizes.experts)))[None].numpy()  # fmt: skip
    predicted = predicted_tokens(case.plan, counts)[0].reshape(RANKS, slots)
    with torch.no_grad():
        made = layer.begin(case.x, case.gate_TK, case.expert_TK)
    assert made.rows_by_slot.tolist() == predicted[rank.rank].tolist(), "rows as predicted"
    out = case.step()

    def apart(got: Tensor, wanted: Tensor) -> float:
        return float((got.float() - wanted).norm() / wanted.norm())

    # A few tokens through their experts, one after the other.
    tokens = torch.arange(8, device=rank.device) * (sizes.tokens // 8)
    x = case.x.detach()[tokens].float().requires_grad_()
    gates = case.gate_TK.detach()[tokens].float().requires_grad_()
    wanted = torch.zeros_like(x)
    for number in case.expert_TK[tokens].unique().tolist():
        own = {name: part.float() for name, part in experts.of(number).items()}
        t, k = torch.nonzero(case.expert_TK[tokens] == number, as_tuple=True)
        gate, up = (x[t] @ own["gate_up.weight"].T).chunk(2, 1)
        rows = (torch.nn.functional.silu(gate) * up) @ own["down.weight"].T
        wanted = wanted.index_add(0, t, rows * gates[t, k, None])
    wanted.backward(case.grad[tokens].float())
    assert case.x.grad is not None
    assert x.grad is not None
    found = {
        "outputs": apart(out.detach()[tokens], wanted.detach()),
        "gradients of tokens": apart(case.x.grad[tokens], x.grad),
        "gradients of gates": apart(case.gate_TK.grad[tokens], gates.grad),
    }
    # An expert that this rank holds alone, and all rows that came to it.
    first = np.where(case.plan.logcnt[0] == 1, case.plan.log2phy[0, :, 0] // slots, -1)
    far = np.where(first == rank.rank, np.abs(counts[0].sum(axis=0) - 500), np.inf)
    number = int(far.argmin())
    rows_of = []
    for asked in rank.gathered(number):
        t, k = torch.nonzero(case.expert_TK == asked, as_tuple=True)
        rows_of.append([p.cpu() for p in (case.x.detach()[t], case.grad[t], case.gate_TK[t, k])])
    given = [
        torch.cat([theirs[rank.rank][part] for theirs in rank.gathered(rows_of)])
        for part in range(3)
    ]
    rows, grads, gates_of = (part.to(rank.device).float() for part in given)
    own = {n: part.float().requires_grad_() for n, part in experts.of(number).items()}
    gate, up = (rows @ own["gate_up.weight"].T).chunk(2, 1)
    result = (torch.nn.functional.silu(gate) * up) @ own["down.weight"].T
    result.backward(grads * gates_of[:, None])
    slot = int(case.plan.log2phy[0, number, 0]) - rank.rank * slots
    for name, parameter in (("gate_up", layer.gate_up), ("down", layer.down)):
        assert parameter.grad is not None
        grad = own[f"{name}.weight"].grad
        assert grad is not None
        found[f"gradients of {name}"] = apart(parameter.grad[slot], grad)
    assert max(found.values()) < 0.03, found
    case.forget()
    return {
        "rows": predicted.sum(axis=1).tolist(),
        "max/mean of rows": round(float(predicted.sum(1).max() / predicted.sum(1).mean()), 4),
        "largest of a slot": int(predicted.max()),
        "relative errors": {name: float(f"{value:.2g}") for name, value in found.items()},
    }


def two_loads(sizes: Sizes) -> tuple[Any, dict[str, int], dict[str, float]]:
    """An even load and those of two layers, `[3, E]`; which layers; their max/mean on two ranks."""
    loads = measuring.deepseek_r1().astype(np.float64)
    by_rank = loads.reshape(len(loads), RANKS, -1).sum(axis=2)
    imbalance = by_rank.max(axis=1) / by_rank.mean(axis=1)
    order = np.argsort(imbalance, kind="stable")
    chosen = {"worst": int(order[-1]), "median": int(order[len(order) // 2])}
    even = np.ones(sizes.experts)
    return (
        np.stack([even, *(loads[n] for n in chosen.values())]),
        chosen,
        {name: round(float(imbalance[n]), 4) for name, n in chosen.items()},
    )


def make_case(
    weights: Mapping[str, Tensor],
    plan: eplb_rs.Plan,
    expert_TK: Tensor,
    sizes: Sizes,
    rank: Rank,
    **options: Any,
) -> Case:
    """A layer of these weights under a plan of one layer, with choices and random tokens."""
    generator = torch.Generator(rank.device).manual_seed(100 + rank.rank)
    shape = len(expert_TK), sizes.hidden

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=rank.device, dtype=torch.bfloat16)

    gates = torch.rand(expert_TK.shape, generator=generator, device=rank.device)
    gates = (gates / gates.sum(-1, keepdim=True)).bfloat16().requires_grad_()
    layer = ExpertParallelMoE(Told(), weights, plan, **options)
    return Case(layer, plan, expert_TK, gates, normal().requires_grad_(), normal())


def captured(case: Case, plain: Case) -> torch.cuda.CUDAGraph:
    """A step in a CUDA graph, which has to find what a plain step of the other case finds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            case.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.step()
    graph.replay()
    case.layer.raise_on_overflow()
    assert torch.equal(out, plain.step())
    assert plain.x.grad is not None
    assert torch.equal(case.x.grad, plain.x.grad)
    assert torch.equal(case.layer.down.grad, plain.layer.down.grad)
    return graph


def summary(times: list[float]) -> dict[str, Any]:
    """Of milliseconds."""
    found = measuring.quantiles(1e3 * t for t in times)
    return {
        "passes": found["calls"],
        **{f"{k[:-3]} ms": round(found[k] / 1e3, 3) for k in ("best_us", "median_us", "p99_us")},
        "max ms": round(max(times), 3),
    }


def ratio(times: list[float], to: list[float]) -> list[float]:
    """Quartiles of the ratios."""
    ratios = [a / b for a, b in zip(times, to, strict=True)]
    return [round(q, 4) for q in statistics.quantiles(ratios, n=4, method="inclusive")]


def gpus() -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__}
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


class Bench:
    """What all parts share: the plans, the weights and the cases."""

    def __init__(self, rank: Rank, sizes: Sizes, rounds: int, *, fused: bool | None) -> None:
        self.rank, self.sizes, self.rounds, self.fused = rank, sizes, rounds, fused
        self.experts = Experts(sizes, rank.device)
        self.loads, self.chosen, self.imbalance = two_loads(sizes)
        slots = sizes.experts // RANKS
        in_order = np.tile(np.arange(sizes.experts), (3, 1))
        self.old = eplb_rs.Plan.from_phy2log(
            eplb_rs.Topology(1, RANKS, slots), in_order, self.loads
        )
        self.new = eplb_rs.Planner(self.old.topology).plan(self.loads, previous=self.old)
        self.new = eplb_rs.Plan.from_phy2log(
            self.old.topology, np.stack([in_order[0], *self.new.phy2log[1:]]), self.loads
        )
        self.weights = ExpertWeights(
            self.experts.fields, num_layers=3, num_slots=slots, device=rank.device
        )
        self.experts.fill(self.weights, in_order, rank.rank)
        self.ideal = self.case(0, self.weights, self.old, self.loads[0])

    def case(
        self, layer: int, weights: ExpertWeights, plan: eplb_rs.Plan, load: Any, **options: Any
    ) -> Case:
        one = eplb_rs.Plan.from_phy2log(
            plan.topology, plan.phy2log[layer : layer + 1], plan.expert_load[layer : layer + 1]
        )
        chosen = drawn(load, self.sizes, self.rank.rank, self.rank.device)
        options = {"fused": self.fused, **options}
        return make_case(weights[layer], one, chosen, self.sizes, self.rank, **options)
