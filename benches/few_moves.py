"""Few moves where tokens are split anew: what balance they reach, and what finding them takes.

    python benches/few_moves.py [--seconds 2] [--output benches/results/few_moves.json]

One thread, pinned to one core. 58 layers of 256 experts on 288 slots of 32 ranks; the load is
log-normal (s = 1) when a plan is made, and each expert's is off by 10 % (log-normal) when moves are.
Plans: `linked`, made with shares in mind; `ordinary`, of the balanced policy; and DeepSeek's.

- `moves`: at most so many, over all layers together: the balance with shares, and the time of the
  call. Beside them the balanced policy's moves for even splits, with shares afterwards.
- `other loads`: the same on ten other loads off by 10 %, and ten by 20 %: mean and least.

Each plan is checked: every expert has a slot, no more moves than allowed, and no rank carries more
than the level, which the tight ranks prove.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import eplb_rs
import measuring
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SLOTS, RANKS = 288, 32
MOVES = (0, 30, 60, 100, 150)

Load = npt.NDArray[np.float32]


def off(load: Load, spread: float, seed: int) -> Load:
    """The load, each expert's off by a log-normal factor."""
    noise = np.random.default_rng(seed).lognormal(0, spread, load.shape)
    return (load * noise).astype(np.float32)


def arrivals(plan: eplb_rs.Plan, previous: eplb_rs.Plan) -> int:
    """How many experts are on a rank that did not hold them."""
    shape = (plan.num_layers, RANKS, -1)
    new, old = plan.phy2log.reshape(shape), previous.phy2log.reshape(shape)
    return int((~(new[..., :, None] == old[..., None, :]).any(axis=-1)).sum())


def balance(plan: eplb_rs.Plan, load: Load) -> float:
    """The balance with shares, proven to be the best of this placement."""
    shares = plan.with_shares(load)
    ranks = np.arange(SLOTS) * RANKS // SLOTS
    for layer, row in enumerate(load.astype(np.float64)):
        tight = shares.tight[layer]
        alone = np.delete(row, plan.phy2log[layer][~tight[ranks]]).sum()
        assert shares.rank_load[layer].max() <= alone / tight.sum() * (1 + 1e-9), "not the best"
    return shares.balance


def replanned(
    planner: eplb_rs.Planner, previous: eplb_rs.Plan, load: Load, moves: int
) -> eplb_rs.Plan:
    """The plan after few moves, checked."""
    plan = planner.plan_scenarios(load[None], previous=previous, max_moves=moves, split="shares")
    assert (plan.logcnt > 0).all(), "an expert has no slot"
    assert arrivals(plan, previous) <= moves, "more moves than allowed"
    return plan


def moves_of(
    planner: eplb_rs.Planner, previous: eplb_rs.Plan, load: Load, seconds: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each number of moves: the balance, and what it took."""
    for moves in MOVES:
        plan = replanned(planner, previous, load, moves)
        even = planner.plan(load, previous=previous, max_moves=moves)
        array = load[None]

        def call(moves: int = moves, array: Load = array) -> object:
            return planner.plan_scenarios(array, previous=previous, max_moves=moves, split="shares")

        yield (
            f"at most {moves}",
            {
                "moves": arrivals(plan, previous),
                "balance": round(balance(plan, load), 5),
                "time": measuring.timed(call, seconds),
                "moves for even splits": {
                    "moves": arrivals(even, previous),
                    "balance, even splits": round(even.balance, 5),
                    "balance, shares": round(balance(even, load), 5),
                },
            },
        )


def others(
    planner: eplb_rs.Planner, previous: eplb_rs.Plan, load: Load
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Mean and least balance on other loads."""
    for spread in (0.1, 0.2):
        for moves in (0, 60, 150):
            later = [off(load, spread, seed) for seed in range(2, 12)]
            plans = [replanned(planner, previous, one, moves) for one in later]
            found = [balance(plan, one) for plan, one in zip(plans, later, strict=True)]
            yield (
                f"off by {spread:.0%}, at most {moves} moves",
                {"mean": round(float(np.mean(found)), 5), "least": round(min(found), 5)},
            )


def main() -> None:
    """Measures all plans, prints a line for each figure and writes the file."""
    parser = measuring.parser(__doc__ or "", "few_moves.json", seconds=2.0)
    options = parser.parse_args()
    measuring.pin()
    load = measuring.log_normal(1.0)
    later = off(load, 0.1, 1)
    topology = eplb_rs.Topology.from_totals(num_replicas=SLOTS, num_nodes=1, num_gpus=RANKS)
    planner = eplb_rs.Planner(topology)
    makers: dict[str, Callable[[], eplb_rs.Plan]] = {
        "linked": lambda: planner.plan_linked(load),
        "ordinary": lambda: planner.plan(load),
        "DeepSeek": lambda: eplb_rs.Planner(topology, policy="deepseek").plan(load),
    }
    results: dict[str, Any] = {}
    for name, make in makers.items():
        plan = make()
        results[name] = {
            "balance, even splits, load planned for": round(plan.balance, 5),
            "planning": measuring.timed(make, options.seconds),
            "moves": dict(moves_of(planner, plan, later, options.seconds)),
            "other loads": dict(others(planner, plan, load)),
        }
        print(
            f"{name}: {plan.balance:.5f} on its own load, made in "
            f"{results[name]['planning']['median_us'] / 1e3:.0f} ms"
        )
        for limit, figures in results[name]["moves"].items():
            print(
                f"  {limit}: {figures['moves']} moves, balance {figures['balance']:.5f}, "
                f"{figures['time']['median_us'] / 1e3:.1f} ms "
                f"(p99 {figures['time']['p99_us'] / 1e3:.1f}); moves for even splits "
                f"{figures['moves for even splits']['balance, shares']:.5f}"
            )
        for case, figures in results[name]["other loads"].items():
            print(f"  {case}: mean {figures['mean']:.5f}, least {figures['least']:.5f}", flush=True)
    measuring.write(options.output, results, options.commit)


if __name__ == "__main__":
    main()
