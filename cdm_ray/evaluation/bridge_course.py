"""The course of a bridge's training as a figure: KL, cost, bound and weights over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from cdm_ray.evaluation.figures import BLUE, GREEN, ORANGE
from cdm_ray.evaluation.plotting import TITLE_LEFT, new_figure, save_figure, style_axes
from cdm_ray.storage import AnyPath


class _Panel(NamedTuple):
    label: str
    curves: Mapping[str, tuple[str, str]]
    """Of each metric, label and colour."""
    scale: Literal["linear", "log", "share"] = "linear"
    level: str | None = None
    """A metric that is the exact value of the others."""


_COURSE = (
    _Panel(
        "KL divergence, nats",
        {
            "kl_from_truth": ("KL(exact ‖ model)", BLUE),
            "kl_to_truth": ("KL(model ‖ exact)", GREEN),
        },
        scale="log",
    ),
    _Panel("path cost ½ E∫|u|² dt", {"cost": ("model", BLUE)}),
    _Panel(
        "log p(end | start), nats",
        # A bound for Euler steps, it may lie above what is exact in continuous time.
        {"log_p_bound": ("lower bound at finite dt", BLUE)},
        level="log_p_truth",
    ),
    _Panel("effective sample size, share", {"ess": ("importance weights", BLUE)}, scale="share"),
)


def course_figure(points: Sequence[Mapping[str, Any]], path: AnyPath) -> None:
    """Metrics over optimizer steps, from points {"step": int, "metrics": {name: value}} with
    the names of `evaluate_bridge`, as PNG; panels that have no data are left out.

    Raises ValueError if none has any.
    """
    panels = [panel for panel in _COURSE if any(course(points, name) for name in panel.curves)]
    if not panels:
        raise ValueError(f"{len(points)} points without any metric of a bridge: nothing to draw")
    rows, columns = (2, 2) if len(panels) == 4 else (1, len(panels))
    figure = new_figure(4.6 * columns, 3.2 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=True):
        _draw_course(axes, panel, points)
    figure.suptitle("How did the training go? (95 % intervals)", **TITLE_LEFT)
    save_figure(figure, path)


def course(points: Sequence[Mapping[str, Any]], name: str) -> dict[int, tuple[float, float]]:
    """The finite values of a metric and their standard errors (0 if there are none) by step."""
    found = {}
    for point in points:
        metrics = point["metrics"]
        value, error = metrics.get(name), metrics.get(f"{name}_se", 0.0)
        if value is not None and np.isfinite([value, error]).all():
            found[point["step"]] = (value, error)
    return found


def _draw_course(axes: Axes, panel: _Panel, points: Sequence[Mapping[str, Any]]) -> None:
    drawn = []
    for number, (name, (label, colour)) in enumerate(panel.curves.items()):
        if not (values := course(points, name)):
            continue
        mean, bar = np.array(list(values.values())).T * ((1.0,), (1.96,))
        wide = len(panel.curves) - number  # those below, where curves lie on each other
        axes.errorbar(
            list(values), mean, yerr=bar if bar.any() else None, label=label, color=colour,
            linewidth=1.3 * wide, elinewidth=1.2, marker="o", markersize=2 + 2 * wide,
            capsize=1 + 1.5 * wide,
        )  # fmt: skip
        drawn.append((mean, bar))
    if panel.level is not None and (level := course(points, panel.level)):
        exact = list(level.values())[-1][0]
        axes.axhline(exact, color=ORANGE, linewidth=1.4, linestyle="--", label="exact, dt → 0")
    if panel.scale == "share":
        axes.set_ylim(0, 1.03)  # room for the markers at 1
    if panel.scale == "log":
        mean, bar = np.concatenate(drawn, axis=1)
        if (positive := mean > 0).any():
            # A bar that reaches 0 leaves the figure, instead of stretching it without end.
            lowest = np.maximum(mean - bar, mean / 10)[positive].min()
            _log_axis(axes, lowest / 1.3, (mean + bar).max() * 1.3)
    axes.set(xlabel="optimizer step", ylabel=panel.label)
    style_axes(axes)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        # Above the axes, where it covers nothing.
        axes.legend(
            frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2,
            borderaxespad=0,
        )  # fmt: skip


def _log_axis(axes: Axes, low: float, high: float) -> None:
    """Of the ordinate, with several labels even where it spans less than a decade."""
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(low, high)
    if high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
