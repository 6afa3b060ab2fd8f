import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cdm_ray.checkpoint import Checkpoint, TrainingState
from cdm_ray.config import EvalConfig, ImageConfig, build_config
from cdm_ray.errors import ConfigError, RunFailed
from cdm_ray.evaluation.figures import sample_grid
from cdm_ray.evaluation.generate import generate
from cdm_ray.evaluation.sample_images import (
    SETTINGS_NAME,
    png_path,
    print_plan,
    sample_images,
    trained_classes,
)
from cdm_ray.evaluation.work import load_network
from cdm_ray.networks import build_network
from cdm_ray.storage import path_of, write_whole


def config(*, channels=1, classes=False, images=7, first=998, sampler=None, **evaluation):
    evaluation = {"images": images, "first_seeds": [first], "batch": 3, "grid": 4} | evaluation
    extractor = {"extractor": "inception", "extractor_file": "unused.pt"}
    network = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    return build_config(
        ImageConfig,
        {
            "data": {"resolution": 8, "channels": channels},
            "network": network | {"class_conditional": classes},
            "eval": EvalConfig(**extractor).model_dump() | evaluation,
            "sampler": {"ode_steps": 3, "sde_steps": 3} | (sampler or {}),
        },
    )


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a checkpoint of random weights, as a run of the given configuration would."""

    def make(config, label_dim=0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            size = {"resolution": 8, "channels": config.data.channels, "label_dim": label_dim}
            network = build_network(config.network, **size)
            for parameter in network.parameters():  # EDM starts with outputs of zero
                parameter.data += 0.05 * torch.randn_like(parameter)
        folder = tmp_path / "run" / "checkpoints" / "step-00000012"
        folder.mkdir(parents=True)
        save_file(network.state_dict(), folder / "ema.safetensors")
        return Checkpoint(folder, TrainingState(12, 0, 12))

    return make


def read(path):
    return torch.from_numpy(np.array(Image.open(path)))


def files(samples):
    return {path: path.stat().st_mtime_ns for path in samples.folder.glob("*/*.png")}


@pytest.mark.parametrize("kind", ["ode", "sde"])
@pytest.mark.parametrize(("channels", "classes"), [(1, 0), (3, 3)])
def test_files_are_the_images_of_their_seeds(checkpoint, map_tasks, kind, channels, classes):
    chosen = config(channels=channels, classes=classes > 0, sampler={"kind": kind})
    source = checkpoint(chosen, classes)
    samples = sample_images(chosen, source, map_tasks)
    assert samples.folder.parent == source.folder.parents[1] / "samples"
    assert samples.folder.name.startswith(f"step-00000012-{kind}-")
    assert samples.made == len(files(samples)) == 7
    assert png_path(samples.folder, 999) == samples.folder / "000000" / "000999.png"
    assert png_path(samples.folder, 1004) == samples.folder / "001000" / "001004.png"
    network = load_network(chosen, source.tensors("ema"), classes, "cpu")
    expected = generate(network, chosen, range(998, 1005), classes, kind, "cpu")
    found = [read(png_path(samples.folder, seed)) for seed in samples.seeds]
    for image, exact in zip(found, expected, strict=True):
        pixels = exact.permute(1, 2, 0).squeeze(2) if channels == 1 else exact.permute(1, 2, 0)
        # convolutions of another batch size round differently
        assert (image.int() - pixels.int()).abs().max() <= 1
    shown = torch.stack(found[:4])
    shown = shown[:, None] if channels == 1 else shown.permute(0, 3, 1, 2)
    assert torch.equal(read(samples.grid), torch.from_numpy(np.array(sample_grid(shown))))


def test_only_what_is_missing_or_damaged_is_made_again(checkpoint, map_tasks, caplog):
    source = checkpoint(config())
    first = sample_images(config(), source, map_tasks)
    before = files(first)
    contents = {path: path.read_bytes() for path in before}
    assert sample_images(config(), source, map_tasks).made == 0
    assert files(first) == before

    gone, short, flipped, other = (png_path(first.folder, seed) for seed in (998, 1000, 1001, 1003))
    gone.unlink()
    short.write_bytes(contents[short][:-20])
    damaged = bytearray(contents[flipped])
    damaged[60] ^= 1
    flipped.write_bytes(damaged)
    Image.new("RGB", (8, 8)).save(other)
    assert sample_images(config(), source, map_tasks).made == 4
    now = files(first)
    assert {path for path in before if now[path] != before[path]} == {gone, short, flipped, other}
    for path, content in contents.items():
        again = read(path).int() - torch.from_numpy(_decode(content)).int()
        assert again.abs().max() <= 1
    assert f"{short}: damaged" in caplog.text
    assert not list(first.folder.rglob(".*"))  # nothing temporary is left


def _decode(content):
    from io import BytesIO

    return np.array(Image.open(BytesIO(content)))


def test_a_killed_call_keeps_the_tasks_that_were_finished(checkpoint, map_tasks):
    source = checkpoint(config())

    def die_in_the_second(function, items, description):
        map_tasks(function, items[:1], description)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_images(config(), source, die_in_the_second)
    (folder,) = (source.run_folder / "samples").iterdir()
    done = len(list(folder.glob("*/*.png")))
    assert 0 < done < 7
    assert sample_images(config(), source, map_tasks).made == 7 - done


def test_more_seeds_are_added_and_another_sampler_has_another_folder(checkpoint, map_tasks):
    source = checkpoint(config())
    first = sample_images(config(), source, map_tasks)
    more = sample_images(config(images=9, batch=4), source, map_tasks)
    assert (more.folder, more.made) == (first.folder, 2)
    idle = {"sde_steps": 9, "churn": 3.0, "churn_noise": 1.1}  # what the ODE does not use
    assert sample_images(config(sampler=idle), source, map_tasks).folder == first.folder
    folders = {
        sample_images(config(sampler=changed), source, map_tasks).folder
        for changed in ({"ode_steps": 4}, {"epsilon_scale": 1.01}, {"kind": "sde"},
                        {"ode_solver": "dpmpp_2m"})
    }  # fmt: skip
    assert len(folders | {first.folder}) == 5
    settings = json.loads((first.folder / SETTINGS_NAME).read_text())
    assert settings["sampler"]["ode_solver"] == "heun"


def test_weights_that_do_not_fit_are_refused_before_any_task(checkpoint):
    def no_tasks(function, items, description):
        raise AssertionError

    source = checkpoint(config(classes=True), 3)
    for changed in ({"channels": 3, "classes": True}, {"classes": False}):
        with pytest.raises(ConfigError, match="the weights do not fit the configured network"):
            sample_images(config(**changed), source, no_tasks)


def test_a_folder_that_the_machines_do_not_share_is_named(checkpoint):
    def elsewhere(function, items, description):
        return [len(item) for item in items]

    with pytest.raises(RunFailed, match="7 of 7 images were made and are not there"):
        sample_images(config(), checkpoint(config()), elsewhere)


def test_the_number_of_classes_is_read_from_the_weights(checkpoint):
    assert trained_classes(checkpoint(config(classes=True), 3).tensors("ema")) == 3


def test_an_unconditional_network_has_no_classes(checkpoint):
    assert trained_classes(checkpoint(config()).tensors("ema")) == 0


def test_the_plan_names_seeds_sampler_and_cost(checkpoint, capsys):
    print_plan(config(), checkpoint(config()))
    told = capsys.readouterr().out
    assert "7 from the seeds 998-1,004" in told
    assert "heun (ode), 5 network evaluations per image" in told


def test_images_of_a_checkpoint_at_a_url_lie_beside_it(checkpoint, map_tasks, memory):
    near = checkpoint(config())
    folder = path_of(f"{memory}/run/checkpoints/step-00000012")
    weights = (near.folder / "ema.safetensors").read_bytes()
    write_whole(folder / "ema.safetensors", weights)
    expected = sample_images(config(), near, map_tasks)
    samples = sample_images(config(), Checkpoint(folder, near.state), map_tasks)
    assert str(samples.folder.parents[1]) == f"{memory}/run"
    assert samples.grid.read_bytes() == expected.grid.read_bytes()
    png_path(samples.folder, 999).write_bytes(b"half")
    assert sample_images(config(), Checkpoint(folder, near.state), map_tasks).made == 1
