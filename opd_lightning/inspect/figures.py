"""How pictures of this package look; imports matplotlib, so it is itself imported where something is drawn."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib import ticker

matplotlib.use("Agg")  # no display needed

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
}


def label_log_axis(axis: Any, low: float, high: float) -> None:
    """Plain numbers and enough of them: a range below one decade would else have one label or none.

    Args:
        axis: a logarithmic one of matplotlib's.
        low: its lower limit.
        high: its upper limit.
    """
    labelled = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high < 10 * low else (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
    axis.set_major_locator(ticker.LogLocator(subs=labelled))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())
