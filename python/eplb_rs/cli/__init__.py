"""The command line: ``eplb``, or ``python -m eplb_rs``.

Exit codes: 0; 1 if the output could not be written; 2 for input that was refused, with one line on
stderr that says why and how to mend it; 130 if interrupted; 141 if whoever reads the output went
away.
"""

from eplb_rs.cli.program import main

__all__ = ["main"]
