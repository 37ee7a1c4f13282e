"""``python -m opd_lightning`` is ``opd``."""

import sys

from opd_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
