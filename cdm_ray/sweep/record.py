"""What a sweep leaves behind: tables, the best configuration, figures, on disk and in MLflow."""

from __future__ import annotations

from cdm_ray.config import SweepConfig, to_yaml
from cdm_ray.config.sweeps import overlay
from cdm_ray.storage import AnyPath, write_whole
from cdm_ray.sweep.figures import sweep_figures
from cdm_ray.sweep.settings import show_setting
from cdm_ray.sweep.summary import Row, Summary
from cdm_ray.sweep.tables import csv_text, markdown
from cdm_ray.tracking import RunHandle, Tracker

SUMMARY_FILE, BEST_FILE = "summary.md", "best.yaml"


def record_sweep(sweep: SweepConfig, summary: Summary, folder: AnyPath, parent: RunHandle) -> None:
    """Write everything into the sweep's folder, and log it to the sweep's MLflow run."""
    figures = folder / "figures"
    files = {
        "trials.csv": csv_text(summary),
        SUMMARY_FILE: markdown(summary),
        "sweep.yaml": to_yaml(sweep),
    }
    if summary.best is not None:
        files[BEST_FILE] = best_recipe(sweep, summary, summary.best)
    for name, text in files.items():
        write_whole(folder / name, text.encode())
    tracker = Tracker(parent)
    try:
        for name in files:
            tracker.log_artifact(folder / name, "sweep")
        for path in sweep_figures(summary, figures).values():
            tracker.log_figure(path)
        tracker.set_tag("verdict", summary.verdict)
        if summary.best is not None:
            tracker.log_metrics({f"best/{sweep.metric}": summary.best.mean}, 0)
    finally:
        tracker.close(timeout=30.0)


def best_recipe(sweep: SweepConfig, summary: Summary, row: Row) -> str:
    """A recipe file that the job takes as it is: the sweep's base with the setting of a row."""
    told = f"# Sweep {sweep.name}: {show_setting(row.setting)}\n# {summary.verdict}\n"
    return told + to_yaml(overlay(sweep.base, row.setting))
