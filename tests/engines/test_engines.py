"""The plug-ins in the engines' own modules, called through the engines' own registries.

In an environment of their own (make test-engines): the engines without what they run models with.
"""

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

CHOSEN = {"EPLB_RS_POLICY": "balanced", "EPLB_RS_MAX_MOVES": "0.1"}
REPLICAS, RANKS, EXPERTS, LAYERS = 288, 32, 256, 4


def run(code, **environment):
    """Runs a program in a fresh process, as an engine's would be."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("EPLB_RS_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=variables | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()


LOADS = f"""
import numpy as np, torch
rng = np.random.default_rng(0)
load = torch.from_numpy(np.round(rng.lognormal(0, 1, ({LAYERS}, {EXPERTS})) * 1000)).long()
"""

VLLM = (
    LOADS
    + f"""
from eplb_rs.integrations import vllm as plugin
plugin.register(); plugin.register()
from vllm.distributed.eplb.policy import EPLB_POLICIES, AbstractEplbPolicy
policy = EPLB_POLICIES["default"]
assert issubclass(policy, AbstractEplbPolicy)
assert plugin.is_installed()
first = policy.rebalance_experts(load, {REPLICAS}, 8, 4, {RANKS})
for groups, nodes in ((8, 4), (1, 1), (3, 2), (8, 3)):
    made = policy.rebalance_experts(load, {REPLICAS}, groups, nodes, {RANKS})
    assert made.shape == ({LAYERS}, {REPLICAS}) and made.dtype == torch.int64
    assert made.device.type == "cpu"
    assert all(len(set(row.tolist())) == {EXPERTS} for row in made)
later = (load * torch.from_numpy(rng.lognormal(0, 0.1, load.shape))).long()
kept = policy.rebalance_experts(later, {REPLICAS}, 1, 1, {RANKS}, made := policy.rebalance_experts(
    load, {REPLICAS}, 1, 1, {RANKS}))
moved = 0
for old, new in zip(made.view(-1, 9).tolist(), kept.view(-1, 9).tolist()):
    moved += len(set(new) - set(old))
    assert all(a == b for a, b in zip(old, new) if a in new and old.count(a) == 1 and b in old)
assert 0 < moved <= 0.1 * made.numel(), moved
elastic = torch.cat([made, torch.full(({LAYERS}, 9), -1)], 1)
grown = policy.rebalance_experts(load, {REPLICAS} + 9, 1, 1, {RANKS} + 1, elastic)
assert grown.shape == ({LAYERS}, {REPLICAS} + 9)
assert (grown >= 0).all()
again = policy.rebalance_experts(load, {REPLICAS}, 8, 4, {RANKS})
assert torch.equal(first, again)
print(hash(tuple(kept.flatten().tolist())))
"""
)


def test_vllm_calls_the_policy():
    pytest.importorskip("vllm")
    assert run(VLLM, **CHOSEN) == run(VLLM, **CHOSEN), "all ranks must come to the same plan"


def test_vllm_loads_plug_ins_by_their_entry_point():
    pytest.importorskip("vllm")
    code = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from eplb_rs.integrations import vllm
print(vllm.is_installed())
"""
    assert run(code, **CHOSEN)[-1] == "True"
    assert run(code)[-1] == "False"


SGLANG = (
    LOADS
    + f"""
from sglang.srt.plugins import load_plugins
load_plugins()
from eplb_rs.integrations import sglang as plugin
from sglang.srt.eplb import eplb_algorithms
from sglang.srt.eplb.eplb_algorithms import EplbAlgorithm
steps = torch.stack([load, load])
def plan(**others):
    return eplb_algorithms.rebalance_experts(
        tokens_per_expert=steps, num_physical_experts={REPLICAS},
        num_local_physical_experts={REPLICAS // RANKS}, num_groups=8, num_nodes=4,
        algorithm=EplbAlgorithm.deepseek_hierarchical, **others)
phy2log, log2phy, counts = plan()
assert phy2log.shape == ({LAYERS}, {REPLICAS}) and counts.shape == ({LAYERS}, {EXPERTS})
assert torch.equal((log2phy >= 0).sum(-1), counts)
for layer in range({LAYERS}):
    for expert in range({EXPERTS}):
        slots = log2phy[layer, expert, : counts[layer, expert]]
        assert (phy2log[layer, slots] == expert).all() and len(slots) > 0
print(plugin.is_installed(), int(counts.sum()), hash(tuple(phy2log.flatten().tolist())))
"""
)


def test_sglang_calls_the_planner():
    pytest.importorskip("sglang")
    mine, again, theirs = (
        run(SGLANG, **environment)[-1].split() for environment in (CHOSEN, CHOSEN, {})
    )
    assert mine == again
    assert mine[0] == "True"
    assert theirs[0] == "False"
    assert mine[2] != theirs[2]
    assert int(mine[1]) == LAYERS * REPLICAS


def test_sglang_with_shares():
    pytest.importorskip("sglang")
    found = run(SGLANG, **CHOSEN, EPLB_RS_SHARES="8")[-1].split()
    assert int(found[1]) > LAYERS * REPLICAS, "some slots are listed more than once"
