"""DSM against DSM + CP and against two baselines that cost nothing, on digits: 5 seeds each, equal
training images, 95 % intervals.

`python benchmarks/digits_table.py` trains and evaluates what is missing under runs/table, writes
benchmarks/results/digits_table.json and the pictures in docs/, and puts the table into README.md.
Differences are taken seed by seed: all variants see the same images and noise.
"""

from __future__ import annotations

import datetime
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
from cdm_ray.checkpoint import CONFIG_FILE, Checkpoint
from cdm_ray.config import ImageConfig, RayConfig, load_config
from cdm_ray.evaluation.launch import evaluate_checkpoint
from cdm_ray.report import RESULTS_FILE, RunSummary
from cdm_ray.training.image_run import run_images

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
BASELINE = "DSM"
TRAINED = {
    BASELINE: ["cp.weight=0"],
    "CP": [],
    "input perturbation": ["cp.weight=0", "dsm.input_perturbation=0.1"],
}
"""What is trained, as changes of the digits recipe."""
EPSILON_SCALE = 1.005
"""The one value tried, of those that Ning et al. (2024) use."""
Values = dict[str, dict[str, np.ndarray]]


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
    """Trained variants, seeds in order."""
    storage = f"run.storage={ROOT / 'runs' / 'table'}"
    data = f"data.path={ROOT / 'data' / 'digits'}"
    return {
        name: [
            load_config(ImageConfig, "digits", [storage, data, f"run.seed={s}", *changes])
            for s in SEEDS
        ]
        for name, changes in TRAINED.items()
    }


def summaries() -> dict[str, list[RunSummary]]:
    """Results of all training runs, seeds in order; trains those that are not finished."""
    configs = configurations()
    for seed in SEEDS:
        for group in configs.values():
            if not (group[seed].run_folder / RESULTS_FILE).is_file():
                run_images(group[seed])
    return {
        name: [RunSummary.load(config.run_folder) for config in group]
        for name, group in configs.items()
    }


def scaled_epsilon(runs: list[RunSummary]) -> list[dict[str, float]]:
    """Metrics of these runs' weights when the predicted noise is scaled while sampling."""
    found = []
    for run in runs:
        checkpoint = Checkpoint.open(Path(run.checkpoint))
        override = f"sampler.epsilon_scale={EPSILON_SCALE}"
        config = load_config(ImageConfig, str(checkpoint.folder / CONFIG_FILE), [override])
        found.append(evaluate_checkpoint(config, checkpoint, cluster.map_tasks).metrics)
    return found


def collect(metrics: dict[str, list[dict[str, float]]]) -> Values:
    return {
        name: {
            metric: np.array([one[metric] for one in group]) * SCALE.get(metric, 1.0)
            for metric in METRICS
        }
        for name, group in metrics.items()
    }


def verdict(difference: Interval) -> str:
    if abs(difference.mean) <= difference.half_width:
        return "not distinguishable"
    return "better" if difference.mean < 0 else "worse"


def table(values: Values, first: RunSummary) -> str:
    """Mean and interval of every variant; below, what each changes against DSM."""
    n = int(first.metrics["fd_images"])
    lines = [
        "| | " + " | ".join(METRICS.values()) + " |",
        "|---" * (len(METRICS) + 1) + "|",
    ]
    for name, row in values.items():
        lines.append(f"| {name} | " + " | ".join(str(Interval.of(v)) for v in row.values()) + " |")
    for name in list(values)[1:]:
        differences = [Interval.of(values[name][m] - values[BASELINE][m]) for m in METRICS]
        cells = [f"{difference}: {verdict(difference)}" for difference in differences]
        lines.append(f"| {name} less {BASELINE} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            f"Mean and 95 % interval over {len(SEEDS)} seeds, differences seed by seed; "
            f"{first.images:,} training images each; every Fréchet distance (FD) over n = {n:,} "
            f"generated and {int(first.metrics['fd_reference_images']):,} real images with the "
            f"`digits` feature network; lower is better. CP weight 1, input perturbation 0.1, "
            f"epsilon scaling {EPSILON_SCALE}: one value each, none of them tuned. By `{COMMAND}`.",
            "",
            *lines,
        ]
    )


def draw(values: Values) -> None:
    """Every seed as a line across the variants: is the change larger than the scatter?"""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    places = np.arange(len(values))
    for axes, (metric, title) in zip(
        figure.subplots(1, len(METRICS)), METRICS.items(), strict=True
    ):
        rows = np.stack([group[metric] for group in values.values()])
        axes.plot(places, rows, color="#999999", marker="o", markersize=4, linewidth=1)
        intervals = [Interval.of(row) for row in rows]
        axes.errorbar(
            places + 0.12, [i.mean for i in intervals], [i.half_width for i in intervals],
            color="#0072b2", marker="s", capsize=4, linestyle="none",
        )  # fmt: skip
        axes.set_xticks(places, [name.replace(" ", "\n") for name in values], fontsize=8)
        axes.set_xlim(-0.4, len(values) - 0.6)
        axes.set_ylim(0, 1.15 * rows.max())
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
    with cluster.connected(RayConfig()):
        runs = summaries()
        metrics = {name: [run.metrics for run in group] for name, group in runs.items()}
        metrics["epsilon scaling"] = scaled_epsilon(runs[BASELINE])
    values = collect(metrics)
    text = table(values, runs[BASELINE][0])
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps(
            {
                "command": COMMAND,
                "date": datetime.date.today().isoformat(),
                "versions": {n: version(n) for n in ("torch", "ray", "deepspeed")},
                "seeds": list(SEEDS),
                "trained": TRAINED,
                "epsilon_scale": EPSILON_SCALE,
                "values": {g: {m: v.tolist() for m, v in row.items()} for g, row in values.items()},
            },
            indent=1,
        )
    )
    draw(values)
    copy_pictures(runs["CP"][0])
    put_into_readme("digits table", text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
