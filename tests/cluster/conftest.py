"""One real Ray cluster per module: starting one takes seconds."""

import os
import tempfile

import pytest
import ray

from cdm_ray import cluster
from cdm_ray.config import RayConfig


@pytest.fixture(scope="module")
def ray_cluster():
    # socket paths have to stay short, so not under pytest's own temporary folder
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(os, "cpu_count", lambda: 4)
        with cluster.connected(RayConfig(workers=2)):
            yield ray
