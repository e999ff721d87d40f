"""The plug-in for SGLang, found through the entry point ``sglang.srt.plugins``.

It stands around SGLang's ``rebalance_experts``, looks at the placement in force, so that few
weights move, and can list an expert's slots as often as their shares ask for: SGLang counts the
entries, so that this is weighted routing. Where it cannot plan, and where ranks may have died (the
algorithm ``elasticity_aware``), SGLang's own planner answers.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from eplb_rs.integrations.planning import EnginePlanner
from eplb_rs.integrations.settings import EngineSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    import torch

    from eplb_rs.plan import Plan

__all__ = ["TARGET", "is_installed", "register"]

TARGET = "sglang.srt.eplb.eplb_algorithms.rebalance_experts"
"""What the plug-in stands around."""

_REGISTRY = "sglang.srt.plugins.hook_registry"

_logger = logging.getLogger("sglang.eplb_rs")
_registered = False


def register() -> None:
    """Registers the hook, if ``EPLB_RS_POLICY`` is set. Called by SGLang in every process. What it
    raises, SGLang logs, and goes on without.

    Raises:
        InvalidInputError: For a variable of the environment.
        RuntimeError: SGLang is not as this plug-in knows it, and would go on with its own planner.
    """
    global _registered  # noqa: PLW0603 - SGLang's registry cannot be asked before it applies hooks
    settings = EngineSettings.from_environment()
    if settings is None or _registered:
        return
    try:
        hooks = importlib.import_module(_REGISTRY)
        around = _around(EnginePlanner(settings, _logger))
        hooks.HookRegistry.register(TARGET, around, hooks.HookType.AROUND)
    except (ImportError, AttributeError, TypeError) as error:
        _logger.exception("eplb-rs is asked for by EPLB_RS_POLICY, but SGLang goes on without")
        raise RuntimeError(
            f"eplb-rs is asked for by EPLB_RS_POLICY, but cannot be put into this SGLang: {error}; "
            f"it was made for SGLang 0.5.23"
        ) from error
    _registered = True
    _logger.info("SGLang plans with eplb-rs: %s", settings)


def is_installed() -> bool:
    """Whether SGLang plans with eplb-rs in this process: the hook is registered and applied."""
    if not _registered:
        return False
    return TARGET in importlib.import_module(_REGISTRY).HookRegistry._patched


Maps = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]


def _around(planner: EnginePlanner) -> Callable[..., Maps]:
    def rebalance_experts(original: Callable[..., Maps], *args: Any, **kwargs: Any) -> Maps:
        """As SGLang's own, called by keyword."""
        if args or "elasticity" in getattr(kwargs.get("algorithm"), "name", ""):
            return original(*args, **kwargs)
        return planner.or_theirs(
            lambda: _maps(planner, **kwargs), lambda: original(*args, **kwargs)
        )

    return rebalance_experts


def _maps(
    planner: EnginePlanner,
    *,
    tokens_per_expert: torch.Tensor,
    num_physical_experts: int,
    num_local_physical_experts: int,
    num_groups: int | None,
    num_nodes: int,
    algorithm: object,
) -> Maps:
    """`[L, R]`, `[L, E, X]` and `[L, E]`, int64, where the tokens are."""
    import torch

    del algorithm
    plan = planner.plan(
        tokens_per_expert.sum(dim=0).float().cpu().numpy(),
        num_replicas=num_physical_experts,
        num_groups=num_groups,
        num_nodes=num_nodes,
        num_ranks=num_physical_experts // num_local_physical_experts,
        previous=_in_force(),
    )
    log2phy, counts = plan.log2phy, plan.logcnt
    width = planner.settings.share_width
    if width is not None and _picks_from_entries(planner):
        # SGLang's table is as wide as there are slots.
        log2phy = _entries(plan, min(width, num_physical_experts))
        counts = (log2phy >= 0).sum(axis=2)
    device = tokens_per_expert.device

    def on_device(part: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.array(part, dtype=np.int64)).to(device)

    return on_device(plan.phy2log), on_device(log2phy), on_device(counts)


def _entries(plan: Plan, width: int) -> npt.NDArray[np.int64]:
    """`[L, E, X]`, slots listed as often as their shares ask for, in layers where that helps: few
    entries are coarse, and a plan made for just this load may be even without them."""
    split, even = plan.with_shares().log2phy(width), plan.log2phy
    places = max(split.shape[2], even.shape[2])
    split, even = (
        np.pad(table, ((0, 0), (0, 0), (0, places - table.shape[2])), constant_values=-1)
        for table in (split, even)
    )
    helps = _heaviest(plan, split) < _heaviest(plan, even)
    return np.where(helps[:, None, None], split, even)


def _heaviest(plan: Plan, log2phy: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """`[L]`, the largest rank load if each entry gets an equal part of its expert's tokens."""
    listed = log2phy >= 0
    share = plan.expert_load / listed.sum(axis=2)
    layer, expert, _ = np.nonzero(listed)
    load = np.zeros((plan.num_layers, plan.topology.num_gpus))
    rank = log2phy[listed] // (plan.topology.num_slots // plan.topology.num_gpus)
    np.add.at(load, (layer, rank), share[layer, expert])
    heaviest: npt.NDArray[np.float64] = load.max(axis=1)
    return heaviest


def _in_force() -> Any:
    """The placement that SGLang serves with, the same on all ranks; none at its start."""
    location = importlib.import_module("sglang.srt.eplb.expert_location")
    metadata = location.get_global_expert_location_metadata()
    return None if metadata is None else metadata.physical_to_logical_map_cpu.numpy()


def _picks_from_entries(planner: EnginePlanner) -> bool:
    """Whether SGLang picks one of an expert's entries for each token: then one that is listed twice
    counts twice. Static dispatch picks once for each rank, a linear program takes entries for
    replicas."""
    context = importlib.import_module("sglang.srt.runtime_context")
    dispatch = context.get_exec().moe.ep_dispatch_algorithm
    if dispatch in ("dynamic", "fake"):
        return True
    planner.warn_once(
        f"EPLB_RS_SHARES has no effect under --ep-dispatch-algorithm {dispatch}; "
        f"it needs --ep-dispatch-algorithm dynamic"
    )
    return False
