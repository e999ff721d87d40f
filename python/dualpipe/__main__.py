"""``python -m dualpipe``."""

import sys

from dualpipe.cli import main

if __name__ == "__main__":
    sys.exit(main())
