"""``python -m eplb_rs``: the command line."""

import sys

from eplb_rs.cli import main

if __name__ == "__main__":
    sys.exit(main())
