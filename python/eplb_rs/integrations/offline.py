"""The map that SGLang reads at its start: JSON, the expert in each slot of each layer.

>>> from pathlib import Path
>>> import eplb_rs
>>> from eplb_rs.integrations.offline import write_map
>>> topology = eplb_rs.Topology(num_nodes=1, gpus_per_node=2, slots_per_gpu=2)
>>> plan = eplb_rs.Planner(topology).plan([[60, 30, 10]], layer_ids=[1])
>>> write_map(plan, "map.json")
>>> print(Path("map.json").read_text().strip())
{"physical_to_logical_map": [[0, 1, 2, 0], [0, 2, 0, 1]]}

Then: ``python -m sglang.launch_server --init-expert-location map.json ...``
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from eplb_rs._files import write_whole
from eplb_rs.errors import InvalidInputError

if TYPE_CHECKING:
    import os

    from eplb_rs.plan import Plan

__all__ = ["rows_by_layer", "write_map"]


def write_map(plan: Plan, path: str | os.PathLike[str], *, num_layers: int | None = None) -> None:
    """Writes what SGLang's ``--init-expert-location`` reads.

    SGLang's maps have a row for every layer of the model. Layers without experts, those that the
    plan's ``layer_ids`` leave out, get a trivial one.

    Args:
        plan: Which expert each slot holds.
        path: Where to.
        num_layers: Of the model; by default up to the last that has experts.

    Raises:
        InvalidInputError: ``too_small`` for fewer layers than the plan has, ``inconsistent`` for a
            plan with slots that hold nothing, ``unwritable_file``.
    """
    rows = rows_by_layer(plan)
    least = max(rows) + 1
    if num_layers is not None and num_layers < least:
        raise InvalidInputError(
            code="too_small",
            argument="num_layers",
            got=str(num_layers),
            expected=f"at least {least}: the last layer with experts is {least - 1}",
        )
    trivial = [slot % plan.num_experts for slot in range(plan.topology.num_slots)]
    table = [rows.get(layer, trivial) for layer in range(num_layers or least)]
    write_whole(path, (json.dumps({"physical_to_logical_map": table}) + "\n").encode())


def rows_by_layer(plan: Plan) -> dict[int, list[int]]:
    """The expert in each slot, by the number of the layer in the model.

    Raises:
        InvalidInputError: ``inconsistent`` for a plan with slots that hold nothing: engines start
            on whole ranks.
    """
    if (plan.phy2log < 0).any():
        dead = plan.topology.dead
        raise InvalidInputError(
            code="inconsistent",
            argument="plan",
            got=f"a plan in which ranks {dead} are dead" if dead else "a plan with empty slots",
            expected="one in which every slot holds an expert",
            hint="plan for the ranks that the engine is to start on",
        )
    return dict(zip(plan.layer_ids, plan.phy2log.tolist(), strict=True))
