"""Training a bridge on Ray: what a kill and another number of workers change, namely nothing."""

import pytest
import torch

from cdm_ray.checkpoint import CHECKPOINTS, KINDS, newest_checkpoint
from cdm_ray.config import BridgeConfig, load_config
from cdm_ray.training.bridge_worker import train_worker
from cdm_ray.training.launch import train
from tests.cluster.workers import killed_bridge_worker

pytestmark = pytest.mark.usefixtures("ray_cluster")

STEPS = 16


def tiny(folder, *overrides):
    """Eight iterations of two optimizer steps, with a checkpoint every three iterations and with
    paths of earlier ones."""
    return load_config(
        BridgeConfig,
        "double-well-3",
        [
            f"run.storage={folder}",
            "network.width=8",
            "simulation.steps=20",
            "simulation.paths=16",
            "simulation.lanes=4",
            "simulation.replay=2",
            "control.variate=innovation",
            "train.pairs=64",
            "train.inner_steps=2",
            "train.iterations=8",
            "train.log_every=4",
            "checkpoint.every_iterations=3",
            "eval.every_iterations=null",
            "ray.workers=2",
            *overrides,
        ],
    ).resolved()


def run(config, worker=train_worker):
    config.run_folder.mkdir(parents=True, exist_ok=True)
    train(config, worker, None)
    checkpoint = newest_checkpoint(config.run_folder / CHECKPOINTS)
    assert checkpoint.state.step == STEPS
    return {kind: checkpoint.tensors(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tiny(tmp_path_factory.mktemp("undisturbed")))


def test_killed_worker_changes_no_bit_of_a_bridge(tmp_path, undisturbed):
    told = run(tiny(tmp_path), killed_bridge_worker)
    assert (tmp_path / "killed").exists()
    for kind in KINDS:
        for name, expected in undisturbed[kind].items():
            assert torch.equal(told[kind][name], expected), (kind, name)


def test_one_worker_learns_the_bridge_that_two_do(tmp_path, undisturbed):
    told = run(tiny(tmp_path, "ray.workers=1"))
    for kind in KINDS:
        for name, expected in undisturbed[kind].items():
            # sixteen Adam steps in float32 on sums of another order
            torch.testing.assert_close(told[kind][name], expected, rtol=1e-3, atol=5e-5)
