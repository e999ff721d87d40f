"""The maps that engines read at their start."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from eplb_rs._files import write_whole

if TYPE_CHECKING:
    import os

    from eplb_rs.plan import Plan

__all__ = ["write_sglang_map", "write_tensorrt_llm_config"]


def write_sglang_map(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes what SGLang's ``--init-expert-location`` reads: JSON, the expert in each slot.

    SGLang's maps have a row for every layer of the model. Layers without experts, those that the
    plan's ``layer_ids`` leave out, get a trivial one.

    Raises:
        InvalidInputError: ``unwritable_file``.
    """
    rows = dict(zip(plan.layer_ids, plan.phy2log.tolist(), strict=True))
    slots = plan.topology.num_slots
    trivial = [slot % plan.num_experts for slot in range(slots)]
    table = [rows.get(layer, trivial) for layer in range(max(plan.layer_ids) + 1)]
    write_whole(path, (json.dumps({"physical_to_logical_map": table}) + "\n").encode())


def write_tensorrt_llm_config(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes what TensorRT-LLM's MoE load balancer reads: YAML, a placement that stays.

    Raises:
        InvalidInputError: ``unwritable_file``.
    """
    lines = [f"num_slots: {plan.topology.num_slots}", "initial_global_assignments:"]
    for layer, row in zip(plan.layer_ids, plan.phy2log.tolist(), strict=True):
        lines.append(f"  {layer}: [{', '.join(map(str, row))}]")
    lines.append("layer_updates_per_iter: 0")
    write_whole(path, ("\n".join(lines) + "\n").encode())
