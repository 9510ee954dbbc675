"""``python -m megapre``."""

import sys

from megapre.cli import main

if __name__ == "__main__":
    sys.exit(main())
