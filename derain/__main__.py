"""Entry point of ``python -m derain``."""

import sys

from derain.cli import main

if __name__ == "__main__":
    sys.exit(main())
