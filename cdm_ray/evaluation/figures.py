"""What a person looks at: the sample grid and the drift curves, as PNG files.

Colours are Okabe and Ito's, distinguishable with every kind of colour blindness. No global state of
matplotlib is touched, so that figures can be made in threads and notebooks alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cdm_ray.evaluation.drift import STEP_COUNTS, Drift, Source
from cdm_ray.evaluation.estimate import Estimate
from cdm_ray.evaluation.generate import Kind
from cdm_ray.evaluation.plotting import save_figure
from cdm_ray.storage import AnyPath, whole_file

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
_TILE_PIXELS = 64
_GAP_PIXELS = 2
_GAP_COLOUR = 128


class Curve(NamedTuple):
    """Values with their standard errors at noise levels, [levels] each."""

    sigmas: NDArray[np.float64]
    values: NDArray[np.float64]
    errors: NDArray[np.float64]
    colour: str
    dashed: bool = False


def sample_grid(images: Tensor) -> Image.Image:
    """Images uint8 [N, C, H, W], C 1 or 3, in rows of about sqrt(N), enlarged without smoothing."""
    n, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = max(1, _TILE_PIXELS // max(height, width))
    step_y, step_x = height * scale + _GAP_PIXELS, width * scale + _GAP_PIXELS
    canvas = np.full(
        (rows * step_y + _GAP_PIXELS, columns * step_x + _GAP_PIXELS, channels),
        _GAP_COLOUR,
        dtype=np.uint8,
    )
    tiles = images.cpu().permute(0, 2, 3, 1).numpy().repeat(scale, axis=1).repeat(scale, axis=2)
    for index, tile in enumerate(tiles):
        top = _GAP_PIXELS + index // columns * step_y
        left = _GAP_PIXELS + index % columns * step_x
        canvas[top : top + height * scale, left : left + width * scale] = tile
    return Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas)


def save_grid(images: Tensor, path: AnyPath) -> None:
    """Write `sample_grid` as PNG; the same images give the same bytes."""
    with whole_file(path) as file:
        sample_grid(images).save(file, "PNG", compress_level=6)


def drift_figures(drift: Drift, folder: AnyPath) -> dict[str, AnyPath]:
    """Write the figures `cp_residual` and `noise_norm` of an evaluation into the folder."""
    paths = {name: folder / f"{name}.png" for name in ("cp_residual", "noise_norm")}
    save_sigma_figure(
        paths["cp_residual"],
        residual_curves(drift),
        title="Does the denoiser agree with itself along its own reverse SDE? (95 % intervals)",
        y_label="CP residual per dimension",
        zero_label="consistent",
    )
    save_sigma_figure(
        paths["noise_norm"],
        norm_curves(drift),
        title="Are the sampler's states where the noised data are? (95 % intervals)",
        y_label="norm of predicted noise (x - D)/σ:\nsampling against noised data, %",
        zero_label="no drift",
    )
    return paths


def residual_curves(drift: Drift) -> dict[str, Curve]:
    """CP residual of own samples and of noised data, for both numbers of rollout steps."""
    curves = {}
    shown: dict[Source, tuple[str, str]] = {
        "sde": ("own samples", BLUE),
        "data": ("noised data", ORANGE),
    }
    for source, (label, colour) in shown.items():
        for steps in reversed(STEP_COUNTS):
            found = Estimate.of(drift.parts[source].residuals[steps])
            name = f"{label}, {steps} rollout step{'s' if steps > 1 else ''}"
            dashed = steps != STEP_COUNTS[-1]
            curves[name] = Curve(drift.sigmas["sde"], found.mean, found.error, colour, dashed)
    return curves


def norm_curves(drift: Drift) -> dict[str, Curve]:
    """Mean norm in each sampler's states as excess over that on noised data, in percent."""
    curves = {}
    colours: dict[Kind, str] = {"sde": BLUE, "ode": GREEN}
    for kind, colour in colours.items():
        own = Estimate.of(drift.parts[kind].norms[kind])
        data = Estimate.of(drift.parts["data"].norms[kind])
        ratio = own.mean / data.mean
        error = ratio * np.hypot(own.error / own.mean, data.error / data.mean)
        curves[f"{kind.upper()} sampler"] = Curve(
            drift.sigmas[kind], 100 * (ratio - 1), 100 * error, colour
        )
    return curves


def save_sigma_figure(
    path: AnyPath, curves: Mapping[str, Curve], *, title: str, y_label: str, zero_label: str
) -> None:
    """Curves over the noise level with 95 % error bars and a labelled line at zero."""
    figure = Figure(figsize=(7.6, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(0, color=GREY, linewidth=1)
    beside_the_line = axes.get_yaxis_transform()
    axes.text(1.01, 0, zero_label, transform=beside_the_line, va="center", color=GREY, fontsize=9)
    for position, (label, curve) in enumerate(curves.items()):
        # A slight shift to the side keeps the error bars of different curves apart.
        axes.errorbar(
            curve.sigmas * 1.04 ** (position - (len(curves) - 1) / 2),
            curve.values,
            yerr=1.96 * curve.errors,
            label=label,
            color=curve.colour,
            linestyle="--" if curve.dashed else "-",
            linewidth=1.0 if curve.dashed else 1.8,
            elinewidth=1.2,
            marker="o",
            markerfacecolor="white" if curve.dashed else curve.colour,
            markersize=5,
            capsize=2.5,
        )
    _finish(axes, title, y_label)
    save_figure(figure, path)


def _finish(axes: Axes, title: str, y_label: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("noise level σ (standard deviation; images span -1 to 1)")
    axes.set_ylabel(y_label)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
