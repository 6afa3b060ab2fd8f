"""The jobs as a user runs them, on a real head node that `ray start --head` began: every command of
the README as written, at reduced size; mistakes; a run that fails."""

import re

import pytest
from mlflow import MlflowClient

from cdm_ray.config import ImageConfig, load_config
from cdm_ray.data.prepare import pack, plan_packing
from tests.cluster.commands import (
    COMMANDS,
    REDUCED,
    ROOT,
    assert_run_is_complete,
    command_with,
    only,
    run,
)
from tests.data.data_sets import serial_map


def test_commands_that_are_not_run_here_are_run_by_make_or_replaced():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in COMMANDS:
        if command.startswith("make "):
            assert command.removeprefix("make ") in targets
        elif not command.startswith(("python jobs/", "python sweeps/", "ray job submit ")):
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
    assert "DSM + 3 CP" in run(command, checkout, head, *REDUCED, "ray.workers=2")
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
        ("data.path=nowhere data.source=null", "no packed data set there"),
        ("ray.use_gpu=true", "error: ray.use_gpu=true needs 2 GPUs for ray.workers=2, the cluster"),
        ("ray.address=127.0.0.1:1", "error: ray.address=127.0.0.1:1: no Ray cluster answers there"),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_line_and_exit_code_2(checkout, head, mistake, answer):
    output = run(f"python jobs/train_cp.py digits {mistake}", checkout, head, code=2)
    assert answer in output
    assert "Traceback" not in output


def test_damaged_shard_fails_the_run_truthfully(checkout, head):
    data, storage = checkout / "damaged" / "data", checkout / "damaged" / "runs"
    config = load_config(ImageConfig, "digits", [f"data.path={data}"])
    pack(plan_packing(config.data), serial_map)
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
