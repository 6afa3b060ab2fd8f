"""What all figures of bridges share: canvas, style, and files that are the same each time.

No global state of matplotlib is touched.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from cdm_ray.storage import AnyPath, whole_file

TITLE_LEFT: dict[str, Any] = {"x": 0.01, "ha": "left", "fontsize": 11}


def new_figure(width: float, height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=(width, height), dpi=110, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: AnyPath) -> None:
    with whole_file(path) as file:
        figure.savefig(file, metadata={"Software": None})


def style_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
