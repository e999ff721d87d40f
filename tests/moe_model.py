"""Three MoE layers on this rank, and the same experts on one process to compare them with."""

import eplb_rs
import numpy as np
import torch
from eplb_rs.moe import ExpertParallelMoE, ExpertWeights, TopK

LAYERS, EXPERTS, TOP_K, HIDDEN, INTER = 3, 12, 3, 16, 8
TOPOLOGY = eplb_rs.Topology(2, 2, 5)
SLOTS = 5


class Chosen(torch.nn.Module):
    """A router that chooses what it is told."""

    def forward(self, x):
        del x
        return self.choice


def random_plan(seed):
    load = np.random.default_rng(seed).lognormal(0, 1.2, (LAYERS, EXPERTS))
    return eplb_rs.Planner(TOPOLOGY, policy="balanced").plan(load)


def crowded_plan(seed):
    """Each rank holds three experts, two of them twice."""
    rng = np.random.default_rng(seed)
    rows = [
        rng.permutation(EXPERTS).reshape(4, 3)[:, [0, 1, 2, 0, 2]].ravel() for _ in range(LAYERS)
    ]
    return eplb_rs.Plan.from_phy2log(TOPOLOGY, rows, np.ones((LAYERS, EXPERTS)))


def draw(generator, exact, *shape):
    if exact:
        keep = torch.rand(*shape, generator=generator) < 0.4
        return torch.randint(-1, 2, shape, generator=generator).float() * keep
    return torch.randn(*shape, generator=generator) / 4


def whole_weights(exact):
    generator = torch.Generator().manual_seed(1)
    gate_up = draw(generator, exact, LAYERS, EXPERTS, 2 * INTER, HIDDEN)
    return gate_up, draw(generator, exact, LAYERS, EXPERTS, HIDDEN, INTER)


def inputs(exact, seed):
    """Tokens, gates, experts and the gradient of the output, of one rank and pass."""
    generator = torch.Generator().manual_seed(seed)
    tokens = int(torch.randint(0, 30, (), generator=generator))
    x = draw(generator, exact, tokens, HIDDEN)
    gates = torch.rand(LAYERS, tokens, TOP_K, generator=generator)
    if exact:
        gates = 2.0 ** torch.randint(0, 2, gates.shape, generator=generator)
    ids = torch.rand(LAYERS, tokens, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K]
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.05, -1)
    return x, gates, ids, draw(generator, exact, tokens, HIDDEN)


def between(h, y, exact):
    """What stands between layers; clipped, so that whole numbers stay small enough to be exact."""
    return torch.clamp(h + y, -2, 2) if exact else h + y


def reference(exact, x, gates, ids, gate_up, down):
    """The same experts on one process, expert by expert."""
    activate = torch.relu if exact else torch.nn.functional.silu
    h = x
    for layer in range(LAYERS):
        y = None
        for k in range(TOP_K):
            part = torch.zeros_like(h)
            for expert in range(EXPERTS):
                (chosen,) = torch.nonzero(ids[layer, :, k] == expert, as_tuple=True)
                if not len(chosen):
                    continue
                rows = h[chosen]
                if not exact:
                    rows = torch.cat([rows, rows.new_zeros(-len(rows) % 16, HIDDEN)])
                gate, up = (rows @ gate_up[layer, expert].T).chunk(2, 1)
                out = ((activate(gate) * up) @ down[layer, expert].T)[: len(chosen)]
                part = part.index_put((chosen,), out)
            part = part * gates[layer, :, k : k + 1]
            y = part if y is None else y + part
        h = between(h, y, exact)
    return h


class Model:
    """Three layers on this rank."""

    def __init__(self, rank, exact, plan, **options):
        held = [
            torch.from_numpy(plan.phy2log[layer, rank * SLOTS : (rank + 1) * SLOTS].copy())
            for layer in range(LAYERS)
        ]
        gate_up, down = whole_weights(exact)
        self.weights = ExpertWeights.adopt(
            [
                {"gate_up.weight": gate_up[layer][mine], "down.weight": down[layer][mine]}
                for layer, mine in enumerate(held)
            ]
        )
        self.exact = exact
        self.layers = [
            ExpertParallelMoE(
                Chosen(),
                self.weights[layer],
                plan,
                layer=layer,
                activation="relu" if exact else "silu",
                row_multiple=1 if exact else 16,
                **options,
            )
            for layer in range(LAYERS)
        ]

    def __call__(self, x, gates, ids):
        h = x
        for layer, gate, chosen in zip(self.layers, gates, ids, strict=True):
            layer.router.choice = TopK(gate, chosen)
            h = between(h, layer(h), self.exact)
        return h

    def gradients(self):
        return [{"gate_up": layer.gate_up.grad, "down": layer.down.grad} for layer in self.layers]

    def forget(self):
        for layer in self.layers:
            layer.gate_up.grad = layer.down.grad = None
