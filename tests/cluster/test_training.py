"""Training on Ray: what a kill, a restart and another number of workers change, namely nothing."""

import json
import shutil

import pytest
import torch

from cdm_ray import cluster
from cdm_ray.checkpoint import CHECKPOINTS, KINDS, newest_checkpoint
from cdm_ray.config import ImageConfig, load_config
from cdm_ray.data.prepare import ensure_prepared
from cdm_ray.errors import RunFailed
from cdm_ray.training.image_worker import train_worker
from cdm_ray.training.launch import train
from tests.cluster.workers import KEYS, diverging_worker, killed_worker, recording_worker

pytestmark = pytest.mark.usefixtures("ray_cluster")

STEPS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory, ray_cluster):
    path = tmp_path_factory.mktemp("data") / "digits"
    config = load_config(ImageConfig, "digits", [f"data.path={path}"])
    ensure_prepared(config.data, cluster.map_tasks)
    return path


def tiny(data, folder, *overrides):
    return load_config(
        ImageConfig,
        "digits",
        [
            f"data.path={data}",
            f"run.storage={folder}",
            "network.model_channels=8",
            "train.batch=32",
            f"train.images={32 * STEPS}",
            "train.log_every=2",
            "checkpoint.every_images=96",  # every 3 steps
            *overrides,
        ],
    ).resolved()


def final_tensors(config):
    checkpoint = newest_checkpoint(config.run_folder / CHECKPOINTS)
    assert checkpoint.state.step == STEPS
    return {kind: checkpoint.tensors(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """Two workers, start to end: final tensors and the keys by step."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = tiny(data, folder)
    train(config, recording_worker, None)
    return final_tensors(config), keys_by_step(folder)


def keys_by_step(folder, steps=STEPS):
    """Keys of each training step of a launch, in lane order, over all ranks."""
    files = sorted((folder / KEYS).iterdir(), key=lambda path: int(path.name.split("-")[0]))
    ranks = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    return [sum((rank[step] for rank in ranks), []) for step in range(steps)]


def assert_bit_identical(told, expected):
    for kind in KINDS:
        for name in expected[kind]:
            assert torch.equal(told[kind][name], expected[kind][name]), (kind, name)


def test_killed_worker_changes_no_bit_of_the_result(data, tmp_path, undisturbed):
    config = tiny(data, tmp_path)
    train(config, killed_worker, None)
    assert (tmp_path / "killed").exists()
    assert_bit_identical(final_tensors(config), undisturbed[0])


def test_stopped_and_continued_run_changes_no_bit_of_the_result(data, tmp_path, undisturbed):
    name = "run.name=two-parts"
    train(tiny(data, tmp_path, name, f"train.images={32 * 5}"), train_worker, None)
    config = tiny(data, tmp_path, name)
    train(config, train_worker, None)
    assert_bit_identical(final_tensors(config), undisturbed[0])
    # and there is nothing left to do
    assert train(config, train_worker, None) is None


def test_continued_at_another_stage_by_one_worker_it_sees_and_learns_the_same(
    data, tmp_path, undisturbed
):
    tensors, keys = undisturbed
    half, name = STEPS // 2, "run.name=stages"
    begun = [f"train.images={32 * half}", "train.zero_stage=3"]
    train(tiny(data, tmp_path, name, *begun), recording_worker, None)
    assert keys_by_step(tmp_path, half) == keys[:half]
    shutil.rmtree(tmp_path / KEYS)
    config = tiny(data, tmp_path, name, "train.zero_stage=2", "ray.workers=1")
    train(config, recording_worker, None)
    assert keys_by_step(tmp_path, STEPS - half) == keys[half:]
    told = final_tensors(config)
    for kind in KINDS:
        for name, expected in tensors[kind].items():
            # ten Adam steps in float32 on sums of another order
            torch.testing.assert_close(told[kind][name], expected, rtol=1e-3, atol=2e-5)


def test_divergence_ends_the_run_without_repeating_it(data, tmp_path):
    config = tiny(data, tmp_path, "train.max_nonfinite_in_row=3", "ray.max_failures=0")
    with pytest.raises(RunFailed, match="not finite for 3 steps in a row"):
        train(config, diverging_worker, None)
    assert len(list(tmp_path.glob("start-*"))) == 2  # one for each worker
