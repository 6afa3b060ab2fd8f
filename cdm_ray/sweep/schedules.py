"""Figures of the schedules that population-based training found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from cdm_ray.evaluation.figures import BLUE, GREEN
from cdm_ray.evaluation.plotting import TITLE_LEFT, new_figure, style_axes
from cdm_ray.sweep.scales import DECADE
from cdm_ray.sweep.settings import SCHEDULE, Setting, is_number, show_value
from cdm_ray.sweep.summary import Row, Summary


def schedule_figures(summary: Summary) -> dict[str, Figure]:
    """`schedule_AXIS` of each axis that any setting changes on the way."""
    rows = [row for row in summary.rows if row.values and not row.is_baseline]
    changed = {key for row in rows for part in row.setting.get(SCHEDULE, []) for key in part["set"]}
    return {
        f"schedule_{axis}": schedule_figure(summary, rows, axis)
        for axis in summary.axes
        if axis in changed
    }


def schedule_figure(summary: Summary, rows: Sequence[Row], axis: str) -> Figure:
    """The values of an axis over the course of each run; the best one on top."""
    figure = new_figure(7.6, 4.2)
    axes = figure.add_subplot()
    end = 1.15 * max(part["after"] for row in rows for part in row.setting.get(SCHEDULE, []))
    seen = []
    for row in reversed(rows):  # ranked
        best = row is rows[0]
        places, values = _course(row.setting, axis)
        seen += values
        axes.step(
            [*places, end], [*values, values[-1]], where="post", zorder=3 if best else 2,
            color=GREEN if best else BLUE, linewidth=2.2 if best else 1.0,
            alpha=1.0 if best else 0.5,
            label=f"best: {summary.metric} {row.interval}" if best else None,
        )  # fmt: skip
    if all(map(is_number, seen)) and min(seen) > 0 and max(seen) >= DECADE * min(seen):
        axes.set_yscale("log")
    axes.set_xlim(0, end)
    axes.set_xlabel("images of the run (of bridges: iterations)")
    axes.set_ylabel(axis)
    axes.legend(frameon=False, fontsize=9)
    style_axes(axes)
    figure.suptitle(f"{axis} over the course of each member of the population", **TITLE_LEFT)
    return figure


def _course(setting: Setting, axis: str) -> tuple[list[float], list[Any]]:
    """Where the axis gets which value."""
    places, values = [0.0], [_shown(setting[axis])]
    for part in setting.get(SCHEDULE, []):
        if axis in part["set"]:
            places.append(part["after"])
            values.append(_shown(part["set"][axis]))
    return places, values


def _shown(value: Any) -> Any:
    return value if is_number(value) else show_value(value)
