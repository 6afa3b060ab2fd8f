"""What a job prints: the plan of a run before it starts, and the table of finished runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from rich.console import Console
from rich.table import Table

from cdm_ray.config import ImageConfig, RayConfig, to_yaml
from cdm_ray.errors import ConfigError, redact
from cdm_ray.objectives.cp import forward_units
from cdm_ray.storage import AnyPath, matching, write_whole

RESULTS_FILE = "results.json"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """`results.json` of a finished run, whatever it trained."""

    run: str
    recipe: str
    seed: int
    metrics: dict[str, float]
    checkpoint: str
    figures: dict[str, str]
    ui_command: str
    speed: float | None
    """Images or path steps per second of training, the median; None if it was not measured."""
    training_seconds: float | None
    """That its steps take at this speed."""

    @classmethod
    def load(cls, folder: AnyPath) -> Self:
        return cls(**json.loads((folder / RESULTS_FILE).read_text()))

    def save(self, folder: AnyPath) -> None:
        write_whole(folder / RESULTS_FILE, json.dumps(vars(self), indent=1).encode())


def pace_before(folder: AnyPath) -> tuple[float | None, float | None]:
    """Speed and training seconds of a run that is evaluated again, not trained; if known."""
    if not (folder / RESULTS_FILE).is_file():
        return None, None
    content = json.loads((folder / RESULTS_FILE).read_text())
    return content["speed"], content["training_seconds"]


@dataclass(frozen=True, kw_only=True)
class RunSummary(Summary):
    """Of an image run."""

    cp_weight: float
    images: int
    grids: dict[str, str]


def print_plan(config: ImageConfig) -> None:
    """The resolved configuration, the resources and the cost of a run."""
    train = config.train
    ends = [*config.segments, config.steps]
    costs = [forward_units(part.cp) for part in config.segments.values()]
    units = (
        sum(cost * (end - start) for cost, (start, end) in zip(costs, pairwise(ends), strict=True))
        / config.steps
    )
    print(redact(to_yaml(config)), end="")
    print(f"\nrun        {redact(str(config.run_folder))}")
    print(resources_line(config.ray))
    print(
        f"cost       {config.steps} steps of {train.batch} images "
        f"({config.lane_batch} in each of {config.data.lanes} lanes); {units:g} forward passes "
        f"per image, {units / 3:.2f} times denoising score matching alone"
    )


def resources_line(ray: RayConfig) -> str:
    """What a run asks of the cluster."""
    gpu = {"auto": "a GPU each if the cluster has them", True: "a GPU each", False: "no GPU"}
    workers = f"{ray.workers} worker{'s' if ray.workers > 1 else ''}"
    return f"resources  {workers}, {ray.cpus_per_worker:g} CPU and {gpu[ray.use_gpu]}"


def finished_runs(storage: AnyPath, recipe: str) -> list[AnyPath]:
    """Folders of the finished runs of a recipe; raises ConfigError if there is none."""
    found = matching(storage, f"*/{RESULTS_FILE}")
    folders = [p.parent for p in found if json.loads(p.read_text())["recipe"] == recipe]
    if not folders:
        raise ConfigError(
            f"run.storage={redact(str(storage))}: no finished run of recipe {recipe}; "
            f"make one with `python jobs/train_cp.py {recipe}`"
        )
    return folders


def print_results(folders: Sequence[AnyPath]) -> None:
    """Table of the runs, then their checkpoints and grids, and how to open the UI."""
    summaries = sorted((RunSummary.load(f) for f in folders), key=lambda s: (s.cp_weight, s.seed))
    console = Console(width=None if Console().is_terminal else 120)
    table = Table(title="averaged weights; lower is better but for images/s")
    rows = [_row(summary) for summary in summaries]
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "run" else "right")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    for summary in summaries:
        print(f"{summary.run}\n  checkpoint  {summary.checkpoint}")
        for name, path in (summary.grids | summary.figures).items():
            print(f"  {name:10}  {path}")
    print(f"\nopen the MLflow UI:  {summaries[-1].ui_command}")


def _row(summary: RunSummary) -> dict[str, str]:
    metrics = summary.metrics
    count = int(metrics["fd_images"])
    row = {
        "run": summary.run,
        "objective": f"DSM + {summary.cp_weight:g} CP" if summary.cp_weight else "DSM",
        "images": f"{summary.images:,}",
    }
    for name, value in metrics.items():
        if re.fullmatch(r"(fid|fd_\w+)_(ode|sde)", name):
            row[f"{name} (n={count:,})"] = f"{value:.3f}"
    row["CP residual"] = f"{metrics['cp_residual']:.2e} ± {metrics['cp_residual_se']:.0e}"
    row["images/s"] = "-" if summary.speed is None else f"{summary.speed:,.0f}"
    return row
