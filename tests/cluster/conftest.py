"""Real Ray clusters, each started once: it takes seconds."""

import contextlib
import os
import re
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
import ray
import torch
from PIL import Image

from cdm_ray import cluster
from cdm_ray.config import RayConfig
from tests.cluster.commands import README, ROOT, InceptionStandIn


@pytest.fixture(scope="module")
def ray_cluster():
    # socket paths have to stay short, so not under pytest's own temporary folder
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(os, "cpu_count", lambda: 4)
        with cluster.connected(RayConfig(workers=2)):
            yield ray


def free_port():
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def head():
    """Environment in which commands find a running head node."""
    ports = [free_port() for _ in range(4)]
    # another range for each process of the test run
    first_port = 30000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    folder = tempfile.mkdtemp(prefix="ray")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))} | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        [
            *("ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=3"),
            *(f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--temp-dir={folder}"),
            *(f"--ray-client-server-port={ports[2]}", f"--dashboard-agent-listen-port={ports[3]}"),
            *(f"--min-worker-port={first_port}", f"--max-worker-port={first_port + 999}"),
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


@pytest.fixture(scope="session")
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
