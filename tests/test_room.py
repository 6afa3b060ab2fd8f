"""How many workers have room in a cluster, and what a run's pace is."""

import pytest
import ray

from cdm_ray import cluster
from cdm_ray.checkpoint import TrainingState
from cdm_ray.config import RayConfig
from cdm_ray.config.loading import build_config
from cdm_ray.errors import ConfigError
from cdm_ray.training.worker import Pace, Speed, WorkerHooks


@pytest.fixture
def nodes(monkeypatch):
    def given(*resources):
        alive = [{"Alive": True, "Resources": one} for one in resources]
        dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        monkeypatch.setattr(ray, "nodes", lambda: [*alive, dead])
        gpus = sum(one.get("GPU", 0.0) for one in resources)
        monkeypatch.setattr(cluster, "gpus_in_cluster", lambda: gpus)

    return given


def test_a_worker_has_to_fit_on_one_node(nodes):
    nodes({"CPU": 3.0}, {"CPU": 3.0})
    assert cluster.room_for_workers(RayConfig(workers=1)) == 6
    assert cluster.room_for_workers(RayConfig(workers=1, cpus_per_worker=2)) == 2
    assert cluster.room_told() == "2 node(s) with 6 CPUs and 0 GPUs together"


def test_gpus_and_cpus_both_limit_the_room(nodes):
    nodes({"CPU": 8.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 4.0})
    half = RayConfig(workers=1, gpus_per_worker=0.5)
    assert cluster.room_for_workers(RayConfig(workers=1)) == 2
    assert cluster.room_for_workers(half) == 3
    assert cluster.room_for_workers(half.model_copy(update={"use_gpu": False})) == 9
    assert cluster.devices(half) == 0.5
    assert cluster.devices(RayConfig(workers=4, cpus_per_worker=3, use_gpu=False)) == 12


def test_workers_of_one_run_never_share_a_gpu():
    with pytest.raises(ConfigError, match=r"gpus_per_worker=0.5 with workers=2: NCCL needs a GPU"):
        build_config(RayConfig, {"workers": 2, "gpus_per_worker": 0.5})


def test_the_pace_is_the_median_without_the_warm_up_for_all_samples_of_the_run():
    hooks = object.__new__(WorkerHooks)  # what it needs beside these needs a process group
    hooks._unit, hooks._samples_per_second = Speed("path_steps", 2.0), [1.0]
    assert hooks.pace(TrainingState(5, 400, 5)) is None
    hooks._samples_per_second += [10.0, 30.0, 20.0]
    assert hooks.pace(TrainingState(5, 400, 5)) == Pace(speed=40.0, seconds=20.0)
