"""DSM against DSM + CP on digits: 5 seeds each, equal training images, 95 % intervals.

`python benchmarks/digits_table.py` trains what is missing under runs/table, writes
benchmarks/results/digits_table.json and the pictures in docs/, and puts the table into README.md.
The difference is taken seed by seed: both objectives see the same images and noise.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from readme import put_into_readme
from scipy import stats

from cdm_ray import cluster
from cdm_ray.config import ImageConfig, load_config
from cdm_ray.report import RESULTS_FILE, RunSummary
from cdm_ray.training.launch import run_images

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "digits_table.json"
FIGURE = ROOT / "docs" / "digits_table.png"
PICTURES = {
    "samples_sde.png": "quickstart_samples.png",
    "cp_residual.png": "quickstart_cp_residual.png",
}
SEEDS = range(5)
COMMAND = "python benchmarks/digits_table.py"
METRICS = {
    "fd_digits_ode": "FD digits, ODE samples",
    "fd_digits_sde": "FD digits, SDE samples",
    "cp_residual": "CP residual × 1000",
}
SCALE = {"cp_residual": 1000.0}


@dataclass(frozen=True)
class Interval:
    """Mean and half width of the 95 % Student interval over seeds."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: np.ndarray) -> Interval:
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        return cls(float(values.mean()), float(half))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half_width:.3f}"


def configurations() -> dict[str, list[ImageConfig]]:
    storage = f"run.storage={ROOT / 'runs' / 'table'}"
    data = f"data.path={ROOT / 'data' / 'digits'}"
    return {
        name: [
            load_config(ImageConfig, "digits", [storage, data, f"run.seed={s}", *changes])
            for s in SEEDS
        ]
        for name, changes in {"DSM": ["cp.weight=0"], "DSM + CP": []}.items()
    }


def summaries() -> dict[str, list[RunSummary]]:
    """Results of all runs, seeds in order; trains those that are not finished."""
    configs = configurations()
    missing = [
        group[seed]
        for seed in SEEDS
        for group in configs.values()
        if not (group[seed].run_folder / RESULTS_FILE).is_file()
    ]
    if missing:
        with cluster.connected(missing[0].ray):
            for config in missing:
                run_images(config)
    return {
        name: [RunSummary.load(config.run_folder) for config in group]
        for name, group in configs.items()
    }


def collect(runs: dict[str, list[RunSummary]]) -> dict[str, dict[str, np.ndarray]]:
    return {
        name: {
            metric: np.array([run.metrics[metric] for run in group]) * SCALE.get(metric, 1.0)
            for metric in METRICS
        }
        for name, group in runs.items()
    }


def table(values: dict[str, dict[str, np.ndarray]], runs: dict[str, list[RunSummary]]) -> str:
    first = runs["DSM + CP"][0]
    n = int(first.metrics["fd_images"])
    lines = [
        "| | " + " | ".join(METRICS.values()) + " |",
        "|---" * (len(METRICS) + 1) + "|",
    ]
    for name, row in values.items():
        lines.append(f"| {name} | " + " | ".join(str(Interval.of(v)) for v in row.values()) + " |")
    difference = [Interval.of(values["DSM + CP"][m] - values["DSM"][m]) for m in METRICS]
    lines.append("| difference, seed by seed | " + " | ".join(map(str, difference)) + " |")
    verdicts = [
        "not distinguishable" if abs(d.mean) <= d.half_width else
        ("CP better" if d.mean < 0 else "CP worse")
        for d in difference
    ]  # fmt: skip
    lines.append("| verdict at 95 % | " + " | ".join(verdicts) + " |")
    return "\n".join(
        [
            f"Mean and 95 % interval over {len(SEEDS)} seeds; {first.images:,} training images "
            f"each, CP weight {first.cp_weight:g}; every Fréchet distance (FD) over n = {n:,} "
            f"generated and {int(first.metrics['fd_reference_images']):,} real images with the "
            f"`digits` feature network; lower is better. By `{COMMAND}`.",
            "",
            *lines,
        ]
    )


def draw(values: dict[str, dict[str, np.ndarray]]) -> None:
    """Every seed as a line from DSM to DSM + CP: is the change larger than the scatter?"""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (metric, title) in zip(
        figure.subplots(1, len(METRICS)), METRICS.items(), strict=True
    ):
        pairs = np.stack([group[metric] for group in values.values()])
        axes.plot([0, 1], pairs, color="#999999", marker="o", markersize=4, linewidth=1)
        for x, row in enumerate(pairs):
            interval = Interval.of(row)
            axes.errorbar(
                x + (0.08 if x else -0.08), interval.mean, interval.half_width,
                color="#0072b2", marker="s", capsize=4,
            )  # fmt: skip
        axes.set_xticks([0, 1], list(values))
        axes.set_xlim(-0.4, 1.4)
        axes.set_ylim(0, 1.15 * pairs.max())
        axes.set_title(title, fontsize=10)
    figure.suptitle("grey: the five seeds; blue: mean and 95 % interval", fontsize=9)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=120)


def copy_pictures(run: RunSummary) -> None:
    """Grid and curve of the run with seed 0, which is the quickstart's second run."""
    for path in map(Path, [*run.grids.values(), *run.figures.values()]):
        if path.name in PICTURES:
            shutil.copyfile(path, FIGURE.with_name(PICTURES[path.name]))


def main() -> None:
    runs = summaries()
    values = collect(runs)
    text = table(values, runs)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps(
            {
                "command": COMMAND,
                "versions": {n: version(n) for n in ("torch", "ray", "deepspeed")},
                "seeds": list(SEEDS),
                "values": {g: {m: v.tolist() for m, v in row.items()} for g, row in values.items()},
            },
            indent=1,
        )
    )
    draw(values)
    copy_pictures(runs["DSM + CP"][0])
    put_into_readme("digits table", text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
