"""Our side: ``opd fit`` with the words of this command line, stopped by `gate.Gate` between optimizer steps."""

from __future__ import annotations

import sys

from opd_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main(["fit", *sys.argv[1:]]))
