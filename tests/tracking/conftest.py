import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from cdm_ray.config import ImageConfig, load_config
from cdm_ray.tracking import open_run
from cdm_ray.tracking.server import connect


class RealServer:
    """An `mlflow server` on loopback that can be killed and started again at the same address."""

    def __init__(self, database, artifacts):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        self._command += ["--host", "127.0.0.1", "--port", str(port)]
        self._command += ["--backend-store-uri", database, "--artifacts-destination", artifacts]
        self._process = None

    def start(self):
        self._process = subprocess.Popen(
            self._command,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                assert self._process.poll() is None, "the server ended"
                time.sleep(0.2)
        raise AssertionError("the server does not answer")

    def kill(self):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(autouse=True)
def _no_server_of_the_machine(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def storage(tmp_path_factory):
    """Storage with a database, which takes seconds to create; its name has a space."""
    return tmp_path_factory.mktemp("all runs")


@pytest.fixture(scope="session")
def client(storage):
    return connect(f"sqlite:///{storage}/mlflow.db")


@pytest.fixture
def open_here(storage, tmp_path):
    """Opens or continues this test's run with the given overrides."""

    def open_with(*overrides):
        config = load_config(ImageConfig, "digits", overrides)
        return open_run(config, storage=storage, run_name="a run", run_folder=tmp_path / "run")

    return open_with


@pytest.fixture(scope="module")
def server(storage, client, tmp_path_factory):
    server = RealServer(client.tracking_uri, str(tmp_path_factory.mktemp("artifacts")))
    server.start()
    yield server
    server.kill()
