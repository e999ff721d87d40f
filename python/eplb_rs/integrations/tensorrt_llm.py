"""What TensorRT-LLM's load balancer for MoE layers reads at its start: YAML, a placement that stays.

>>> from pathlib import Path
>>> import eplb_rs
>>> from eplb_rs.integrations.tensorrt_llm import write_config
>>> topology = eplb_rs.Topology(num_nodes=1, gpus_per_node=2, slots_per_gpu=2)
>>> plan = eplb_rs.Planner(topology).plan([[60, 30, 10]], layer_ids=[3])
>>> write_config(plan, "moe_load_balancer.yaml")
>>> print(Path("moe_load_balancer.yaml").read_text().strip())
num_slots: 4
initial_global_assignments:
  3: [0, 2, 0, 1]
layer_updates_per_iter: 0

Then, in the file for ``--extra_llm_api_options``::

    moe_config:
      load_balancer: moe_load_balancer.yaml
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_rs._files import write_whole
from eplb_rs.integrations.offline import rows_by_layer

if TYPE_CHECKING:
    import os

    from eplb_rs.plan import Plan

__all__ = ["write_config"]


def write_config(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes TensorRT-LLM's file: ``num_slots``, ``initial_global_assignments`` by layer, and
    ``layer_updates_per_iter: 0``, which leaves experts where they are.

    Args:
        plan: Which expert each slot holds; its ``layer_ids`` are the model's.
        path: Where to.

    Raises:
        InvalidInputError: ``inconsistent`` for a plan with slots that hold nothing,
            ``unwritable_file``.
    """
    lines = [f"num_slots: {plan.topology.num_slots}", "initial_global_assignments:"]
    for layer, row in rows_by_layer(plan).items():
        lines.append(f"  {layer}: [{', '.join(map(str, row))}]")
    lines.append("layer_updates_per_iter: 0")
    write_whole(path, ("\n".join(lines) + "\n").encode())
