"""The plug-in for vLLM, found through the entry point ``vllm.general_plugins``.

It takes the place of vLLM's default policy (vLLM knows policies by name, and "default" is the only
one), and looks at the placement in force, so that few weights move. Where it cannot plan, vLLM's
own policy does.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from eplb_rs.integrations.planning import EnginePlanner
from eplb_rs.integrations.settings import EngineSettings

if TYPE_CHECKING:
    import torch

__all__ = ["is_installed", "register"]

_POLICIES = "vllm.distributed.eplb.policy"
_NAME = "default"

_logger = logging.getLogger("vllm.eplb_rs")
"""Under vLLM's own logger: it shows no others."""


def register() -> None:
    """Puts the policy in place, if ``EPLB_RS_POLICY`` is set. Called by vLLM in every process, and
    as often as it likes. What it raises ends vLLM at its start.

    Raises:
        InvalidInputError: For a variable of the environment.
        RuntimeError: vLLM is not as this plug-in knows it, and would go on with its own policy.
    """
    settings = EngineSettings.from_environment()
    if settings is None or is_installed():
        return
    try:
        policies = importlib.import_module(_POLICIES)
        planner = EnginePlanner(settings, _logger)
        policies.EPLB_POLICIES[_NAME] = _policy(policies.EPLB_POLICIES[_NAME], planner)
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        _logger.exception("eplb-rs is asked for by EPLB_RS_POLICY, but vLLM would go on without")
        raise RuntimeError(
            f"eplb-rs is asked for by EPLB_RS_POLICY, but cannot be put into this vLLM: {error}; "
            f"it was made for vLLM 0.33"
        ) from error
    _logger.info("vLLM plans with eplb-rs: %s", settings)


def is_installed() -> bool:
    """Whether vLLM plans with eplb-rs in this process."""
    try:
        policies = importlib.import_module(_POLICIES)
    except ImportError:
        return False
    return getattr(policies.EPLB_POLICIES.get(_NAME), "is_eplb_rs", False)


def _policy(base: Any, planner: EnginePlanner) -> type:
    import torch

    class EplbRsPolicy(base):  # type: ignore[misc]
        """Plans with eplb-rs."""

        is_eplb_rs = True

        @classmethod
        def rebalance_experts(
            cls,
            weight: torch.Tensor,
            num_replicas: int,
            num_groups: int,
            num_nodes: int,
            num_ranks: int,
            old_global_expert_indices: torch.Tensor | None = None,
        ) -> torch.Tensor:
            """As vLLM's interface says: `[L, R]` int64 on the CPU."""
            old = old_global_expert_indices

            def ours() -> torch.Tensor:
                plan = planner.plan(
                    weight.float().cpu().numpy(),
                    num_replicas=num_replicas,
                    num_groups=num_groups,
                    num_nodes=num_nodes,
                    num_ranks=num_ranks,
                    previous=None if old is None else old.cpu().numpy(),
                )
                return torch.from_numpy(plan.phy2log.copy())

            def theirs() -> torch.Tensor:
                made: torch.Tensor = super(EplbRsPolicy, cls).rebalance_experts(
                    weight, num_replicas, num_groups, num_nodes, num_ranks, old
                )
                return made

            return planner.or_theirs(ours, theirs)

    return EplbRsPolicy
