"""Ranks as launchers start them: interpreters of their own, that share no memory and no address."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")

RANK = """
import numpy as np
import torch
import torch.distributed as dist
import eplb_rs
from eplb_rs.moe import *

dist.init_process_group("gloo")
rank = dist.get_rank()
planner = eplb_rs.Planner(eplb_rs.Topology(1, 2, 3), iterations=50)
plan = planner.plan(np.ones((1, 4)))
fields = [
    ExpertField("gate_up.weight", (4, 8), torch.float32),
    ExpertField("down.weight", (8, 2), torch.float32),
]
weights = ExpertWeights(fields, num_layers=1, num_slots=3)
for tensor in weights[0].values():
    tensor.fill_(1.0)
torch.manual_seed(0)
layer = ExpertParallelMoE(TopKRouter(8, 4, 2), weights[0], plan)
settings = RebalancerSettings(
    window_passes=4, interval_passes=4, outlook=None, cost=MoveCost(
        us_per_token=1e6, intra_node_gb_s=100, inter_node_gb_s=100
    ),
)
loop = Rebalancer(planner, [layer], weights, plan, settings=settings)
for _ in range(16):
    with torch.no_grad():
        layer(torch.ones(6, 8))
    loop.step()
metrics = loop.metrics()
assert (metrics.windows, metrics.plans_failed) == (3, 0)
assert metrics.plans_adopted > 0
print(loop.plan.phy2log.tolist())
dist.destroy_process_group()
"""


def test_the_loop_runs_in_interpreters_of_their_own() -> None:
    """What ranks compare to be sure that they were given the same is the same in each of them."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    store = pytest.importorskip("torch.distributed").TCPStore("127.0.0.1", 0, is_master=True)
    world |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=os.environ | world | {"RANK": str(rank), "PYTHONHASHSEED": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        done = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, done, strict=True):
        assert rank.returncode == 0, errors
    assert done[0][0] == done[1][0] != ""
