"""Runs in an object store: a real server, which speaks S3 and forgets everything at its end."""

import contextlib
import json
import re
import runpy
import subprocess
import sys
import tempfile

import pytest
import s3fs
from mlflow import MlflowClient

from cdm_ray import cluster
from cdm_ray.checkpoint import CHECKPOINTS, newest_checkpoint
from cdm_ray.config import BridgeConfig, load_config
from cdm_ray.errors import ConfigError
from cdm_ray.training.bridge_run import run_bridge
from tests.cluster.commands import ROOT, only
from tests.cluster.conftest import free_port, wait_for

SMALL = [
    "run.name=far",
    "network.width=8",
    "optimizer.schedule=constant",
    "simulation.paths=16",
    "train.pairs=64",
    "train.log_every=1",
    "checkpoint.every_iterations=4",
    "checkpoint.keep_last=2",
    "eval.every_iterations=8",
    "eval.course_paths=32",
    "eval.paths=64",
    "eval.steps=50",
    "ray.workers=1",
]


@pytest.fixture(scope="module", autouse=True)
def store():
    """The client of a store with an empty bucket; named by the environment, as on a cluster."""
    url = f"http://127.0.0.1:{free_port()}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "--port", url.rpartition(":")[2]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        try:
            wait_for(url)
            client = s3fs.S3FileSystem(use_listings_cache=False)
            client.mkdir("bucket")
            yield client
        finally:
            server.terminate()
            server.wait(timeout=60)


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_is_trained_continued_and_evaluated_in_an_object_store(
    store, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    where = ["run.storage=s3://bucket/runs", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]

    def train(iterations):
        length = f"train.iterations={iterations}"
        folder = run_bridge(load_config(BridgeConfig, "ou", [*SMALL, *where, length]))
        assert str(folder) == "s3://bucket/runs/far"
        return newest_checkpoint(folder / CHECKPOINTS)

    first, last = train(6), train(12)
    per_iteration = first.state.step // 6
    assert last.state.step == 12 * per_iteration
    names = [path.rpartition("/")[2] for path in store.ls("bucket/runs/far/checkpoints")]
    assert names == [f"step-{iteration * per_iteration:08d}" for iteration in (8, 12)]
    results = json.loads(store.cat("bucket/runs/far/results.json"))
    for figure in results["figures"].values():
        assert store.cat(figure).startswith(b"\x89PNG")

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = only(client.search_runs([client.get_experiment_by_name("cdm_ray").experiment_id]))
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "loss/control")
    assert [point.step for point in losses] == list(range(1, last.state.step + 1))  # none twice
    course = client.get_metric_history(run.info.run_id, "eval/kl_from_truth")
    assert [point.step // per_iteration for point in course] == [6, 8, 12]
    assert len(client.list_artifacts(run.info.run_id, "figures")) == 4

    monkeypatch.setattr(cluster, "connected", lambda _: contextlib.nullcontext())  # it is
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "s3://bucket/runs/far", "eval.paths=32"])
    capfd.readouterr()
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "jobs" / "evaluate.py"), run_name="__main__")
    told = capfd.readouterr().out
    (line,) = [line for line in told.splitlines() if line.startswith("results")]
    assert "effective sample size" in told
    assert json.loads(store.cat(line.split()[1]))["metrics"]["paths"] == 32

    weights = f"{last.folder}/ema.safetensors"
    content = bytearray(store.cat(weights))
    content[-1] ^= 1
    store.pipe(weights, bytes(content))
    assert newest_checkpoint(last.folder.parent).state.step == 8 * per_iteration


@pytest.mark.usefixtures("ray_cluster")
def test_a_bucket_that_is_not_there_is_refused_and_not_made(store):
    config = load_config(BridgeConfig, "ou", ["run.storage=s3://bukcet/runs"])
    told = "s3://bukcet/runs: cannot be written to (The specified bucket does not exist); "
    with pytest.raises(ConfigError, match=f"^run.storage={re.escape(told)}"):
        run_bridge(config)
    assert not store.exists("bukcet")
