"""The README's commands, run as a user runs them."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import torch
from mlflow import MlflowClient

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    for line in block.strip().splitlines()
]
REDUCED = [
    "network.model_channels=8",
    "network.num_blocks=1",
    "train.batch=32",
    "train.images=128",
    "train.log_every=1",
    "eval.images=32",
    "eval.grid=16",
    "eval.drift_images=4",
    "eval.drift_sigmas=2",
    "sampler.ode_steps=3",
    "sampler.sde_steps=3",
    "ray.workers=1",
]
"""Overrides that make a run small: most of its time is then the start of its processes."""


def command_with(prefix):
    """The README's command that begins so."""
    found = [command for command in COMMANDS if command.startswith(prefix)]
    assert found, f"README.md has no command {prefix}"
    return found[0]


def words(command, checkout):
    """What a shell makes of the command; shared storage lies in the checkout."""
    return shlex.split(command.replace("/shared", str(checkout / "shared")))


def run(command, checkout, head, *overrides, code=0):
    line = [*words(command, checkout), *overrides]
    result = subprocess.run(
        line, cwd=checkout, env=head, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == code, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def only(paths):
    found = list(paths)
    assert len(found) == 1, found
    return found[0]


def assert_run_is_complete(storage, metric):
    """Results on disk, and a finished MLflow run with curves, grids and figures."""
    results = json.loads(only(storage.glob("*/results.json")).read_text())
    assert results["metrics"][metric] >= 0
    assert Path(results["checkpoint"], "ema.safetensors").is_file()
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("cdm_ray")
    tracked = only(client.search_runs([experiment.experiment_id]))
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics[f"eval/{metric}"] == results["metrics"][metric]
    losses = client.get_metric_history(tracked.info.run_id, "loss/cp")
    assert [point.step for point in losses] == list(range(1, results["images"] // 32 + 1))
    artifacts = {a.path for a in client.list_artifacts(tracked.info.run_id)}
    assert {"figures", "images"} <= artifacts


class InceptionStandIn(torch.nn.Module):
    """Takes and gives what the field's TorchScript Inception file does."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return torch.nn.functional.adaptive_avg_pool2d(x, 32).flatten(1)[:, :2048] / 255
