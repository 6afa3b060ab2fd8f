"""Sweeps on a real cluster: what they leave behind, and what a kill, Ctrl-C, a failing trial and a
request that does not fit change."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from mlflow import MlflowClient

from cdm_ray.config import BridgeConfig, load_config
from tests.cluster.commands import ROOT, only

SMALL = """
job: bridges
recipe: ou
set: {network.width: 8, simulation.paths: 16, simulation.steps: 10, train.iterations: 12,
  train.pairs: 64, train.inner_steps: 1, train.max_nonfinite_in_row: 2, eval.paths: 16,
  eval.course_paths: 16, eval.steps: 10, ray.max_failures: 0, ray.workers: 1}
axes:
  optimizer.lr: {choice: [0.01, 1.0e-9, 1.0e+30]}
baseline: {optimizer.lr: 0.003}
search: grid
scheduler: asha
rungs: 2
metric: kl_from_truth
"""
ONE_AT_A_TIME = "ray.cpus_per_worker=2"
"""Of the three that the cluster has: a trial starts when the workers of the one before are gone."""


@pytest.fixture
def sweep(tmp_path, head):
    """The command of a small sweep, its folder, and its environment."""
    (tmp_path / "small.yaml").write_text(SMALL)
    script = ROOT / "sweeps" / "tune_bridge.py"
    command = [sys.executable, str(script), "small.yaml", f"run.storage={tmp_path}/runs"]
    return command, tmp_path, head


def call(sweep, *more, code=0):
    command, folder, environment = sweep
    done = subprocess.run(
        [*command, *more], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def interrupted(sweep, kind, is_time, *more):
    """Start the sweep, and send a signal to it when it is time; returns how it ended."""
    command, folder, environment = sweep
    process = subprocess.Popen(
        [*command, *more], cwd=folder, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not is_time() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, kind)
    told, _ = process.communicate(timeout=100)
    return process.returncode, told


def files_of(folder, name):
    return {path.parent.name: path for path in folder.glob(f"runs/small-*/trials/*/{name}")}


def test_a_sweep_stopped_again_and_again_ends_with_all_it_found(sweep):
    folder = sweep[1]

    def two_have_finished():
        courses = files_of(folder, "trial.json").values()
        return sum(json.loads(file.read_text())["rung"] == 2 for file in courses) == 2

    code, _ = interrupted(sweep, signal.SIGKILL, two_have_finished, ONE_AT_A_TIME)
    assert code == -signal.SIGKILL
    finished = files_of(folder, "results.json")
    assert finished.keys() == {"optimizer.lr_0.003-seed0", "optimizer.lr_0.01-seed0"}
    written = {name: path.stat().st_mtime_ns for name, path in finished.items()}

    def another_has_begun():
        return len(files_of(folder, "trial.json")) == 3

    code, told = interrupted(sweep, signal.SIGINT, another_has_begun, ONE_AT_A_TIME)
    assert code == 130, told
    assert "run the same command again" in told
    root = only(folder.glob("runs/small-*"))
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    parent = json.loads((root / "mlflow_run.json").read_text())["run_id"]
    assert client.get_run(parent).info.status == "KILLED"

    told = call(sweep, ONE_AT_A_TIME)
    assert "[4/4 trials, best so far" in told
    for name, path in finished.items():
        assert path.stat().st_mtime_ns == written[name]  # not repeated
    rows = {row["optimizer.lr"]: row for row in csv.DictReader((root / "trials.csv").open())}
    # The rival that the pruned trial lost against reported before the kill.
    assert {lr: row["status"] for lr, row in rows.items()} == {
        "0.003": "finished", "1e-09": "pruned", "1e+30": "failed", "0.01": "finished"
    }  # fmt: skip
    assert int(rows["1e-09"]["optimizer_steps"]) == 6
    assert "left the domain" in rows["1e+30"]["failure"]
    assert "Failed:\n\n- optimizer.lr=1e+30, seed 0 (optimizer.lr_1e_30-seed0): iteration" in told
    assert "optimizer.lr=0.01 against the baseline: better by" in told
    best = load_config(BridgeConfig, str(root / "best.yaml"))
    assert (best.optimizer.lr, best.simulation.paths) == (0.01, 16)

    runs = {
        run.info.run_id: run
        for run in client.search_runs([client.get_run(parent).info.experiment_id])
    }
    assert runs[parent].info.status == "FINISHED"
    assert "better by" in runs[parent].data.tags["verdict"]
    children = [r for r in runs.values() if r.data.tags.get("mlflow.parentRunId") == parent]
    assert {run.data.params["optimizer.lr"]: run.info.status for run in children} == {
        "0.003": "FINISHED", "1e-09": "KILLED", "1e+30": "FAILED", "0.01": "FINISHED"
    }  # fmt: skip
    logged = {
        a.path for place in ("sweep", "figures") for a in client.list_artifacts(parent, place)
    }
    assert {"sweep/summary.md", "sweep/trials.csv", "sweep/best.yaml"} <= logged
    assert {"figures/metric_optimizer.lr.png", "figures/cost.png"} <= logged


def test_a_request_that_never_fits_is_refused_at_once(sweep):
    answer = call(sweep, "ray.workers=8", "simulation.lanes=8", code=2)
    assert (
        "error: ray.workers=8: a trial needs 8 workers with 1 CPU each, the cluster has room for 3 "
        "(1 node(s) with 3 CPUs and 0 GPUs together); use fewer or smaller workers"
    ) in answer
    assert not files_of(sweep[1], "trial.json")


def test_a_dry_run_lists_the_trials_and_what_they_need(sweep):
    told = call(sweep, "--dry-run")
    assert "optimizer.lr=0.003, seed 0" in told
    assert len([line for line in told.splitlines() if ", seed 0" in line]) == 4
    assert "each trial 1 worker(s) with 1 CPU(s)" in told
