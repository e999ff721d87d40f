"""How far the slowest plans are from the median, at a fixed number of steps, and on many threads.

Times are of one call after another on the same load. A shared machine has a tail of its own: so the
reference policy, which takes the same instructions every time, is measured beside, and
`p999_over_median` of both is shown. The plans of 1 to 8 threads are compared byte by byte.
"""

from __future__ import annotations

from typing import Any

import eplb_rs
from measuring import deepseek_r1, log_normal, quantiles, samples

CALLS = 2000
THREADS = range(1, 9)


def rows(seconds: float) -> list[dict[str, Any]]:
    """One row for each policy and load."""
    topology = eplb_rs.Topology(1, 32, 9)
    rows: list[dict[str, Any]] = []
    for name, load in (("DeepSeek-R1 1k1k", deepseek_r1()), ("log-normal s=1", log_normal(1.0))):
        for policy, iterations in (("deepseek", None), ("balanced", 33), ("balanced", 1000)):
            settings: dict[str, Any] = {"policy": policy, "iterations": iterations}
            plans = [
                eplb_rs.Planner(topology, threads=threads, **settings).plan(load)
                for threads in THREADS
            ]
            assert all((plan.phy2log == plans[0].phy2log).all() for plan in plans)
            planner = eplb_rs.Planner(topology, release_gil=False, **settings)
            out = planner.allocate(*load.shape, 0)

            def call(planner: Any = planner, load: Any = load, out: Any = out) -> object:
                return planner.plan_into(load, out)

            found = quantiles(samples(call, seconds=seconds, calls=CALLS))
            rows.append(
                {
                    "load": name,
                    **{key: value for key, value in settings.items() if value is not None},
                    "same_on_threads": len(plans),
                    **found,
                    "p999_over_median": round(found["p999_us"] / found["median_us"], 2),
                }
            )
    return rows
