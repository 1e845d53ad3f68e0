"""``python -m flexdpo``."""

import sys

from flexdpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
