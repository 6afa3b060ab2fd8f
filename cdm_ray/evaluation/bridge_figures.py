"""What a person looks at after a bridge was learned, as PNG files: paths, marginals over time,
and drift.

The model is blue and solid in all figures, the truth orange and dashed. The model's drift is
b + a g, from its score g. States are those of the bridge, for a Cox-Ingersoll-Ross process
Lamperti's; the axes say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from cdm_ray.evaluation.bridge_truth import GaussianTruth, Truth
from cdm_ray.evaluation.figures import BLUE, GREY, ORANGE
from cdm_ray.evaluation.plotting import TITLE_LEFT, new_figure, save_figure, style_axes
from cdm_ray.processes.bridge import Bridge
from cdm_ray.processes.references import CoxIngersollRoss, GradientProcess, ReferenceProcess
from cdm_ray.processes.rollout import Field
from cdm_ray.processes.simulation import Paths, simulate
from cdm_ray.storage import AnyPath

Array = NDArray[np.float64]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
DRAWN_PATHS = 40
DRAWN_IN_THE_PLANE = 16
TRUE_PATHS = 1000
SHARES = (0.1, 0.4, 0.7, 0.9)
"""Of the duration, where drifts are shown; they diverge at its end."""
INNER = (0.01, 0.99)
"""Quantiles between which paths count as being somewhere."""
WIDENED = 0.15
"""What is shown on each side of that range, as part of its width."""
_MESH = 160
_PATHS_QUESTION = "How does the model get from start to end?"
_SCATTER_TIMES, _SCATTER_PATHS = 40, 50
_DEEP_TO_HIGH = LinearSegmentedColormap.from_list("deep to high", ["#a0a0a0", "#ffffff"])


def bridge_figures(
    bridge: Bridge, score: Field, paths: Paths, truth: Truth | None, folder: AnyPath
) -> dict[str, AnyPath]:
    """Write the figures `paths`, `marginals` and `drift` of a model into the folder.

    `score` is the model's g, `paths` the model's own [K + 1, N, d], all of them finite. Without a
    truth its marginals are left out, and the learned drift is shown against the reference's.
    """
    files = {name: folder / f"{name}.png" for name in ("paths", "marginals", "drift")}
    save_figure(paths_figure(bridge, paths), files["paths"])
    exact = None if truth is None else true_paths(bridge, truth, paths)
    save_figure(marginals_figure(bridge, paths, exact), files["marginals"])
    save_figure(drift_figure(bridge, score, paths, truth), files["drift"])
    return files


# What is shown, as numbers


def true_paths(bridge: Bridge, truth: Truth, like: Paths) -> Paths:
    """Up to 1000 paths of the exact bridge at the times of `like`: exact ones where the truth has
    them in closed form, otherwise simulated in the same steps with its score, always with the same
    noise."""
    count = min(like.states.shape[1], TRUE_PATHS)
    shape = len(like.times) - 1, count, bridge.process.dim
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(like.states)
    if isinstance(truth, GaussianTruth):
        return Paths(truth.bridge(bridge.start, like.times, noise), like.times)
    start = bridge.start.to(noise).expand_as(noise[0])
    return simulate(
        _comparison(bridge, truth), bridge.process, start, like.times, noise, pinned=True
    )


def bridge_drift(bridge: Bridge, score: Field) -> Field:
    """b + a g for a score g and a = sigma^2."""

    def drift(x: Tensor, t: Tensor) -> Tensor:
        sigma = bridge.process.sigma(t).to(x).reshape(-1, 1)
        return bridge.process.drift(x) + sigma**2 * score(x, t)

    return drift


def quantile_bands(states: Array) -> Array:
    """`QUANTILES` over the paths at each time: [K + 1, N] -> [5, K + 1]."""
    return np.quantile(states, QUANTILES, axis=1)


def shown_range(values: Array) -> tuple[float, float]:
    """From the 1 to the 99 % quantile of all values, widened by 15 % of that on each side, or by 1
    where all of them are equal."""
    low, high = np.quantile(values, INNER)
    margin = WIDENED * (high - low) or 1.0
    return float(low - margin), float(high + margin)


class Scatter(NamedTuple):
    """Drifts at random states of the model's paths, [N, d], and their times [N]."""

    learned: Array
    compared: Array
    times: Array


@torch.no_grad()
def drift_scatter(bridge: Bridge, score: Field, paths: Paths, truth: Truth | None) -> Scatter:
    """The learned drift and the true one, or the reference's without a truth, at times until
    0.9 T."""
    states, times = paths.states, paths.times
    rng = np.random.default_rng(0)
    latest = index_at(paths, SHARES[-1])
    chosen = np.unique(np.linspace(0, latest, _SCATTER_TIMES).round().astype(int))
    learned, compared = bridge_drift(bridge, score), _comparison(bridge, truth)
    points = []
    for k in chosen.tolist():
        pick = rng.choice(states.shape[1], min(_SCATTER_PATHS, states.shape[1]), replace=False)
        x, t = states[k, torch.from_numpy(pick).to(states.device)], times[k]
        points.append((_numpy(learned(x, t)), _numpy(compared(x, t)), np.full(len(x), t.item())))
    columns = [np.concatenate(column) for column in zip(*points, strict=True)]
    mixed = rng.permutation(len(columns[0]))  # so that late points do not cover the early ones
    return Scatter(*(column[mixed] for column in columns))


def index_at(paths: Paths, share: float) -> int:
    """The step before the last whose time is next to this share of the duration."""
    distance = (paths.times - share * paths.times[-1]).abs()
    return int(distance[:-1].argmin())


# Figures


def paths_figure(bridge: Bridge, paths: Paths) -> Figure:
    """A few dozen paths: over time in 1-D, else in the plane of the first two coordinates."""
    if bridge.process.dim == 1:
        return _paths_over_time(bridge, paths)
    return _paths_in_the_plane(bridge, paths)


def _paths_over_time(bridge: Bridge, paths: Paths) -> Figure:
    figure, process = new_figure(7.6, 4.4), bridge.process
    states = _numpy(paths.states[:, :DRAWN_PATHS, 0])
    low, high = _box(states)
    x = np.linspace(low, high, 401)
    potential = _potential(process, x[:, None])
    if potential is None:
        axes = figure.add_subplot()
    else:
        axes, side = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
        deep, highest = _worth_showing(potential, _potential(process, states.reshape(-1, 1)))
        left = deep - 0.03 * (highest - deep)
        side.fill_betweenx(x, left, potential, color="#d9d9d9")
        side.plot(potential, x, color=GREY, linewidth=1.2)
        side.set(xlim=(left, highest), xlabel="potential U")
        style_axes(side)
    axes.plot(_numpy(paths.times), states, color=BLUE, linewidth=0.7, alpha=0.45)
    _mark_ends(figure, axes, (0.0, bridge.start.item()), (bridge.duration, bridge.end.item()))
    axes.set(ylim=(low, high), xlabel="time t", ylabel=_state_label(process))
    style_axes(axes)
    figure.suptitle(f"{_PATHS_QUESTION} {states.shape[1]} of its paths", **TITLE_LEFT)
    return figure


def _paths_in_the_plane(bridge: Bridge, paths: Paths) -> Figure:
    figure, dim = new_figure(6.6, 5.8), bridge.process.dim
    axes = figure.add_subplot()
    states = _numpy(paths.states[:, :DRAWN_IN_THE_PLANE, :2])
    start, end = _numpy(bridge.start[:2]), _numpy(bridge.end[:2])
    box = [_box(np.append(states[:, :, i], (start[i], end[i]))) for i in range(2)]
    over = _background(figure, axes, bridge.process, states, box) if dim == 2 else ""
    for path in states.swapaxes(0, 1):
        axes.plot(*path.T, color=BLUE, linewidth=0.7, alpha=0.55)
    _mark_ends(figure, axes, start, end)
    axes.set(xlim=box[0], ylim=box[1], xlabel="x₁", ylabel="x₂")
    axes.spines[["top", "right"]].set_visible(False)
    hidden = "" if dim == 2 else f",\nthe first two of {dim} coordinates"
    figure.suptitle(f"{_PATHS_QUESTION} {states.shape[1]} of its paths{over}{hidden}", **TITLE_LEFT)
    return figure


def _background(
    figure: Figure,
    axes: Axes,
    process: ReferenceProcess,
    states: Array,
    box: list[tuple[float, float]],
) -> str:
    """The potential, or the stream of a drift that has none; says what it is."""
    first, second = (np.linspace(*side, _MESH) for side in box)
    mesh = np.stack(np.meshgrid(first, second), axis=-1)
    if not isinstance(process, GradientProcess):
        drift = _numpy(process.drift(torch.from_numpy(mesh.reshape(-1, 2)))).reshape(mesh.shape)
        along_first, along_second = drift[..., 0], drift[..., 1]
        axes.streamplot(
            first, second, along_first, along_second, color="#b0b0b0", linewidth=0.8, zorder=0
        )
        return ",\nover the stream of the reference drift b"
    potential = _potential(process, mesh.reshape(-1, 2))
    if potential is None:
        return ""
    shown = _worth_showing(potential, _potential(process, states.reshape(-1, 2)))
    field = first, second, potential.reshape(_MESH, _MESH), MaxNLocator(14).tick_values(*shown)
    filled = axes.contourf(*field, cmap=_DEEP_TO_HIGH, extend="max", zorder=0)
    axes.contour(*field, colors="white", linewidths=0.6, linestyles="solid", zorder=0)
    figure.colorbar(filled, ax=axes, label="potential U", shrink=0.9)
    return ",\nover the potential"


def _worth_showing(potential: Array, along_paths: Array | None) -> tuple[float, float]:
    """The lowest of the potential's values, and a bit more than what 90 % of the paths' states
    have: elsewhere it may be higher by orders of magnitude."""
    deep = float(np.nanmin(potential))
    usual = np.nanquantile(potential if along_paths is None else along_paths, 0.9)
    return deep, deep + 1.5 * float(usual - deep)


def _box(values: Array) -> tuple[float, float]:
    """All values, and a margin."""
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def marginals_figure(bridge: Bridge, paths: Paths, exact: Paths | None) -> Figure:
    """Quantiles over time of the first two coordinates, and their density at the time of
    the widest spread."""
    own, times = _numpy(paths.states), _numpy(paths.times)
    true = None if exact is None else _numpy(exact.states)
    dim = own.shape[2]
    rows = min(dim, 2)
    figure = new_figure(7.6, 3.8 if rows == 1 else 6.4)
    grid = figure.subplots(
        rows, 2, sharey="row", sharex="col", squeeze=False, width_ratios=(3.2, 1)
    )
    for coordinate, (over_time, at_once) in enumerate(grid):
        mine = own[:, :, coordinate]
        truly = None if true is None else true[:, :, coordinate]
        widest = int((mine if truly is None else truly).std(1).argmax())
        _draw_bands(over_time, times, mine, truly)
        over_time.axvline(times[widest], color=GREY, linewidth=1, linestyle=":")
        _draw_densities(at_once, mine[widest], None if truly is None else truly[widest])
        over_time.set_ylabel(_state_label(bridge.process) if dim == 1 else f"x{'₁₂'[coordinate]}")
        at_once.set_title(f"at t = {times[widest]:.3g} (dotted)", loc="left", fontsize=9)
        for axes in (over_time, at_once):
            style_axes(axes)
    grid[-1, 0].set_xlabel("time t")
    grid[-1, 1].set_xlabel("density")
    handles = [
        Line2D([], [], color=BLUE, label="model: median"),
        Patch(color=BLUE, alpha=0.45, linewidth=0, label="50 %"),
        Patch(color=BLUE, alpha=0.2, linewidth=0, label="90 % of paths"),
    ]
    title = "Where are the model's paths over time?"
    if true is not None:
        title = "Are the model's paths where those of the exact bridge are?"
        same = "exact: the same quantiles"
        handles.append(Line2D([], [], color=ORANGE, linestyle="--", label=same))
    figure.suptitle(
        title if dim <= 2 else f"{title} (the first two of {dim} coordinates)", **TITLE_LEFT
    )
    _legend_below(figure, handles)
    return figure


def _draw_bands(axes: Axes, times: Array, own: Array, true: Array | None) -> None:
    lowest, low, median, high, highest = quantile_bands(own)
    axes.fill_between(times, lowest, highest, color=BLUE, alpha=0.2, linewidth=0)
    axes.fill_between(times, low, high, color=BLUE, alpha=0.3, linewidth=0)
    axes.plot(times, median, color=BLUE, linewidth=1.8)
    if true is not None:
        axes.plot(times, quantile_bands(true).T, color=ORANGE, linewidth=1.2, linestyle="--")


def _draw_densities(axes: Axes, own: Array, true: Array | None) -> None:
    edges = np.linspace(*shown_range(own if true is None else np.append(own, true)), 26)

    def outline(values: Array, **looks: Any) -> None:
        density = np.histogram(values, edges)[0] / len(values) / np.diff(edges)
        axes.stairs(density, edges, orientation="horizontal", **looks)

    outline(own, color=BLUE, alpha=0.3, fill=True)
    outline(own, color=BLUE, linewidth=1.4)
    if true is not None:
        outline(true, color=ORANGE, linewidth=1.4, linestyle="--")


def drift_figure(bridge: Bridge, score: Field, paths: Paths, truth: Truth | None) -> Figure:
    """The learned against the true drift, or against the reference's where no truth is known."""
    if bridge.process.dim == 1:
        return _drift_curves(bridge, score, paths, truth)
    return _drift_clouds(bridge, score, paths, truth)


@torch.no_grad()
def _drift_curves(bridge: Bridge, score: Field, paths: Paths, truth: Truth | None) -> Figure:
    figure = new_figure(7.6, 6.0)
    grid = figure.subplots(2, 2)
    learned, compared = bridge_drift(bridge, score), _comparison(bridge, truth)
    question, looks = "Is the learned drift the exact one?", {"color": ORANGE, "linestyle": "--"}
    if truth is None:
        question, looks = "How does the learned drift steer?", {"color": GREY, "linestyle": ":"}
    for axes, share in zip(grid.flat, SHARES, strict=True):
        k = index_at(paths, share)
        there, t = _numpy(paths.states[k, :, 0]), paths.times[k]
        x = np.linspace(*shown_range(there), 200)
        states = torch.from_numpy(x[:, None]).to(paths.states)
        axes.axvspan(*np.quantile(there, INNER), color="#eeeeee", zorder=0)
        axes.plot(x, _numpy(learned(states, t)), color=BLUE, linewidth=1.8, label="model")
        name = "reference drift b" if truth is None else "exact"
        axes.plot(x, _numpy(compared(states, t)), linewidth=1.6, label=name, **looks)
        axes.set_title(f"t = {t.item():.3g}", loc="left", fontsize=10)
        axes.locator_params("x", nbins=6)
        style_axes(axes)
    for axes in grid[:, 0]:
        axes.set_ylabel("drift b + σ²g")
    for axes in grid[1]:
        axes.set_xlabel(_state_label(bridge.process))
    grid[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"{question} Grey: where 98 % of the model's paths are", **TITLE_LEFT)
    return figure


def _drift_clouds(bridge: Bridge, score: Field, paths: Paths, truth: Truth | None) -> Figure:
    cloud, dim = drift_scatter(bridge, score, paths, truth), bridge.process.dim
    panels = {"x₁": [0], "x₂": [1]} if dim == 2 else {f"all {dim} coordinates": list(range(dim))}
    figure = new_figure(8.2 if dim == 2 else 5.6, 4.4 if dim == 2 else 5.0)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, columns) in zip(grid, panels.items(), strict=True):
        across, up = cloud.compared[:, columns], cloud.learned[:, columns]
        axes.axline((0, 0), slope=1, color=GREY, linewidth=1, zorder=0)
        colours = np.repeat(cloud.times, len(columns))
        points = axes.scatter(across, up, c=colours, s=6, cmap="viridis", linewidths=0)
        sizes = f"rms {_rms(up):.3g}, of the difference {_rms(up - across):.3g}"
        axes.set_title(f"{name}: {sizes}", loc="left", fontsize=10)
        axes.set_xlabel("reference drift b" if truth is None else "exact drift b + σ²g")
        axes.locator_params("x", nbins=5)  # labels such as −12.5 are wide
        style_axes(axes)
    grid[0].set_ylabel("learned drift b + σ²g")
    figure.colorbar(points, ax=grid, label="time t")
    if truth is not None:
        title = "Is the learned drift the exact one? On the line it is"
    else:
        title = "How does the learned drift steer? On the line it does not"
    figure.suptitle(title, **TITLE_LEFT)
    return figure


def _state_label(process: ReferenceProcess) -> str:
    """Of the axis of a state in one dimension."""
    if isinstance(process, CoxIngersollRoss):
        return "Lamperti's y = 2√x / volatility"
    return "state x"


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _legend_below(figure: Figure, handles: list[Any]) -> None:
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )


def _mark_ends(
    figure: Figure, axes: Axes, start: Sequence[float] | Array, end: Sequence[float] | Array
) -> None:
    for place, filling, label in ((start, "white", "start"), (end, "black", "end")):
        axes.plot(
            *place, "o", color="black", markerfacecolor=filling, markersize=7, label=label,
            zorder=5, linestyle="none", clip_on=False,
        )  # fmt: skip
    _legend_below(figure, axes.get_legend_handles_labels()[0])


@torch.no_grad()
def _potential(process: ReferenceProcess, x: Array) -> Array | None:
    """U: [M, d] -> [M], NaN where it is not finite; None if there is none, or it is constant."""
    if not isinstance(process, GradientProcess):
        return None
    potential = _numpy(process.potential(torch.from_numpy(x)))
    if np.ptp(potential) == 0:
        return None
    return np.where(np.isfinite(potential), potential, np.nan)


def _comparison(bridge: Bridge, truth: Truth | None) -> Field:
    """The exact bridge's drift, or the reference's."""
    if truth is None:
        return lambda x, _: bridge.process.drift(x)
    return bridge_drift(bridge, lambda x, t: truth.score(x, t.item()))


def _numpy(values: Tensor) -> Array:
    return values.detach().to("cpu", torch.float64).numpy()
