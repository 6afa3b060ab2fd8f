"""Checkpoints are complete or refused by name, whatever happened to their files."""

import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from upath import UPath

from cdm_ray import checkpoint as module
from cdm_ray.checkpoint import (
    KINDS,
    Checkpoint,
    CheckpointError,
    TrainingState,
    newest_checkpoint,
    remove_checkpoint,
)
from cdm_ray.config import ImageConfig, OptimizerConfig, load_config
from cdm_ray.storage import path_of
from cdm_ray.training.checkpoint import write_average, write_checkpoint
from cdm_ray.training.engine import Engine
from tests.checkpoints import make_checkpoint
from tests.distributed import run_workers


def write_three(rank, world, root, stage):
    """Three checkpoints, in a folder where killed writes have left something."""
    for step in (3, 9) if rank == 0 else ():
        (root / f"step-{step:08d}").mkdir(parents=True)
        (root / f"step-{step:08d}" / "replay-0000.safetensors").write_bytes(b"half")
    network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    engine = Engine(network, OptimizerConfig(), zero_stage=stage, precision="fp32", micro_steps=1)
    for step in range(1, 4):
        engine.backward(engine(torch.full((2, 3), float(step)) + torch.eye(2, 3)).square().sum())
        engine.step(lr=1e-2, ema_beta=0.5)
        state = TrainingState(step, 2 * step, step)
        write_checkpoint(root, engine, state, "recipe: digits\n", keep_last=2)
    write_average(root.parent / f"{root.name}-average" / "ema.safetensors", engine)
    return {kind: {name: tensor.clone() for name, tensor in engine.gather(kind)} for kind in KINDS}


@pytest.fixture(
    scope="module",
    params=[(1, 0, Path), (2, 1, lambda root: UPath(f"file://{root}")), (2, 3, Path)],
    ids=["1xZ0", "2xZ1 at a URL", "2xZ3"],
)
def written(request, tmp_path_factory):
    world, stage, path = request.param
    root = tmp_path_factory.mktemp("checkpoints")
    return root, run_workers(write_three, world, path(root), stage)[0]


@pytest.fixture
def root(written, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(written[0], tmp_path / "c")
    return tmp_path / "c"


def test_holds_everything_whoever_wrote_it(written):
    root, tensors = written
    checkpoint = newest_checkpoint(root)
    assert checkpoint.state == TrainingState(step=3, samples_seen=6, optimizer_steps=3)
    names = {path.name for path in checkpoint.folder.iterdir()}
    assert names == {f"{kind}.safetensors" for kind in KINDS} | {"config.yaml", "state.json"}
    for kind in KINDS:
        read = checkpoint.tensors(kind)
        for name, tensor in tensors[kind].items():
            assert torch.equal(read[name], tensor), (kind, name)
    # complete state dicts: buffers included
    assert "1.running_mean" in checkpoint.tensors("weights")
    assert "1.running_mean" in checkpoint.tensors("ema")


def test_average_alone_is_that_of_a_checkpoint(written):
    (path,) = written[0].with_name(f"{written[0].name}-average").iterdir()
    expected, alone = newest_checkpoint(written[0]).tensors("ema"), load_file(path)
    assert alone.keys() == expected.keys()
    assert all(torch.equal(alone[name], tensor) for name, tensor in expected.items())


def test_run_of_a_checkpoint_is_where_it_lies_now(root, monkeypatch):
    run = root.rename(root.with_name("checkpoints")).parent
    checkpoint = newest_checkpoint(run / "checkpoints")
    assert (checkpoint.run_folder, checkpoint.name) == (run, "step-00000003")
    monkeypatch.chdir(checkpoint.folder)
    assert Checkpoint.open(Path(".")).run_folder == run
    copied = Checkpoint.open(checkpoint.folder.rename(run / "downloaded"))
    assert (copied.run_folder, copied.name) == (run, "downloaded")


def test_keeps_the_last_ones_and_no_temporary_folder(written):
    assert sorted(p.name for p in written[0].iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("name", [f"{kind}.safetensors" for kind in KINDS] + ["config.yaml"])
@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "missing"])
def test_damaged_file_is_named_and_the_checkpoint_before_is_used(root, name, damage, caplog):
    path = root / "step-00000003" / name
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "bit flipped":
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=name):
        Checkpoint.open(root / "step-00000003")
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(root).state.step == 2
    assert name in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:20],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"step": 3', '"step": 1'),
        lambda text: text.replace('"schema": 2', '"schema": 1'),
    ],
    ids=["truncated", "empty", "not an object", "other step", "other schema"],
)
def test_damaged_state_is_refused(root, change):
    path = root / "step-00000003" / "state.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(CheckpointError, match="state.json"):
        Checkpoint.open(root / "step-00000003")
    assert newest_checkpoint(root).state.step == 2


def test_unfinished_write_is_no_checkpoint(root):
    (root / "step-00000003").rename(root / ".step-00000003.tmp")
    assert newest_checkpoint(root).state.step == 2


def test_a_half_removed_checkpoint_is_never_sound(memory, monkeypatch):
    """On a store that has no folders, files go one by one."""
    config = load_config(ImageConfig, "digits")
    for step in (1, 2):
        make_checkpoint(path_of(f"{memory}/run"), config, {"w": torch.ones(2)}, step=step)
    root = path_of(f"{memory}/run/checkpoints")
    assert newest_checkpoint(root).state.step == 2
    monkeypatch.setattr(module, "remove_folder", lambda folder: None)  # killed before that
    remove_checkpoint(root / "step-00000002")
    assert (root / "step-00000002" / "ema.safetensors").exists()
    assert newest_checkpoint(root).state.step == 1
    monkeypatch.undo()
    remove_checkpoint(root / "step-00000002")
    assert not (root / "step-00000002").exists()


def test_files_at_a_url_are_verified(memory):
    run = path_of(f"{memory}/run")
    checkpoint = make_checkpoint(run, load_config(ImageConfig, "digits"), {"w": torch.ones(2)})
    assert torch.equal(checkpoint.tensors("ema")["w"], torch.ones(2))
    (checkpoint.folder / "ema.safetensors").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"run/checkpoints/step-00000007/ema.safetensors"):
        Checkpoint.open(checkpoint.folder)


def test_nothing_sound_means_none(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "step-00000001").mkdir()
    assert newest_checkpoint(tmp_path) is None


def test_reading_runs_no_code(root):
    """A pickle in the place of a safetensors file, with a matching digest, is refused unread."""
    folder = root / "step-00000003"

    class Bomb:
        def __reduce__(self):
            return (open, (str(root / "exploded"), "w"))

    (folder / "ema.safetensors").write_bytes(pickle.dumps(Bomb()))
    content = json.loads((folder / "state.json").read_text())
    del content["digest"]
    content["sha256"]["ema.safetensors"] = module.sha256_of(folder / "ema.safetensors")
    content["digest"] = module.digest_of(content)
    (folder / "state.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="ema.safetensors"):
        Checkpoint.open(folder).tensors("ema")
    assert not (root / "exploded").exists()
