"""Evaluations during a real training run: at their steps, on its MLflow run, whatever crashes."""

import json
import os
import signal

import pytest
from mlflow import MlflowClient

from cdm_ray.config import ImageConfig, load_config
from cdm_ray.training import image_run
from cdm_ray.training.image_run import run_images

pytestmark = pytest.mark.usefixtures("ray_cluster")


def config_in(folder):
    """24 steps with evaluations after 8, 16 and, as ever, 24."""
    return load_config(
        ImageConfig,
        "digits",
        [
            f"data.path={folder}/data",
            f"run.storage={folder}/runs",
            "run.name=evaluated",
            "network.model_channels=8",
            "train.images=3072",
            "eval.every_kimg=1",
            "eval.images=80",
            "eval.batch=40",
            "eval.grid=4",
            "eval.drift_images=4",
            "eval.drift_sigmas=2",
            "sampler.ode_steps=2",
            "sampler.sde_steps=2",
        ],
    )


class Killed:
    """map_tasks whose first task kills its own process by SIGKILL, once."""

    def __init__(self, map_tasks, marker):
        self.map_tasks, self.marker = map_tasks, marker

    def __call__(self, function, items, description):
        return self.map_tasks(KilledOnce(function, self.marker), items, description)


class KilledOnce:
    def __init__(self, function, marker):
        self.function, self.marker = function, marker

    def __call__(self, item):
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.function(item)


def test_numbers_arrive_at_their_steps_though_the_evaluator_is_killed(tmp_path, monkeypatch):
    original, marker = image_run.evaluate_step, tmp_path / "killed"

    def evaluate_step(config, weights, step, manifest, map_tasks):
        return original(config, weights, step, manifest, Killed(map_tasks, marker))

    monkeypatch.setattr(image_run, "evaluate_step", evaluate_step)
    folder = run_images(config_in(tmp_path))
    assert marker.exists()
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    run_id = json.loads((folder / "mlflow_run.json").read_text())["run_id"]
    history = client.get_metric_history(run_id, "eval/fd_digits_ode")
    assert [point.step for point in history] == [8, 16, 24]
    assert len({point.value for point in history}) == 3
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert not [tag for tag in run.data.tags if tag.startswith("evaluation_failed")]
    summary = json.loads((folder / "results.json").read_text())
    assert summary["metrics"]["fd_digits_ode"] == history[-1].value
    assert not list((folder / "evaluation").rglob("ema.safetensors"))
