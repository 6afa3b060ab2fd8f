"""docs/bridges.md and its figure from the results of benchmarks/bridges.py."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks import bridge_step
from benchmarks.bridge_runs import FEASIBLE, NEAR, Result, own_variant
from cdm_ray.config import BridgeConfig, load_config
from cdm_ray.sweep import intervals


class Interval(intervals.Interval):
    """As the tables show it."""

    def __str__(self) -> str:
        """The width to two digits, the mean as far; three digits without a width."""
        if not self.half_width:
            return f"{self.mean:.{_decimals(self.mean, 3)}f}"
        decimals = _decimals(self.half_width, 2)
        return f"{self.mean:.{decimals}f} ± {self.half_width:.{decimals}f}"


def _decimals(value: float, digits: int) -> int:
    """Decimals that show so many digits of a number, at most 6."""
    if value == 0:
        return 0
    return min(6, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


COLUMNS = {
    "KL(truth ‖ model)": ("kl_from_truth", 1.0),
    "KL(model ‖ truth)": ("kl_to_truth", 1.0),
    "cost": ("cost", 1.0),
    "ESS, %": ("ess", 100.0),
    "log p": ("log_p", 1.0),
    "bound of log p": ("log_p_bound", 1.0),
}
"""Metrics of the tables and their factors."""
KL = "kl_from_truth"
Groups = dict[str, list[Result]]
"""Results of the seeds by variant."""


def by_recipe(results: Iterable[Result]) -> dict[str, Groups]:
    """Results by recipe and variant, in the order in which they come, seeds in order."""
    grouped: dict[str, Groups] = defaultdict(lambda: defaultdict(list))
    for result in sorted(results, key=lambda result: result.seed):
        grouped[result.recipe][result.variant].append(result)
    return grouped


def table(groups: Groups, own: str | None = None) -> str:
    """Markdown: a line for each variant, that of the recipe, `own`, in bold; then how runs
    failed."""
    metrics = {name for runs in groups.values() for run in runs for name in run.metrics}
    columns = {label: column for label, column in COLUMNS.items() if column[0] in metrics}
    lines = [
        "| variant | " + " | ".join(columns) + " | paths of ESS, log p | CPU s | steps |",
        "|---" * (len(columns) + 4) + "|",
    ]
    failures = []
    for variant, runs in groups.items():
        sound = [run for run in runs if run.failure is None]
        failed = [run for run in runs if run.failure is not None]
        failures += [f"- {variant}, seed {run.seed}: {run.failure}" for run in failed]
        name = f"**{variant}**" if variant == own else variant
        if failed:
            name += f" ({len(failed)} of {len(runs)} failed)"
        cells = [_cell(sound, *column) for column in columns.values()]
        counts = [_mean(run.weighted_paths for run in sound), _seconds(runs)]
        steps = _mean(run.steps for run in runs)
        lines.append(f"| {name} | " + " | ".join([*cells, *counts, steps]) + " |")
    if failures:
        lines += ["", "Failed:", "", *failures]
    return "\n".join(lines)


def _cell(runs: list[Result], metric: str, factor: float) -> str:
    values = [run.metrics[metric] * factor for run in runs if metric in run.metrics]
    return str(Interval.of(values)) if values else "–"


def _mean(counts: Iterable[int]) -> str:
    found = [count for count in counts if count > 0]
    return f"{sum(found) / len(found):,.0f}" if found else "–"


def _seconds(runs: list[Result]) -> str:
    return f"{sum(run.seconds for run in runs) / len(runs):.1f}"


def truth_line(groups: Groups) -> str:
    """What is known of a problem beforehand."""
    for runs in groups.values():
        for run in runs:
            if "log_p_truth" in run.metrics:
                return f"log p(end | start) is {run.metrics['log_p_truth']:.4f}"
    return "no truth is known"


def draw(recipes: dict[str, Groups], path: Path) -> bool:
    """KL of every variant and seed where the truth is known; whether there was any."""
    known = {
        recipe: groups
        for recipe, groups in recipes.items()
        if any(KL in run.metrics for runs in groups.values() for run in runs)
    }
    if not known:
        return False
    across = min(3, len(known))
    down = math.ceil(len(known) / across)
    variants = list(dict.fromkeys(name for groups in known.values() for name in groups))
    figure = Figure(figsize=(2.2 + 3.4 * across, down * (1 + 0.22 * len(variants))))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for panel, (recipe, groups) in zip(axes, known.items(), strict=False):
        for row, variant in enumerate(variants):
            _draw_row(panel, row, groups.get(variant, []))
        panel.set_xscale("log")
        low, high = panel.get_xlim()
        subs = (1, 2, 5) if high < 300 * low else (1,)  # else the labels touch
        panel.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_title(recipe, fontsize=10)
        panel.set_xlabel("KL(truth ‖ model), nats", fontsize=8)
        panel.set_yticks(range(len(variants)), variants, fontsize=8)
        panel.tick_params(axis="x", labelsize=8)
        panel.grid(axis="x", color="#dddddd", linewidth=0.6)
        panel.set_ylim(len(variants) - 0.5, -0.5)
    for panel in axes[len(known) :]:
        panel.remove()
    legend = "grey: seeds; blue: mean and 95 % interval; cross: all seeds failed"
    figure.suptitle(legend, fontsize=9)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    return True


def _draw_row(panel: Axes, row: int, runs: list[Result]) -> None:
    values = [run.metrics[KL] for run in runs if KL in run.metrics]
    if values:
        interval = Interval.of(values)
        half = interval.half_width or 0.0
        lower = min(half, interval.mean - 0.5 * min(values))  # a log axis has no room below 0
        panel.plot(values, [row + 0.2] * len(values), "o", color="#999999", markersize=3)
        panel.errorbar(
            interval.mean, row, xerr=[[lower], [half]], color="#0072b2", marker="s",
            markersize=4, capsize=3,
        )  # fmt: skip
    elif any(run.failure is not None and run.steps for run in runs):
        panel.plot(0.97, row, "x", color="#d55e00", transform=panel.get_yaxis_transform())


FIGURE = "bridges_kl.png"
INTRODUCTION = """\
Mean and 95 % interval (Student) over seeds: of the weights, and of all noise in training and in
evaluation. Runs are short, so that these numbers compare variants and are not what a recipe
reaches. In bold: the setting of the recipe.

- KL(truth ‖ model) and KL(model ‖ truth), in nats, along paths of the first of both: the first is
  large where the model misses ways that the bridge takes, the second where it takes ways that the
  bridge does not. On a grid, states where the truth is not trusted count 0.
- Cost: mean of ½ ∫ |u|² dt over the model's own paths without the last time step. It compares at
  equal steps only, and lower is better for models of the same problem.
- ESS: effective sample size of the importance weights of the model's paths against the reference
  process, as a share of these paths, which are counted beside it. For rejection: the share of free
  paths that end within {near:g} σ √T of the end.
- log p: log p(end | start) of the Euler chain by the mean of these weights; its bound is the mean
  of their logarithm, which lies below log p in expectation.
- CPU s: training in one process with one thread, without the evaluation. Rivals that are not
  trained draw weighted paths for as long as the recipe's own variant trains; rejection is tried
  where more than {feasible:g} of the free paths end near the end.
- Adjoint matching regresses on the endpoint's score, carried back along the reference process's
  Jacobian, from the same anchored last step; the line SC2, endpoint carries it back by SC2."""


def write_document(about: dict[str, Any], results: list[Result], path: Path) -> None:
    """The document and, beside it, its figure; `about` each recipe as the results have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    recipes = by_recipe(results)
    figure = draw(recipes, path.with_name(FIGURE))
    path.write_text(document(about, recipes, figure=figure))


def document(about: dict[str, Any], recipes: dict[str, Groups], *, figure: bool) -> str:
    """Markdown: introduction, figure, a table for each recipe, cost of an iteration."""
    parts = [
        "What the variants of the control-consistency loss reach in equal short runs, and rivals "
        "at equal CPU time: measured, and written here, by `python benchmarks/bridges.py`.",
        "# Bridges: variants and rivals",
        INTRODUCTION.format(near=NEAR, feasible=FEASIBLE),
    ]
    if figure:
        parts.append(f"![KL of every variant]({FIGURE})")
    for recipe, groups in recipes.items():
        parts += section(recipe, groups, about[recipe])
    if bridge_step.RESULTS.is_file():
        measured = json.loads(bridge_step.RESULTS.read_text())
        parts += ["## Cost of an iteration", bridge_step.table(measured)]
    return "\n\n".join(parts) + "\n"


def section(recipe: str, groups: Groups, about: dict[str, Any]) -> Iterator[str]:
    settings = tuple(about["settings"])
    config = load_config(BridgeConfig, recipe, list(settings))
    simulation = config.simulation
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    yield f"## {recipe}"
    yield (
        f"{config.dim}-dimensional, T = {config.bridge.duration:g}; {truth_line(groups)}. "
        f"{config.train.iterations:,} iterations ({about['share']:g} of the recipe's) of "
        f"{simulation.paths} paths with {simulation.steps} steps, {about['seeds']} seeds; "
        f"evaluated on {config.eval.paths:,} paths with {config.eval.steps} steps."
    )
    yield table(groups, own_variant(recipe, settings))
    yield f"By `{about['command']}`, {about['date']}, {versions}."
