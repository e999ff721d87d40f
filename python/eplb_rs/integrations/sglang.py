"""The plug-in for SGLang, found through the entry point ``sglang.srt.plugins``.

It stands around SGLang's ``rebalance_experts``, looks at the placement in force, so that few
weights move, and can list an expert's slots as often as their shares ask for: SGLang counts the
entries, so that this is weighted routing. Where ranks have died (the algorithm
``elasticity_aware``), SGLang's own planner answers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from eplb_rs.integrations.settings import EngineSettings, logger

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    import torch

__all__ = ["TARGET", "is_installed", "register"]

TARGET = "sglang.srt.eplb.eplb_algorithms.rebalance_experts"
"""What the plug-in stands around."""

_installed = False


def register() -> None:
    """Registers the hook, if ``EPLB_RS_POLICY`` is set. Called by SGLang in every process.

    Raises:
        InvalidInputError: For a variable of the environment.
        RuntimeError: SGLang is not as this plug-in knows it, and would go on with its own planner.
    """
    global _installed  # noqa: PLW0603 - SGLang's registry cannot be asked
    settings = EngineSettings.from_environment()
    if settings is None or _installed:
        return
    try:
        hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
        hooks.HookRegistry.register(TARGET, _around(settings), hooks.HookType.AROUND)
    except (ImportError, AttributeError, TypeError) as error:
        logger.exception("eplb-rs is asked for by EPLB_RS_POLICY, but SGLang goes on without")
        raise RuntimeError(
            f"eplb-rs is asked for by EPLB_RS_POLICY, but cannot be put into this SGLang: {error}; "
            f"it was made for SGLang 0.5.23"
        ) from error
    _installed = True
    logger.info("SGLang plans with eplb-rs: %s", settings)


def is_installed() -> bool:
    """Whether the hook is registered in this process."""
    return _installed


Maps = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]


def _around(settings: EngineSettings) -> Callable[..., Maps]:
    def rebalance_experts(original: Callable[..., Maps], *args: Any, **kwargs: Any) -> Maps:
        """As SGLang's own, called by keyword."""
        if args or "elasticity" in getattr(kwargs.get("algorithm"), "name", ""):
            return original(*args, **kwargs)
        return _maps(settings, **kwargs)

    return rebalance_experts


def _maps(
    settings: EngineSettings,
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
    plan = settings.plan(
        tokens_per_expert.sum(dim=0).float().cpu().numpy(),
        num_replicas=num_physical_experts,
        num_groups=num_groups,
        num_nodes=num_nodes,
        num_ranks=num_physical_experts // num_local_physical_experts,
        previous=_in_force(),
    )
    log2phy, counts = plan.log2phy, plan.logcnt
    if settings.share_width is not None:
        log2phy = plan.with_shares().log2phy(settings.share_width)
        counts = (log2phy >= 0).sum(axis=2)
    device = tokens_per_expert.device

    def on_device(part: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.array(part, dtype=np.int64)).to(device)

    return on_device(plan.phy2log), on_device(log2phy), on_device(counts)


def _in_force() -> Any:
    """The placement that SGLang serves with, the same on all ranks; none at its start."""
    location = importlib.import_module("sglang.srt.eplb.expert_location")
    metadata = location.get_global_expert_location_metadata()
    return None if metadata is None else metadata.physical_to_logical_map.cpu().numpy()
