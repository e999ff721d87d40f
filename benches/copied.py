"""What the sum of the copies' gradients takes in a DualPipe step."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from contenders import WARM_UP, make_contender

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformer import Case

__all__ = ["reduction"]


def reduction(rank: Any, case: Case, rounds: int) -> dict[str, Any]:
    """What the sum of the two copies' gradients takes, and how much of it is hidden, by all-reduce
    (unless it wants NCCL and there is none) and by the transport."""
    plain = make_contender("DualPipe", case, rank.device)
    ways = {"all-reduce": True} if rank.has_nccl or rank.device.type == "cpu" else {}
    made = {
        name: make_contender("DualPipe", case, rank.device, reduce_copies=way)
        for name, way in {**ways, "pairs": "pairs"}.items()
    }
    works = {"plain": cleared(plain)}
    for name, contender in made.items():
        works[name] = cleared(contender)
        works[f"{name} alone"] = summed(contender)
    for name, work in works.items():
        for _ in range(1 if "alone" in name else WARM_UP):
            work()
    equal = {name: equal_copies(rank, contender) for name, contender in made.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(rank.timed(work))
    found: dict[str, Any] = {}
    for name in made:
        pairs = zip(times["plain"], times[name], strict=True)
        added = statistics.median(b - a for a, b in pairs)
        whole = statistics.median(times[f"{name} alone"])
        found[name] = {
            "alone ms": round(whole, 3),
            "added to the step ms": round(added, 3),
            "hidden": round(1 - max(added, 0) / whole, 3),
            "equal on both": equal[name],
        }
    for contender in (plain, *made.values()):
        contender.close()
    return found


def summed(contender: Any) -> Callable[[], None]:
    """The reduction alone, of the gradients of the last step."""
    copies = contender.executor._copies

    def alone() -> None:
        for stage, _ in sorted(contender.executor.stages, reverse=True):
            copies.start(stage)
        copies.finish()

    return alone


def equal_copies(rank: Any, contender: Any) -> bool:
    """Whether both ranks have the same gradients after a step."""
    cleared(contender)()
    sums = {
        f"{stage} {name}": parameter.grad.double().sum().item()
        for (stage, _), held in contender.executor.stages.items()
        for name, parameter in held.module.named_parameters()
    }
    first, second = rank.gathered(sums)
    return bool(first == second)


def cleared(contender: Any) -> Callable[[], None]:
    """A step from zero gradients, as optimizer steps have it."""

    def step() -> None:
        for stage in contender.executor.stages.values():
            stage.module.zero_grad()
        contender.step()

    return step
