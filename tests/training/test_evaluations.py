"""Evaluations during training: found, recorded in order, and never worth more than the training."""

import threading

import pytest
import torch
from safetensors.torch import save_file

from cdm_ray import cluster
from cdm_ray.cluster import TaskResources
from cdm_ray.config import ImageConfig, load_config
from cdm_ray.training import evaluations
from cdm_ray.training.evaluations import (
    EvaluationsDuringTraining,
    resources_after_training,
    resources_beside_training,
    snapshot_path,
    worker_gpus,
)
from cdm_ray.training.surroundings import ALONE, Surroundings


def digits(tmp_path, *overrides):
    return load_config(
        ImageConfig, "digits", [f"run.storage={tmp_path}", "eval.every_kimg=7", *overrides]
    ).resolved()


@pytest.fixture
def cluster_of(monkeypatch):
    """Pretends a cluster of so many CPUs and GPUs."""

    def pretend(cpus, gpus):
        monkeypatch.setattr(evaluations.ray, "cluster_resources", lambda: {"CPU": cpus})
        monkeypatch.setattr(cluster, "gpus_in_cluster", lambda: float(gpus))

    return pretend


@pytest.fixture
def stage(monkeypatch, cluster_of):
    """Evaluations and records in memory; what a step evaluates to is up to the test."""
    cluster_of(2, 0)
    stage = Stage()
    monkeypatch.setattr(evaluations, "Tracker", lambda handle: stage)
    return stage


class Stage:
    def __init__(self):
        self.recorded, self.tags = {}, {}
        self.before = lambda step: None

    def evaluate(self, weights, step, map_tasks):
        self.before(step)
        self.recorded[step] = float(weights["w"][0])
        return {"fid_ode": self.recorded[step]}

    def set_tag(self, key, value):
        self.tags[key] = value

    def close(self, timeout):
        pass


def leave_snapshot(config, step):
    path = snapshot_path(config, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.tensor([float(step)])}, path)


def during(config, stage):
    return EvaluationsDuringTraining(config, stage.evaluate, None, use_gpu=False)


def test_every_snapshot_is_evaluated_in_order_and_removed(tmp_path, stage):
    config = digits(tmp_path)
    leave_snapshot(config, 55)  # by a launch that was stopped
    with during(config, stage):
        leave_snapshot(config, 110)
        leave_snapshot(config, 165)
    assert list(stage.recorded.items()) == [(55, 55.0), (110, 110.0), (165, 165.0)]
    assert not list(snapshot_path(config, 55).parent.iterdir())


def test_training_does_not_wait_for_an_evaluation(tmp_path, stage):
    config, trained = digits(tmp_path), threading.Event()
    stage.before = lambda step: trained.wait(30) or pytest.fail("the training waited")
    with during(config, stage):
        leave_snapshot(config, 55)
        trained.set()  # reached only if nothing waits
    assert stage.recorded == {55: 55.0}
    assert not stage.tags


def test_a_failed_evaluation_is_told_and_ends_nothing(tmp_path, stage, caplog):
    config = digits(tmp_path)

    def fail_at_55(step):
        if step == 55:
            raise RuntimeError("the evaluator\ncrashed")

    stage.before = fail_at_55
    with during(config, stage):
        leave_snapshot(config, 55)
        leave_snapshot(config, 110)
    assert stage.recorded == {110: 110.0}
    assert stage.tags == {"evaluation_failed.step-55": "RuntimeError: the evaluator crashed"}
    assert "evaluation at step 55 failed" in caplog.text
    # the next launch tries again
    stage.before = lambda step: None
    with during(config, stage):
        pass
    assert stage.recorded[55] == 55.0


def test_a_failed_training_leaves_its_snapshots_for_the_next_launch(tmp_path, stage):
    config, failed = digits(tmp_path), threading.Event()
    stage.before = lambda step: failed.wait(30)
    evaluating = during(config, stage)

    def diverge():
        with evaluating:
            leave_snapshot(config, 55)
            leave_snapshot(config, 110)
            raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        diverge()
    failed.set()
    evaluating._thread.join(30)
    assert 110 not in stage.recorded
    assert snapshot_path(config, 110).exists()


@pytest.mark.parametrize(
    ("cpus", "gpus", "tasks", "of_a_worker"),
    [
        (64, 10, TaskResources(gpus=1.0, at_once=2), 1.0),
        (64, 8, TaskResources(cpus=0.0, gpus=0.1, at_once=8), 0.9),
    ],
)
def test_spare_gpus_are_used_and_otherwise_a_share_of_the_workers(
    tmp_path, cluster_of, cpus, gpus, tasks, of_a_worker
):
    cluster_of(cpus, gpus)
    config = digits(tmp_path, "ray.workers=8")
    assert resources_beside_training(config, use_gpu=True) == tasks
    assert worker_gpus(config) == of_a_worker
    assert worker_gpus(digits(tmp_path, "ray.workers=8", "eval.every_kimg=null")) == 1.0


def test_without_gpus_spare_cpus_are_used_and_otherwise_one_task_runs_beside(tmp_path, cluster_of):
    cluster_of(8, 0)
    assert resources_beside_training(digits(tmp_path), False) == TaskResources(at_once=5)
    cluster_of(2, 0)
    assert resources_beside_training(digits(tmp_path), False) == TaskResources(cpus=0, at_once=1)


def test_a_run_that_shares_the_cluster_takes_nothing_but_its_own(tmp_path, cluster_of):
    cluster_of(64, 16)
    shared = Surroundings(shares_cluster=True)
    half = digits(tmp_path, "ray.workers=1", "ray.gpus_per_worker=0.5")
    beside = resources_beside_training(half, use_gpu=True, around=shared)
    assert beside == TaskResources(cpus=0, gpus=0.05, at_once=1)
    assert worker_gpus(half, shared) + beside.gpus == 0.5
    after = resources_after_training(half, use_gpu=True, around=shared)
    assert after == TaskResources(gpus=0.5, at_once=1)
    assert resources_after_training(half, True, ALONE) == TaskResources(gpus=1)
    assert resources_beside_training(half, False, shared) == TaskResources(cpus=0, at_once=1)


def test_steps_with_an_evaluation_leave_out_the_last(tmp_path):
    assert list(digits(tmp_path).evaluation_steps) == [55, 110, 165]
    assert list(digits(tmp_path, "eval.every_kimg=28").evaluation_steps) == []
    assert list(digits(tmp_path, "eval.every_kimg=null").evaluation_steps) == []
