"""The figure of the command: losses of training samples over their place in the first epoch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator
from numpy.typing import NDArray

from mftcoder_coba.orders.imbalance import Imbalance
from mftcoder_coba.orders.merges import AVERAGE, RESAMPLED, SELECTION
from mftcoder_coba.reporting.figures import Chart, Sheet, extent, limit

MOST_LINES = 4


def imbalance_chart(found: Mapping[str, Imbalance], singles: str, samples: int) -> Chart:
    """
    Args:
        found: row of the tables -> what was measured, in order.
        singles: the row of the single models.
        samples: how many were measured.
    """
    return Chart(
        "imbalance",
        "Loss of training samples over their place in the first epoch",
        f"Above, the mean loss of {samples:,} training samples by the place where the first epoch had them, averaged over the orders: a line that "
        "falls says that what came early is remembered worse. Below, the same minus what the single models of the other orders have on the same "
        "samples, so that it does not matter how hard they are: a level line has no imbalance, and a line below 0 a lower loss than the single "
        "models. Merged models are looked at in each of the orders.",
        lambda narrow=False: draw_imbalance(found, singles, narrow),
    )


def draw_imbalance(found: Mapping[str, Imbalance], singles: str, narrow: bool) -> Figure | None:
    """A panel for the loss; below it one for the excess, where there is any."""
    wanted = [row for row in (singles, AVERAGE, SELECTION, RESAMPLED) if row in found]
    wanted = wanted if len(wanted) > 1 else list(found)[:MOST_LINES]
    panels = [
        (label, {row: curve for row in wanted if np.isfinite(curve := getattr(found[row], name)).any()})
        for name, label in (("loss", "loss"), ("excess", "excess loss"))
    ]
    panels = [(label, curves) for label, curves in panels if curves]
    if not panels:
        return None
    sheet = Sheet(wanted, 1, narrow)
    if RESAMPLED in sheet.styles:  # where every model changed every parameter, it lies on the line without
        sheet.styles[RESAMPLED] = sheet.styles[RESAMPLED][0], (4, 3)
    axes_of = sheet.panels(len(panels), height=2.2 if narrow else 2.7)
    for axes, (label, curves) in zip(axes_of, panels, strict=True):
        for row, values in curves.items():
            sheet.line(axes, row, _middles(values), values)
        axes.set_ylabel(label)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_locator(MultipleLocator(0.2))
        limit(axes, *extent([*curves.values(), np.zeros(1)] if label != "loss" else curves.values(), wild=0.0))
    if len(panels) > 1:
        sheet.level(axes_of[1], 0.0)
    axes_of[-1].set_xlabel("place in the first epoch")
    return sheet.finish()


def _middles(values: NDArray) -> NDArray:
    return (np.arange(len(values)) + 0.5) / len(values)
