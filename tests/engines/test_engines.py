"""The plug-ins in the engines' own modules, called through the engines' own registries.

In an environment of their own (make test-engines): the engines without what they run models with.
Importing an engine takes long, so one process does it, and is forked for each environment that a
test looks at.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

CHOSEN = {"EPLB_RS_POLICY": "balanced", "EPLB_RS_MAX_MOVES": "0.1"}
REPLICAS, RANKS, EXPERTS, LAYERS = 288, 32, 256, 4


def run(program, *environments):
    """What a program's `main()` gives in a process of each environment, and what it writes to
    stderr there."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("EPLB_RS_", "VLLM_"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, program, json.dumps(environments)],
        capture_output=True,
        text=True,
        check=False,
        env=variables | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for _, told, status in found:
        assert status == 0, told
    return [(value, told) for value, told, _ in found]


def load_of(seed):
    generator = torch.Generator().manual_seed(seed)
    load = torch.empty(LAYERS, EXPERTS).log_normal_(0, 1, generator=generator) * 1000
    return load.long()


def moved(old, new):
    """Slots whose expert was not on their rank."""
    old, new = (placement.view(LAYERS, RANKS, -1) for placement in (old, new))
    return int((~(new[..., :, None] == old[..., None, :]).any(-1)).sum())


def vllm_program():
    """Calls vLLM's policy as vLLM does; its maps, for comparison between processes."""
    from vllm.distributed.eplb.eplb_state import compute_logical_maps
    from vllm.distributed.eplb.policy import EPLB_POLICIES, AbstractEplbPolicy
    from vllm.plugins import load_general_plugins

    def main():
        from eplb_rs.integrations import vllm as plugin

        load_general_plugins()
        policy = EPLB_POLICIES["default"]
        if not plugin.is_installed():
            return None
        plugin.register()
        assert EPLB_POLICIES["default"] is policy, "once is enough"
        assert issubclass(policy, AbstractEplbPolicy)
        plans = []

        def plan(load, groups, nodes, old=None, replicas=REPLICAS, ranks=RANKS):
            made = policy.rebalance_experts(load, replicas, groups, nodes, ranks, old)
            assert made.shape == (LAYERS, replicas)
            assert made.dtype == torch.int64
            assert made.device == torch.device("cpu")
            log2phy, counts = compute_logical_maps(made, EXPERTS)
            assert (counts >= 1).all()
            assert (counts.sum(1) == replicas).all()
            assert torch.equal((log2phy >= 0).sum(2), counts)
            plans.append(made.tolist())
            return made

        load, later = load_of(0), load_of(0) + load_of(1) // 4
        for groups, nodes in ((8, 4), (3, 2), (8, 3), (1, 1)):
            first = plan(load, groups, nodes)
        kept = plan(later, 1, 1, first)
        assert 0 < moved(first, kept) <= 0.1 * first.numel()

        # A rank has joined: others keep what they hold.
        joined = torch.cat([kept, torch.full((LAYERS, 9), -1)], dim=1)
        grown = plan(later, 1, 1, joined, REPLICAS + 9, RANKS + 1)
        same = (grown[:, :REPLICAS] == kept).sum() / kept.numel()
        assert same > 0.85, same
        plan(later, 1, 1, torch.full_like(kept, -1))
        plan(later, 1, 1, kept.int())

        # What the planner refuses, vLLM's own policy plans, or refuses in its own way.
        plan(-load, 1, 1)
        with pytest.raises(AssertionError):
            policy.rebalance_experts(load, REPLICAS + 1, 1, 1, RANKS)
        return plans

    return main


def sglang_program():
    """Calls SGLang's planner as SGLang does, by keyword, and dispatches tokens by its maps."""
    from types import SimpleNamespace

    from sglang.srt.eplb import eplb_algorithms, expert_location, expert_location_dispatch
    from sglang.srt.plugins import load_plugins

    exec_config = SimpleNamespace(moe=SimpleNamespace(ep_dispatch_algorithm="dynamic"))

    def main():
        from eplb_rs.integrations import sglang as plugin
        from sglang.srt import runtime_context

        dispatch = os.environ.get("TEST_DISPATCH", "dynamic")
        exec_config.moe.ep_dispatch_algorithm = dispatch
        for module in (runtime_context, expert_location):
            module.get_exec = lambda: exec_config
        load_plugins()
        plans = []

        def plan(load):
            phy2log, log2phy, counts = eplb_algorithms.rebalance_experts(
                tokens_per_expert=torch.stack([load, load]),
                num_physical_experts=REPLICAS,
                num_local_physical_experts=REPLICAS // RANKS,
                num_groups=8,
                num_nodes=4,
                algorithm=eplb_algorithms.EplbAlgorithm.deepseek_hierarchical,
            )
            assert phy2log.shape == (LAYERS, REPLICAS)
            assert counts.shape == (LAYERS, EXPERTS)
            assert torch.equal((log2phy >= 0).sum(-1), counts)
            assert (counts >= 1).all()
            for layer in range(LAYERS):
                listed = log2phy[layer] >= 0
                expert = torch.arange(EXPERTS)[:, None].expand_as(listed)[listed]
                assert torch.equal(phy2log[layer, log2phy[layer][listed]], expert)
            # Its own checks, and the padding to its own width.
            made = expert_location.ExpertLocationMetadata(
                physical_to_logical_map=phy2log,
                physical_to_logical_map_cpu=phy2log.cpu(),
                logical_to_all_physical_map=torch.nn.functional.pad(
                    log2phy, (0, REPLICAS - log2phy.shape[-1]), value=-1
                ),
                logical_to_all_physical_map_cpu=log2phy.cpu(),
                logical_to_all_physical_map_num_valid=counts,
                ep_size=RANKS,
                logical_to_rank_dispatch_physical_map=None,
            )
            expert_location.set_global_expert_location_metadata(made, allow_overwrite=True)
            plans.append(phy2log.tolist())
            return made

        def dispatched(made, load):
            """The largest rank load over the mean, as SGLang's dispatch splits tokens."""
            worst = []
            for layer in range(LAYERS):
                tokens = torch.repeat_interleave(torch.arange(EXPERTS), load[layer])
                tokens = tokens[torch.randperm(len(tokens))][:, None]
                info = expert_location_dispatch.ExpertLocationDispatchInfo(
                    ep_dispatch_algorithm="dynamic",
                    partial_logical_to_rank_dispatch_physical_map=None,
                    partial_logical_to_all_physical_map=made.logical_to_all_physical_map[layer],
                    partial_logical_to_all_physical_map_num_valid=(
                        made.logical_to_all_physical_map_num_valid[layer]
                    ),
                    num_physical_experts=REPLICAS,
                )
                slots = expert_location_dispatch.topk_ids_logical_to_physical(tokens, info)
                assert torch.equal(made.physical_to_logical_map[layer][slots], tokens)
                ranks = torch.bincount(slots.flatten() // (REPLICAS // RANKS), minlength=RANKS)
                worst.append(float(ranks.max() / ranks.double().mean()))
            return worst

        first = plan(load_of(0))
        second = plan(load_of(0) + load_of(1) // 4)
        maps = first.physical_to_logical_map, second.physical_to_logical_map
        entries = int(second.logical_to_all_physical_map_num_valid.sum())
        plan(-load_of(0))  # refused: SGLang's own planner answers
        return {
            "installed": plugin.is_installed(),
            "plans": plans,
            "entries": entries,
            "moved": moved(*maps) if plugin.is_installed() else None,
            "worst": dispatched(second, load_of(0) + load_of(1) // 4),
        }

    return main


def test_vllm():
    pytest.importorskip("vllm")
    (mine, told), (again, _), (nothing, quiet), (_, warned) = run(
        "vllm_program", CHOSEN, CHOSEN, {}, {"EPLB_RS_MAX_MOVES": "0.1"}
    )
    assert mine is not None, told
    assert mine == again, "all ranks must come to the same plan"
    assert "vLLM plans with eplb-rs" in told
    assert "experts move" in told
    assert told.count("the engine's own policy does instead") == 2, "one for each refusal"
    assert nothing is None, "inactive unless the environment asks for it"
    assert "eplb" not in quiet.lower()
    assert "of no effect" in warned


def test_vllm_does_not_start_with_a_wrong_setting():
    pytest.importorskip("vllm")
    with pytest.raises(AssertionError, match=r"EPLB_RS_POLICY.*best"):
        run("vllm_program", {"EPLB_RS_POLICY": "best"})


def test_sglang():
    pytest.importorskip("sglang")
    still = CHOSEN | {"EPLB_RS_MAX_MOVES": "0"}
    shares = still | {"EPLB_RS_SHARES": "16"}
    (
        (mine, told),
        (again, _),
        (theirs, _),
        (even, _),
        (split, _),
        (static, warned),
        (wrong, loud),
    ) = run(
        "sglang_program",
        CHOSEN,
        CHOSEN,
        {},
        still,
        shares,
        shares | {"TEST_DISPATCH": "static"},
        {"EPLB_RS_POLICY": "best"},
    )
    assert mine["installed"]
    assert mine["plans"] == again["plans"], "all ranks must come to the same plan"
    assert not theirs["installed"]
    assert mine["plans"][:2] != theirs["plans"][:2]
    assert 0 < mine["moved"] <= 0.1 * LAYERS * REPLICAS
    assert told.count("the engine's own policy does instead") == 1
    assert mine["entries"] == LAYERS * REPLICAS
    assert even["moved"] == split["moved"] == 0
    assert split["entries"] > even["entries"], "some slots are listed more than once"
    gains = [before - after for before, after in zip(even["worst"], split["worst"], strict=True)]
    assert min(gains) >= 0
    assert max(gains) > 0.02, "weighted entries are weighted routing"
    assert static["entries"] == mine["entries"]
    assert "needs --ep-dispatch-algorithm dynamic" in warned
    assert not wrong["installed"]
    assert "EPLB_RS_POLICY" in loud, "SGLang logs it, and goes on"


def fork(main, environment, folder):
    """Runs `main()` in a fork; what it returned, what it wrote to stderr, and how it ended."""
    found, told = (Path(folder) / name for name in ("found", "told"))
    child = os.fork()
    if not child:
        os.dup2(os.open(told, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
        os.dup2(2, 1)
        os.environ.update(environment)
        status = 1
        try:
            import logging

            logging.basicConfig(level=logging.INFO)
            torch.manual_seed(0)
            found.write_text(json.dumps(main()))
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    _, status = os.waitpid(child, 0)
    value = json.loads(found.read_text()) if status == 0 else None
    text = told.read_text(errors="replace")
    found.unlink(missing_ok=True)
    told.unlink()
    return value, text, status


if __name__ == "__main__":
    made = globals()[sys.argv[1]]()
    with tempfile.TemporaryDirectory() as scratch:
        for one in json.loads(sys.argv[2]):
            sys.stdout.write(json.dumps(fork(made, one, scratch)) + "\n")
