"""How pictures of this package look; imports matplotlib, so it is itself imported where something is drawn."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
}
