"""The jobs as a user runs them, on a real head node that `ray start --head` began: every command of
the README as written, at reduced size; mistakes; a run that fails."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

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
]


def free_port():
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def head():
    """Environment in which commands find a running head node."""
    ports = [free_port() for _ in range(4)]
    folder = tempfile.mkdtemp(prefix="ray")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))} | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        [
            *("ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=3"),
            *(f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--temp-dir={folder}"),
            *(f"--ray-client-server-port={ports[2]}", f"--dashboard-agent-listen-port={ports[3]}"),
            *("--min-worker-port=30000", "--max-worker-port=30999"),
            "--object-store-memory=100000000",
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    api = f"http://127.0.0.1:{ports[1]}"
    try:
        wait_for(f"{api}/api/version")
        addresses = {"RAY_ADDRESS": f"127.0.0.1:{ports[0]}", "RAY_API_SERVER_ADDRESS": api}
        yield environment | addresses
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(url):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.5)
    raise TimeoutError(url)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a user has in the working folder: the repository's code, and some photos."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("jobs", "cdm_ray"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "photos").mkdir()
    noise = np.random.default_rng(0)
    for index in range(64):
        pixels = noise.integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{index}.png")
    (folder / "photos.yaml").write_text(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])
    torch.jit.save(torch.jit.script(InceptionStandIn()), folder / "inception-2015-12-05.pt")
    return folder


class InceptionStandIn(torch.nn.Module):
    """Takes and gives what the field's TorchScript Inception file does."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return torch.nn.functional.adaptive_avg_pool2d(x, 32).flatten(1)[:, :2048] / 255


def command_with(prefix):
    """The README's command that begins so."""
    found = [command for command in COMMANDS if command.startswith(prefix)]
    assert found, f"README.md has no command {prefix}"
    return found[0]


def run(command, checkout, head, *overrides, code=0):
    words = [*shlex.split(command.replace("/shared", str(checkout / "shared"))), *overrides]
    result = subprocess.run(
        words, cwd=checkout, env=head, capture_output=True, text=True, timeout=300
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


def test_commands_that_are_not_run_here_are_run_by_make_or_replaced():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in COMMANDS:
        if command.startswith("make "):
            assert command.removeprefix("make ") in targets
        elif not command.startswith(("python jobs/", "ray job submit ")):
            # activation of the environment that runs these tests; the fixture `head`
            assert command in ("source .venv/bin/activate", "ray start --head")


def test_help_and_dry_run(checkout, head):
    assert "train.zero_stage = 1" in run(
        command_with("python jobs/train_cp.py --h"), checkout, head
    )
    plan = run("python jobs/train_cp.py digits --dry-run", checkout, head)
    for part in ("lanes: 8", "2 workers", "219 steps of 128 images", "1.50 times"):
        assert part in plan
    assert not (checkout / "runs").exists()
    assert "python jobs/train_cp.py digits --dry-run" in COMMANDS


def test_training_and_report(checkout, head):
    command = command_with("python jobs/train_cp.py digits train.images")
    assert "DSM + 3 CP" in run(command, checkout, head, *REDUCED)
    assert_run_is_complete(checkout / "runs", "fd_digits_sde")
    # the same command again continues the run: there is nothing left but to look again
    again = run(command, checkout, head, *REDUCED)
    assert "step 1/4" not in again
    assert_run_is_complete(checkout / "runs", "fd_digits_sde")
    assert "DSM + 3 CP" in run(command_with("python jobs/report.py"), checkout, head)
    # the packed images are 8x8
    changed = ["data.resolution=16", "network.attn_resolutions=[8]", "eval.extractor_file=x"]
    output = run(f"{command} eval.extractor=inception", checkout, head, *changed, code=2)
    assert "error: data.resolution=16, but data.path=" in output


def test_job_submission(checkout, head):
    output = run(command_with("ray job submit"), checkout, head, *REDUCED)
    assert "step 4/4" in output
    assert "DSM + 1 CP" in output
    assert_run_is_complete(checkout / "shared" / "runs", "fd_digits_ode")


def test_own_images(checkout, head):
    packed = run(command_with("python jobs/prepare_data.py"), checkout, head)
    assert "64 images in 1 shards" in packed
    storage = f"run.storage={checkout}/own"
    command = command_with("python jobs/train_cp.py photos.yaml")
    output = run(command, checkout, head, *REDUCED, storage, "data.lanes=8")
    assert "fid_ode" in output
    assert_run_is_complete(checkout / "own", "fid_ode")


@pytest.mark.parametrize(
    ("mistake", "answer"),
    [
        ("cp.wieght=3", "error: cp.wieght: unknown key; did you mean cp.weight?"),
        ("data.path=nowhere data.source=null", "no packed data set there"),
        ("ray.use_gpu=true", "error: ray.use_gpu=true needs ray.workers=2 GPUs, the cluster has 0"),
        ("ray.address=127.0.0.1:1", "error: ray.address=127.0.0.1:1: no Ray cluster answers there"),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_line_and_exit_code_2(checkout, head, mistake, answer):
    output = run(f"python jobs/train_cp.py digits {mistake}", checkout, head, code=2)
    assert answer in output
    assert "Traceback" not in output


def test_damaged_shard_fails_the_run_truthfully(checkout, head):
    data, storage = checkout / "damaged" / "data", checkout / "damaged" / "runs"
    run(f"python jobs/prepare_data.py digits data.path={data}", checkout, head)
    for shard in data.glob("*.tar"):
        content = bytearray(shard.read_bytes())
        content[700] ^= 1
        shard.write_bytes(content)
    command = f"python jobs/train_cp.py digits data.path={data} run.storage={storage}"
    output = run(command, checkout, head, *REDUCED, code=1)
    assert re.search(r"^error: .*shard-\d+\.tar", output, flags=re.MULTILINE)
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("cdm_ray")
    assert only(client.search_runs([experiment.experiment_id])).info.status == "FAILED"
    assert not list(storage.glob("*/results.json"))
