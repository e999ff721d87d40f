"""Plans as JSON: what is written, and what is read back after all of it has been checked.

Letters: L layers, E logical experts, R slots.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eplb_rs import _core
from eplb_rs._inputs import as_count, as_load, as_slots
from eplb_rs.errors import InvalidInputError

if TYPE_CHECKING:
    import os

    from eplb_rs._inputs import Load
    from eplb_rs.plan import Plan

_FORMAT = "eplb-rs plan"
_FORMAT_VERSION = 1
_GROUP_RULES = ("strict", "priced", "free")


def text_of(plan: Plan) -> str:
    """A plan as JSON, one line per layer and array."""
    topology = plan.topology
    counts = plan.logcnt.tolist()
    slots = [
        [row[:count] for row, count in zip(rows, layer_counts, strict=True)]
        for rows, layer_counts in zip(plan.log2phy.tolist(), counts, strict=True)
    ]
    fields: dict[str, Any] = {
        "format": _FORMAT,
        "version": _FORMAT_VERSION,
        "topology": {
            "num_nodes": topology.num_nodes,
            "gpus_per_node": topology.gpus_per_node,
            "slots_per_gpu": topology.slots_per_gpu,
            **_differences(topology),
        },
        "num_groups": plan._num_groups,
        "policy": plan._policy,
        "group_rule": plan._group_rule,
        "layer_ids": list(plan._layer_ids),
        "phy2log": plan.phy2log.tolist(),
        "log2phy": slots,
        "expert_load": [_numbers(row) for row in plan._expert_load],
    }
    return "{\n" + ",\n".join(_field(name, value) for name, value in fields.items()) + "\n}\n"


def parsed(text: str) -> tuple[_core.Placement, Load, int, str, Any, str]:
    """Placement, load, number of groups, policy, layer numbers and rule for groups in such a text."""
    if not isinstance(text, str | bytes):
        raise _not_a_plan("wrong_type", type(text).__name__, "text", argument="text")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_a_plan("not_json", str(error)) from None
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        raise _not_a_plan("wrong_format", "JSON of another kind")
    if fields.get("version") != _FORMAT_VERSION:
        raise _not_a_plan("wrong_format", f"version {fields.get('version')!r}")
    try:
        topology = _core.Topology(**fields["topology"])
        expert_load = as_load(fields["expert_load"], "expert_load")
        num_layers, num_experts = expert_load.shape
        slots = as_slots(fields["phy2log"], (num_layers, topology.num_slots))
        log2phy, logcnt = _padded(fields["log2phy"], expert_load.shape, live_slots(topology))
        num_groups = checked_groups(fields["num_groups"], num_experts)
        policy, layer_ids = fields["policy"], fields["layer_ids"]
        group_rule = fields.get("group_rule", "free")
        if group_rule not in _GROUP_RULES:
            raise ValueError(f"group_rule {group_rule!r}")
    except InvalidInputError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _not_a_plan("wrong_format", f"a field that does not fit: {error!r}") from None
    placement = _core.Placement(
        topology, num_experts, slots.ravel(), log2phy.ravel(), logcnt.ravel()
    )
    try:
        placement.rank_load(expert_load)  # refuses what is no load
    except InvalidInputError as error:
        raise error.renamed("expert_load") from None
    return placement, expert_load, num_groups, policy, layer_ids, group_rule


def read(path: str | os.PathLike[str]) -> str:
    """The text in a file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _not_a_plan("missing_file", str(path), "a file that exists") from None
    except TypeError:
        got = type(path).__name__
        raise _not_a_plan("wrong_type", got, "the path of a file", argument="path") from None
    except (OSError, ValueError) as error:
        got = f"{path!r}: {error}"
        raise _not_a_plan("unreadable_file", got, "a JSON file in UTF-8") from None


def checked_groups(num_groups: object, num_experts: int) -> int:
    """A number of groups that experts divide into."""
    groups = as_count(num_groups, "num_groups")
    _core.check_groups(groups, num_experts)
    return groups


def live_slots(topology: _core.Topology) -> int:
    """How many slots there are on GPUs that are not dead."""
    slots = topology.slots
    return sum(slots) - sum(slots[gpu] for gpu in topology.dead)


def _differences(topology: _core.Topology) -> dict[str, Any]:
    """What sets the GPUs of a topology apart, as its constructor takes it."""
    if topology.is_even:
        return {}
    return {"slots": topology.slots, "speeds": topology.speeds, "dead": topology.dead}


def _padded(
    slots: list[list[list[int]]], shape: tuple[int, int], num_slots: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`log2phy` and `logcnt` from the slots of each expert, without padding.

    All that decides how much memory this takes is checked first.
    """
    rows = [[len(row) for row in layer] for layer in slots]
    if (len(rows), {len(row) for row in rows}) != (shape[0], {shape[1]}):
        raise InvalidInputError(
            code="wrong_shape",
            argument="log2phy",
            got=f"{len(rows)} layers of {sorted({len(row) for row in rows})} experts",
            expected=f"{shape[0]} layers of {shape[1]} experts, as the load has",
        )
    counts = np.array(rows, dtype=np.int64)
    for layer in np.flatnonzero((counts.sum(axis=1) != num_slots) | (counts.min(axis=1) == 0)):
        raise InvalidInputError(
            code="inconsistent",
            argument="log2phy",
            got=f"{counts[layer].sum()} slots, at least {counts[layer].min()} an expert, at "
            f"layer {layer}",
            expected=f"the {num_slots} slots of live GPUs, at least 1 an expert",
        )
    listed = np.array([slot for layer in slots for row in layer for slot in row])
    if listed.dtype.kind not in "iu":
        raise ValueError("log2phy holds what is no slot")
    log2phy = np.full((*shape, counts.max()), -1, dtype=np.int64)
    log2phy[np.arange(log2phy.shape[2]) < counts[..., None]] = listed
    return log2phy, counts


def _numbers(row: Load) -> list[int] | list[float]:
    """A row of loads as JSON has it: whole numbers without a fraction."""
    whole = row.astype(np.float64)
    if (whole == np.floor(whole)).all() and (whole < 2**53).all():
        return [int(value) for value in whole]
    return [float(value) for value in whole]


def _field(name: str, value: Any) -> str:
    """A line of JSON; a list of layers takes a line per layer."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        rows = ",\n".join("    " + json.dumps(row, separators=(",", ":")) for row in value)
        return f'  "{name}": [\n{rows}\n  ]'
    return f"  {json.dumps(name)}: {json.dumps(value)}"


def _not_a_plan(
    code: str, got: str, expected: str = "a plan that Plan.save wrote", argument: str = "plan"
) -> InvalidInputError:
    return InvalidInputError(code=code, argument=argument, got=got, expected=expected)
