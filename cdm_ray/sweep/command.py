"""The command line of the sweeps: `sweep.py [SWEEP] [sweep.field=value] [section.field=value]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cdm_ray import cluster
from cdm_ray.cli import exit_code
from cdm_ray.config import SweepConfig, describe, load_sweep, sweep_names
from cdm_ray.errors import redact
from cdm_ray.sweep.metrics import check_metric
from cdm_ray.sweep.record import SUMMARY_FILE
from cdm_ray.sweep.run import planned, run_sweep, sweep_folder
from cdm_ray.sweep.settings import show_setting


def run_sweep_job(
    description: str | None,
    folder: Path,
    default: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse the command line, and run or plan the sweep; names are those of the YAML files in
    `folder`. Returns the exit code, see `exit_code`; 130 after Ctrl-C."""
    names = ", ".join(sweep_names(folder))
    parser = argparse.ArgumentParser(
        description=description,
        epilog="\n".join(
            f"  {key} = {value}\n      {text}"
            for key, value, text in describe(SweepConfig, "sweep.")
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="SWEEP | field=value",
        help=f"a sweep ({names}) or a YAML file (default: {default}), then fields to change: "
        "sweep.FIELD of the sweep, section.field of all trials",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the trials, start nothing")
    options = parser.parse_intermixed_args(arguments)
    words = list(options.words)
    name = words.pop(0) if words and "=" not in words[0] else default

    def work() -> None:
        sweep = load_sweep(name, folder, words)
        check_metric(sweep)
        if options.dry_run:
            _print_plan(sweep)
            return
        with cluster.connected(sweep.base.ray, show_logs=False):
            done = run_sweep(sweep)
        print((done / SUMMARY_FILE).read_text())
        print(f"sweep  {redact(str(done))}")

    try:
        return exit_code(work)
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue the sweep", file=sys.stderr)
        return 130


def _print_plan(sweep: SweepConfig) -> None:
    ray = sweep.base.ray
    if sweep.search == "optuna":
        print(f"{sweep.trials} trials, chosen one after the other; the first is the baseline")
    else:
        for setting, seed in planned(sweep):
            print(f"{show_setting(setting)}, seed {seed}")
    gpus = "" if ray.use_gpu is False else f", or {ray.gpus_per_worker:g} GPU where there are any"
    print(f"each trial {ray.workers} worker(s) with {ray.cpus_per_worker:g} CPU(s){gpus}")
    print(f"folder     {redact(str(sweep_folder(sweep)))}")
