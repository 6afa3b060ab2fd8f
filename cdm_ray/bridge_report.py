"""What `jobs/train_bridge.py` prints: the plan of a run before it starts, and its results."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from cdm_ray.bridges import bridge_of
from cdm_ray.config import BridgeConfig, to_yaml
from cdm_ray.errors import redact
from cdm_ray.report import Summary, resources_line
from cdm_ray.storage import AnyPath


@dataclass(frozen=True, kw_only=True)
class BridgeSummary(Summary):
    """`results.json` of a finished bridge."""

    iterations: int


def print_plan(config: BridgeConfig) -> None:
    """The resolved configuration, the resources and the cost of a run."""
    bridge_of(config)  # refuses what cannot be trained
    simulation, train = config.simulation, config.train
    print(redact(to_yaml(config)), end="")
    print(f"\nrun        {redact(str(config.run_folder))}")
    print(resources_line(config.ray))
    print(
        f"cost       {train.iterations:,} iterations of {simulation.paths} paths with "
        f"{simulation.steps} steps ({config.lane_paths} paths in each of {simulation.lanes} lanes),"
        f" {train.inner_steps} optimizer step(s) on {config.pairs:,} (path, time) pairs in each"
    )


def print_results(folder: AnyPath) -> None:
    """Table of the metrics, then the checkpoint and figures, and how to open the UI."""
    summary = BridgeSummary.load(folder)
    print_metrics(f"{summary.run} after {summary.iterations:,} iterations", summary.metrics)
    if summary.speed is not None:
        print(f"speed       {summary.speed:,.0f} path steps per second")
    print(f"checkpoint  {summary.checkpoint}")
    for name, path in summary.figures.items():
        print(f"{name:10}  {path}")
    print(f"\nopen the MLflow UI:  {summary.ui_command}")


def print_metrics(what: str, metrics: dict[str, float]) -> None:
    """Table of an evaluation."""
    console = Console(width=None if Console().is_terminal else 120)
    table = Table(title=f"{what}, averaged weights")
    table.add_column("what")
    count = int(metrics["paths"])
    table.add_column(f"value ± standard error (n={count:,} paths)", justify="right")
    for label, name in ROWS.items():
        if name in metrics:
            error = metrics.get(f"{name}_se")
            told = "" if error is None else f" ± {error:.2g}"
            table.add_row(label, f"{metrics[name]:.5g}{told}")
    console.print(table)


ROWS = {
    "KL(truth || model), nats": "kl_from_truth",
    "KL(model || truth), nats": "kl_to_truth",
    "share of states where the truth is known": "trusted_share",
    "path cost, without the last step": "cost",
    "distance from the end": "endpoint_error",
    "effective sample size of the weights": "ess",
    "log p(end | start) by the weights": "log_p",
    "lower bound of log p": "log_p_bound",
    "log p, truth": "log_p_truth",
}
"""What is shown of the metrics, by its label."""
