"""The README's way to the paper's numbers, step by step at reduced size; and what a kill of the
evaluation changes, namely nothing."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image

from cdm_ray.checkpoint import open_newest
from cdm_ray.config import ImageConfig, load_config
from cdm_ray.evaluation.launch import evaluate_checkpoint
from cdm_ray.networks import build_network
from cdm_ray.networks.exported import load_exported
from cdm_ray.networks.published import read_weights
from tests import edm_pickles
from tests.checkpoints import make_checkpoint
from tests.cluster.commands import REDUCED, command_with, only, run, words
from tests.data.data_sets import serial_map, write_cifar10

FEW = ["eval.images=24", "eval.batch=12", "eval.pr_images=24", "eval.kid_subset=12"]
SIZES = [*REDUCED, *FEW, "data.lanes=8", "train.images=32"]


@pytest.fixture(scope="module")
def paper(checkout):
    """The downloads: CIFAR-10's archive, and published weights of the reduced network."""
    write_cifar10(checkout / "cifar-10-python.tar.gz", rows=16)
    reduced = [word for word in REDUCED if word.startswith("network.")]
    config = load_config(ImageConfig, "cifar10-cond", reduced)
    torch.manual_seed(1)
    network = build_network(
        config.network, resolution=32, channels=3, label_dim=10, augment_dim=config.augment_dim
    )
    published = edm_pickles.checkpoint(edm_pickles.network(network.state_dict(), {}))
    (checkout / "edm-cifar10-32x32-cond-vp.pkl").write_bytes(edm_pickles.dumps(published))
    return checkout


def test_every_step_of_the_reproduction(paper, head):
    def step(job, *overrides):
        return run(command_with(f"python jobs/{job}"), paper, head, *overrides)

    assert "80 images" in step("prepare_data.py cifar10-cond", "data.samples_per_shard=20")
    assert "1.00 times" in step("train_cp.py cifar10-cond-dsm", "--dry-run")
    assert "DSM + 1 CP" in step("train_cp.py cifar10-cond run.name=cp", *SIZES)

    told = step("evaluate.py runs/cp", *FEW)
    results = (paper / "runs/cp/evaluation").rglob("results.json")
    found = [json.loads(path.read_text()) for path in results]
    found = only(one for one in found if one["first_seeds"] == [0, 50000, 100000])
    values, metrics = found["ranges"]["fid_ode"], found["metrics"]
    assert len(set(values)) == 3
    assert metrics["fid_ode"] == pytest.approx(np.mean(values))
    assert metrics["fid_ode_min"] == min(values)
    assert {"kid_sde", "precision_ode", "recall_sde", "nfe_ode"} <= metrics.keys()
    # too few images for the features, and the user is told both numbers
    assert "from 24 samples of 2048 features" in told

    assert "tensors copied" in step("train_cp.py cifar10-cond run.name=tuned", *SIZES)
    # one step at the start of the learning rate's ramp, 3e-10: the weights are still the file's
    published = read_weights(paper / "edm-cifar10-32x32-cond-vp.pkl").tensors
    trained = open_newest(paper / "runs/tuned").tensors("weights")
    for name, tensor in published.items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-6)
    step("sample.py runs/tuned", "eval.images=5")
    pictures = list((paper / "runs/tuned/samples").rglob("0*.png"))
    assert [Image.open(picture).size for picture in pictures] == 5 * [(32, 32)]
    step("export.py runs/tuned")
    denoiser = load_exported(only((paper / "runs/tuned/export").rglob("model.safetensors")))
    denoised = denoiser(torch.zeros(1, 3, 32, 32), torch.ones(1), torch.eye(10)[:1])
    assert denoised.isfinite().all()


def test_an_evaluation_that_is_killed_and_run_again_gives_the_same_digits(checkout, head):
    folder = checkout / "killed"
    settings = "eval.images=400 eval.batch=10 sampler.ode_steps=8 sampler.sde_steps=8"
    config = load_config(
        ImageConfig, "digits", [f"data.path={folder}/digits", *REDUCED, *settings.split()]
    )
    torch.manual_seed(2)
    network = build_network(config.network, resolution=8, channels=1, label_dim=10)
    weights = network.state_dict()
    for name in ("killed", "undisturbed"):
        make_checkpoint(folder / name / "one", config, weights)
    undisturbed = open_newest(folder / "undisturbed" / "one")
    expected = evaluate_checkpoint(config, undisturbed, serial_map)

    command = f"python jobs/evaluate.py {folder}/killed/one"
    job = subprocess.Popen(words(command, checkout), cwd=checkout, env=head)
    try:
        wait_for_parts(folder / "killed/one/evaluation", 3)
        os.kill(job.pid, signal.SIGKILL)
    finally:
        job.kill()
        job.wait()
    assert not list((folder / "killed").rglob("results.json")), "too fast to be killed"
    assert "parts done before" in run(command, checkout, head)
    (found,) = (folder / "killed").rglob("results.json")
    assert found.read_bytes() == (expected.folder / "results.json").read_bytes()


def wait_for_parts(folder, count):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(list(folder.rglob("parts-*/*.safetensors"))) >= count:
            return
        time.sleep(0.02)
    raise TimeoutError(f"no {count} parts in {folder}")
