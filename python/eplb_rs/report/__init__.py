"""What a plan achieves, for people (text) and for programs (figures).

A plan is shown beside the placement that engines start with ("before"): slot `i` holds expert
`i mod E`, whatever the load.
"""

from eplb_rs.report.report import HotExpert, PlanningTime, Report, placement_before
from eplb_rs.report.style import Style

__all__ = ["HotExpert", "PlanningTime", "Report", "Style", "placement_before"]
