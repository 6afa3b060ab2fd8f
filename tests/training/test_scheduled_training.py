"""A schedule is what training by hand would be: to the change, then on with the other settings."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cdm_ray.checkpoint import CHECKPOINTS, KINDS, checkpoint_name, newest_checkpoint
from cdm_ray.config import BridgeConfig, ImageConfig, load_config
from cdm_ray.config.sweeps import as_overrides
from cdm_ray.data.prepare import ensure_prepared
from cdm_ray.training import bridge_worker, image_worker
from cdm_ray.training.worker import Assignment
from tests.distributed import run_workers

CHANGE, STEPS = 2, 6
"""Optimizer steps before the change and in all; a checkpoint is written after every other one."""

IMAGES = [
    "data.source=photos",
    "data.path=data",
    "data.samples_per_shard=12",
    "network.model_channels=4",
    "network.channel_mult=[1]",
    "network.attn_resolutions=[]",
    "network.dropout=0.1",
    "data.lanes=4",
    "train.batch=16",
    "train.micro_batch=8",
    f"train.images={STEPS * 16}",
    "checkpoint.every_images=32",
    "cp.warmup_images=100",
    "ema.halflife_images=100",
    "optimizer.rampup_images=80",
]
IMAGE_CHANGE = {
    "optimizer.lr": 1e-3,
    "cp.weight": 5.0,
    "cp.rollout_weights": "ema",
    "cp.reuse_d0": False,
    "cp.rollout_steps": 2,
    "dsm.p_std": 1.0,
    "dsm.input_perturbation": 0.1,
    "ema.halflife_images": 20,
}
BRIDGE = [
    "network.width=4",
    "simulation.steps=12",
    "simulation.paths=8",
    "simulation.lanes=4",
    "train.inner_steps=2",
    "train.pairs=32",
    "train.iterations=3",
    "checkpoint.every_iterations=1",
    "eval.every_iterations=null",
    "ray.workers=1",
]
BRIDGE_CHANGE = {
    "optimizer.lr": 1e-3,
    "control.consistency": "sc1",
    "control.weighting": "window",
    "control.variate": "innovation",
    "ema.decay": 0.1,
}


KINDS_OF_RUNS = {
    # images between two steps hold from the later one
    "images": (image_worker, ImageConfig, "digits", IMAGES, IMAGE_CHANGE, CHANGE * 16 - 5),
    "bridge": (bridge_worker, BridgeConfig, None, BRIDGE, BRIDGE_CHANGE, CHANGE // 2),
}


def train_kind(kind, folder):
    """Final tensors of runs of a kind: plain, scheduled, by hand, resumed."""
    worker, root, recipe, fields, change, after = KINDS_OF_RUNS[kind]

    def run(name, *overrides, start=None):
        """Train as a worker does, from another run's checkpoint (name, step) if one is given."""
        named = [f"run.storage={kind}", f"run.name={name}", "checkpoint.keep_last=4"]
        config = load_config(root, recipe, [*fields, *named, *overrides])
        checkpoints = config.run_folder / CHECKPOINTS
        checkpoints.mkdir(parents=True)
        if start is not None:
            other, step = folder / kind / start[0] / CHECKPOINTS, checkpoint_name(start[1])
            shutil.copytree(other / step, checkpoints / step)
        worker._train(config, Assignment(config.model_dump(mode="json"), None, "test"))
        checkpoint = newest_checkpoint(checkpoints)
        assert checkpoint.state.step == STEPS
        return {kind: checkpoint.tensors(kind) for kind in KINDS}

    schedule = f"schedule={[{'after': after, 'set': change}]}"
    later = ("scheduled", CHANGE + 2)
    return {
        "plain": run("plain"),
        "scheduled": run("scheduled", schedule),
        "by hand": run("by-hand", *as_overrides(change), start=("plain", CHANGE)),
        "resumed": run("resumed", schedule, start=later),
        "at stage 3": run("sharded", schedule, "train.zero_stage=3", start=later),
    }


def train_all(rank, world, folder):
    context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: world)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("ray.train.get_context", lambda: context)
        patch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
        return {kind: train_kind(kind, folder) for kind in KINDS_OF_RUNS}


@pytest.fixture(scope="module")
def all_trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    pixels = np.random.default_rng(0).integers(256, size=(48, 8, 8), dtype=np.uint8)
    for index, image in enumerate(pixels):
        path = folder / "photos" / f"class-{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = load_config(ImageConfig, "digits", IMAGES)
        ensure_prepared(config.data, lambda function, items, _: [function(i) for i in items])
    return run_workers(train_all, 1, folder)[0]


@pytest.fixture(params=KINDS_OF_RUNS)
def trained(request, all_trained):
    return all_trained[request.param]


def differing(told, expected):
    """Tensors that are not the same bit for bit."""
    return [
        (kind, name)
        for kind in KINDS
        for name, tensor in expected[kind].items()
        if not torch.equal(told[kind][name], tensor)
    ]


def test_a_schedule_is_two_runs_the_second_from_the_checkpoint_of_the_first(trained):
    assert differing(trained["by hand"], trained["scheduled"]) == []
    parameters = {name for _, name in differing(trained["plain"], trained["scheduled"])}
    assert parameters >= set(trained["plain"]["exp_avg"])


def test_a_run_killed_after_a_change_goes_on_as_if_it_had_not_been(trained):
    assert differing(trained["resumed"], trained["scheduled"]) == []


def test_what_changed_is_learned_at_zero_stage_3_too(trained):
    for kind in KINDS:
        for name, expected in trained["scheduled"][kind].items():
            # two Adam steps in float32 on sums of another order
            torch.testing.assert_close(
                trained["at stage 3"][kind][name], expected, rtol=1e-3, atol=2e-5
            )
