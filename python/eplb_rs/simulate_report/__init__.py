"""What a replayed trace says, for people (text) and for programs (figures)."""

from eplb_rs.simulate_report.report import SimulationReport
from eplb_rs.simulate_report.verdict import Verdict

__all__ = ["SimulationReport", "Verdict"]
