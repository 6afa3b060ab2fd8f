"""What a person looks at after a sweep, as PNG files: the metric along an axis and over two of
them, quality against cost, and importance of the axes.

The best setting is green in all figures, the baseline orange, everything else blue.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from cdm_ray.evaluation.figures import BLUE, GREEN, GREY, ORANGE
from cdm_ray.evaluation.plotting import TITLE_LEFT, new_figure, save_figure, style_axes
from cdm_ray.storage import AnyPath
from cdm_ray.sweep.importance import FEWEST_TRIALS, Importance
from cdm_ray.sweep.intervals import show_number
from cdm_ray.sweep.scales import DECADE, Scale, bins_of, decades, distinct, scale_of
from cdm_ray.sweep.schedules import schedule_figures
from cdm_ray.sweep.settings import Setting, is_number, show_setting, show_value, value_key
from cdm_ray.sweep.summary import Mode, Row, Summary

Array = NDArray[np.float64]

HEAT_AXES = 3
"""Heat maps are drawn of all pairs of the first so many axes that vary."""
_WIDE_RANGE = 30.0
_BEST_IS_DEEP = LinearSegmentedColormap.from_list("best is deep", [BLUE, "#f4f8fb"])


def sweep_figures(summary: Summary, folder: AnyPath) -> dict[str, AnyPath]:
    """Write the figures into the folder: `metric_AXIS` for every axis, `heat_AXIS_AXIS` for pairs
    of them, `cost`, `importance`, and after population-based training `schedule_AXIS`. None of them
    without a finished trial; axes that do not vary are left out."""
    if summary.best is None:
        return {}
    varying = [axis for axis in summary.axes if len(distinct(summary.rows, axis)) > 1]
    figures = {f"metric_{axis}": metric_figure(summary, axis) for axis in varying}
    for pair in itertools.combinations(varying[:HEAT_AXES], 2):
        figures[f"heat_{pair[0]}_{pair[1]}"] = heat_figure(summary, *pair)
    if summary.front:
        figures["cost"] = cost_figure(summary)
    if summary.axes:
        figures["importance"] = importance_figure(summary)
    figures |= schedule_figures(summary)
    paths = {name: folder / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        save_figure(figure, paths[name])
    return paths


# The metric along an axis


def metric_figure(summary: Summary, axis: str) -> Figure:
    """Every setting at its value of the axis: mean with its 95 % interval, seeds in grey; settings
    without a finished trial at the bad edge."""
    figure = new_figure(7.6, 4.4)
    axes = figure.add_subplot()
    rows = [row for row in summary.rows if axis in row.setting]
    scale = scale_of(distinct(rows, axis))
    log_metric = _metric_scale(axes, summary, rows)
    baseline = summary.baseline
    if baseline is not None and baseline.interval is not None:
        axes.axhline(baseline.mean, color=ORANGE, linewidth=1, linestyle="--", zorder=1)
    for row, x in _beside_each_other(rows, scale, axis):
        if row.interval is None:
            _mark_unfinished(axes, row, x, summary.mode == "min")
            continue
        seeds = list(row.values.values())
        if len(seeds) > 1:
            axes.plot([x] * len(seeds), seeds, "o", color="#aaaaaa", markersize=3, zorder=2)
        _draw_interval(axes, summary, row, x, log_metric)
    _show_scale(axes, scale)
    axes.margins(y=0.12)
    axes.set_xlabel(axis)
    style_axes(axes)
    repeated = any(len(row.values) > 1 for row in rows)
    shown = "mean and 95 % interval, seeds in grey" if repeated else "one seed each: no intervals"
    figure.suptitle(f"Which {axis} is best? ({shown})", **TITLE_LEFT)
    _legend(figure, summary, rows, line="--")
    return figure


def _beside_each_other(rows: Sequence[Row], scale: Scale, axis: str) -> list[tuple[Row, float]]:
    """Settings with the same value of the axis, which differ elsewhere, moved apart a little."""
    places = sorted(scale.places.values())
    along = np.log(places) if scale.log else np.array(places)
    room = float(np.diff(along).min()) if len(along) > 1 else 1.0
    placed = []
    for key, x in scale.places.items():
        group = [row for row in rows if value_key(row.setting[axis]) == key]
        group.sort(key=lambda row: _order(row.setting))
        step = min(0.025 * float(np.ptp(along) or 1.0), 0.6 * room / max(1, len(group)))
        for i, row in enumerate(group):
            shift = step * (i - (len(group) - 1) / 2)
            placed.append((row, x * math.exp(shift) if scale.log else x + shift))
    return placed


def _order(setting: Setting) -> list[tuple[str, float, str]]:
    """By the settings' values and not by rank, which would look like a trend."""
    pairs = sorted(setting.items())
    return [(n, v, "") if is_number(v) else (n, 0.0, show_value(v)) for n, v in pairs]


def _draw_interval(axes: Axes, summary: Summary, row: Row, x: float, log_metric: bool) -> None:
    interval = row.interval
    if interval is None:
        return
    half = interval.half_width or 0.0
    # A log scale has no room below 0.
    lower = min(half, 0.999 * interval.mean) if log_metric else half
    axes.errorbar(
        x, interval.mean, yerr=[[lower], [half]] if half else None, color=_colour(summary, row),
        marker="s" if row.is_baseline else "o", markersize=6, capsize=3, elinewidth=1.4, zorder=3,
    )  # fmt: skip


def _mark_unfinished(axes: Axes, row: Row, x: float, bad_is_high: bool) -> None:
    marker, colour = ("|", GREY) if row.pruned else ("x", "black")
    axes.plot(
        x, 0.97 if bad_is_high else 0.03, marker, color=colour, markersize=7,
        transform=axes.get_xaxis_transform(),
    )  # fmt: skip


def _show_scale(axes: Axes, scale: Scale) -> None:
    if scale.log:
        axes.set_xscale("log")
    if scale.ticks is None:
        axes.xaxis.set_major_locator(MaxNLocator(8))
    else:
        axes.xaxis.set_major_locator(FixedLocator(list(scale.ticks)))
        axes.set_xticks(list(scale.ticks), list(scale.ticks.values()))
        axes.xaxis.set_minor_locator(NullLocator())
    if scale.cut is not None:
        axes.axvline(scale.cut, color="#cccccc", linewidth=1, linestyle=":")


def _metric_scale(axes: Axes, summary: Summary, rows: Sequence[Row]) -> bool:
    """Label and scale of the metric; whether it is a log scale, for results of all sizes."""
    axes.set_ylabel(summary.label)
    values = [value for row in rows for value in row.values.values()]
    if not values or min(values) <= 0 or max(values) < _WIDE_RANGE * min(values):
        return False
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    return True


def _colour(summary: Summary, row: Row) -> str:
    if row.is_baseline:
        return ORANGE
    return GREEN if row is summary.best else BLUE


def _legend(figure: Figure, summary: Summary, rows: Sequence[Row], line: str) -> None:
    """`line`: the style of the line at the baseline, or "none"."""
    looks: dict[str, dict[str, Any]] = {}
    best = summary.best
    if best is not None and not best.is_baseline and best in rows:
        looks["best"] = {"marker": "o", "color": GREEN}
    if any(row.values and not row.is_baseline and row is not best for row in rows):
        looks["other settings" if "best" in looks else "settings"] = {"marker": "o", "color": BLUE}
    if summary.baseline is not None and summary.baseline.values:
        found = "baseline, the best" if best is summary.baseline else "baseline"
        looks[found] = {"marker": "s", "color": ORANGE, "linestyle": line, "linewidth": 1}
    if any(not row.values and row.pruned for row in rows):
        looks["pruned"] = {"marker": "|", "color": GREY, "markersize": 8}
    if any(not row.values and not row.pruned for row in rows):
        looks["failed"] = {"marker": "x", "color": "black"}
    handles = [Line2D([], [], label=k, **{"linestyle": "none", **v}) for k, v in looks.items()]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )


# Two axes


class Cells(NamedTuple):
    """The metric over two axes; rows and columns in the order of their labels."""

    columns: list[str]
    lines: list[str]
    means: Array
    """[lines, columns], NaN where nothing finished."""
    counts: NDArray[np.int64]
    unfinished: NDArray[np.int64]
    """Trials that were pruned or failed."""


def cells_of(summary: Summary, across: str, up: str) -> Cells:
    """Means over the finished trials in each cell; settings without one of the axes, a baseline
    without the other axis say, are in none."""
    rows = [row for row in summary.rows if across in row.setting and up in row.setting]
    column_of, columns = bins_of(distinct(rows, across))
    line_of, lines = bins_of(distinct(rows, up))
    values: dict[tuple[int, int], list[float]] = {}
    unfinished = np.zeros((len(lines), len(columns)), dtype=np.int64)
    for row in rows:
        cell = line_of[value_key(row.setting[up])], column_of[value_key(row.setting[across])]
        values.setdefault(cell, []).extend(row.values.values())
        unfinished[cell] += row.pruned + row.failed
    means, counts = np.full(unfinished.shape, np.nan), np.zeros_like(unfinished)
    for cell, found in values.items():
        counts[cell] = len(found)
        if found:
            means[cell] = np.mean(found)
    return Cells(columns, lines, means, counts, unfinished)


def heat_figure(summary: Summary, across: str, up: str) -> Figure:
    """The mean of the metric over two axes, deeper is better, with the number of trials."""
    cells = cells_of(summary, across, up)
    figure = new_figure(
        max(5.0, 2.6 + 1.15 * len(cells.columns)), max(3.4, 1.7 + 0.62 * len(cells.lines))
    )
    axes = figure.add_subplot()
    colours = _BEST_IS_DEEP if summary.mode == "min" else _BEST_IS_DEEP.reversed()
    known = bool(cells.counts.any())
    image = axes.imshow(cells.means, cmap=colours, origin="lower", aspect="auto")
    low, high = (np.nanmin(cells.means), np.nanmax(cells.means)) if known else (0.0, 1.0)
    image.set_clim(low, high if high > low else low + 1)
    for (line, column), mean in np.ndenumerate(cells.means):
        count, lost = cells.counts[line, column], cells.unfinished[line, column]
        if count:
            share = (mean - low) / (high - low) if high > low else 0.0
            deep = share < 0.45 if summary.mode == "min" else share > 0.55
            text, colour = f"{show_number(mean)}\nn={count}", "white" if deep else "black"
        else:
            text, colour = f"none of {lost}\nfinished" if lost else "", GREY
        axes.text(column, line, text, ha="center", va="center", color=colour, fontsize=8.5)
    axes.set_xticks(range(len(cells.columns)), cells.columns, fontsize=9)
    axes.set_yticks(range(len(cells.lines)), cells.lines, fontsize=9)
    axes.set(xlabel=across, ylabel=up)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if known:
        figure.colorbar(image, ax=axes, label=summary.label)
    base = summary.baseline
    beside = f"\nBaseline: {base.interval}" if base is not None and base.interval else ""
    figure.suptitle(f"Mean over n trials; deeper is better.{beside}", **TITLE_LEFT)
    return figure


# Cost


def cost_figure(summary: Summary) -> Figure:
    """Quality against device-seconds of each setting; those on the Pareto front are numbered, and
    named below."""
    front = summary.front
    names = _names(front)
    figure = new_figure(7.6, 4.2 + 0.19 * names.count("\n"))
    axes = figure.add_subplot()
    rows = [row for row in summary.rows if row.device_seconds is not None]
    costs = [row.device_seconds for row in rows if row.device_seconds is not None]
    log_metric = _metric_scale(axes, summary, rows)
    for row, cost in reversed(list(zip(rows, costs, strict=True))):  # the best is on top
        _draw_interval(axes, summary, row, cost, log_metric)
    axes.step(
        [row.device_seconds or 0.0 for row in front], [row.mean for row in front],
        where="post", color=GREY, linewidth=1, zorder=1,
    )  # fmt: skip
    for number, row in enumerate(front, start=1):
        # The numbers of neighbours on different sides of the front, which are free of each other.
        x, y = (-7, -5) if number % 2 else (7, 5)
        axes.annotate(
            str(number), (row.device_seconds or 0.0, row.mean), fontsize=9, fontweight="bold",
            xytext=(x, y if summary.mode == "min" else -y), textcoords="offset points",
            ha="center", va="center", path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=4,
        )  # fmt: skip
    if costs and min(costs) > 0 and max(costs) >= DECADE * min(costs):
        _show_scale(axes, Scale({}, True, decades(min(costs), max(costs)), None))
    axes.margins(x=0.08, y=0.1)
    axes.set_xlabel("device-seconds of the training steps of a run\n\n" + names, loc="left")
    style_axes(axes)
    figure.suptitle("What does quality cost? Numbered: the Pareto front", **TITLE_LEFT)
    _legend(figure, summary, rows, line="none")
    return figure


def _names(front: Sequence[Row]) -> str:
    lines = []
    for number, row in enumerate(front, start=1):
        name = f"{'baseline: ' if row.is_baseline else ''}{show_setting(row.setting)}"
        lines += wrap(name, 80, initial_indent=f"{number}  ", subsequent_indent="    ")
    return "\n".join(lines)


# Importance


def importance_figure(summary: Summary) -> Figure:
    """The share of the metric's variance that goes with each axis, the largest on top, and what
    chance gives."""
    parts = sorted(summary.importance, key=lambda part: part.share or 0.0)
    figure = new_figure(7.6, 1.6 + 0.5 * len(parts))
    axes = figure.add_subplot()
    for place, part in enumerate(parts):
        share = part.share or 0.0
        axes.barh(place, share, height=0.55, color=BLUE)
        if part.chance is not None:
            axes.vlines(part.chance, place - 0.4, place + 0.4, color="black", linewidth=2)
        axes.text(
            1.02, place, _meaning(part, summary.mode), va="center", fontsize=8.5, color="#333333",
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    axes.set_yticks(range(len(parts)), [part.axis for part in parts])
    axes.set(xlim=(0, 1), xlabel=f"share of the variance of {summary.metric}: η², or ρ² of ranks")
    style_axes(axes)
    axes.grid(visible=False, axis="y")
    figure.suptitle("Which axes matter? (ρ sees trends, no optimum in the middle)", **TITLE_LEFT)
    label = "95 % of shuffled results are left of this"
    handles = [Line2D([], [], color="black", linewidth=2, label=label)]
    figure.legend(handles=handles, loc="outside lower center", frameon=False, fontsize=9)
    return figure


def _meaning(part: Importance, mode: Mode) -> str:
    if part.value is None or part.share is None or part.chance is None:
        few = part.trials < FEWEST_TRIALS
        return f"unknown: {part.trials} of {FEWEST_TRIALS} trials" if few else "cannot be told"
    if not part.numeric:
        return f"η² = {part.value:.2f}, {part.trials} trials"
    better = "larger" if (part.value > 0) == (mode == "max") else "smaller"
    trend = f" ({better} is better)" if part.share > part.chance else ""
    return f"ρ = {part.value:.2f}{trend}, {part.trials} trials"
