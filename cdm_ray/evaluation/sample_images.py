"""Images of a checkpoint as PNG files named by their seeds, and a grid of the first ones."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cdm_ray.checkpoint import EMA, Checkpoint
from cdm_ray.config import ImageConfig
from cdm_ray.data.images import MODES, encode_png
from cdm_ray.errors import RunFailed
from cdm_ray.evaluation.features import tensors_digest
from cdm_ray.evaluation.figures import save_grid
from cdm_ray.evaluation.generate import configured_solver, generate, num_evaluations
from cdm_ray.evaluation.npz import short_digest
from cdm_ray.evaluation.tasks import MapTasks, split_evenly, task_device
from cdm_ray.evaluation.work import load_network
from cdm_ray.storage import AnyPath, list_folder, write_whole

log = logging.getLogger(__name__)

SAMPLES = "samples"
"""Folder of the samples inside a run's folder."""
GRID_NAME, SETTINGS_NAME = "grid.png", "settings.json"
IMAGES_PER_FOLDER = 1000


@dataclass(frozen=True)
class Samples:
    """Images in a folder; see `png_path` for their names."""

    folder: AnyPath
    seeds: range
    made: int
    """How many were not there before."""

    @property
    def grid(self) -> AnyPath:
        return self.folder / GRID_NAME


def sample_images(config: ImageConfig, checkpoint: Checkpoint, map_tasks: MapTasks) -> Samples:
    """Write `eval.images` images of the averaged weights, from the seeds `eval.first_seeds[0]` on.

    They are those of `generate`, by the solver of `sampler.kind`. The folder,
    `<run>/samples/<checkpoint>-<kind>-<key>/`, stands for whatever determines an image but its
    seed: images that are there and whole are kept, so that a killed call continues where it was and
    more seeds can be added. `settings.json` in it tells what the key stands for; `grid.png` shows
    the first `eval.grid` images. Raises ConfigError when the weights do not fit, RunFailed when the
    machines do not share the folder.
    """
    state_dict = checkpoint.tensors(EMA)
    label_dim = trained_classes(state_dict) if config.network.class_conditional else 0
    load_network(config, state_dict, label_dim, "cpu")  # refused here rather than in every task
    settings = _settings(config, state_dict)
    key = short_digest(json.dumps(settings, sort_keys=True))
    folder = samples_root(checkpoint) / f"{checkpoint.folder.name}-{config.sampler.kind}-{key}"
    write_whole(folder / SETTINGS_NAME, (json.dumps(settings, indent=1) + "\n").encode())
    seeds = sampled_seeds(config)
    batches = [seeds[rows.start : rows.stop] for rows in _batches(config)]
    work = _Work(config, state_dict, label_dim, folder)
    made = sum(map_tasks(partial(_make_missing, work), batches, "samples"))
    _check_arrived(folder, seeds)
    shown = [_read(png_path(folder, seed)) for seed in seeds[: config.eval.grid]]
    samples = Samples(folder, seeds, made)
    save_grid(torch.stack(shown), samples.grid)
    return samples


def print_plan(config: ImageConfig, checkpoint: Checkpoint) -> None:
    """What `sample_images` would do, if no image is there."""
    seeds, sampler = sampled_seeds(config), config.sampler
    evaluations = num_evaluations(sampler, sampler.kind)
    name = configured_solver(sampler, sampler.kind).name
    print(f"checkpoint  {checkpoint.folder}, averaged weights")
    print(f"images      {len(seeds):,} from the seeds {seeds[0]:,}-{seeds[-1]:,}")
    print(f"sampler     {name} ({sampler.kind}), {evaluations} network evaluations per image")
    print(f"tasks       {len(_batches(config))}, images that are there already are kept")
    print(f"folder      {samples_root(checkpoint)}")


def sampled_seeds(config: ImageConfig) -> range:
    """Seeds of the images, one each."""
    first = config.eval.first_seeds[0]
    return range(first, first + config.eval.images)


def samples_root(checkpoint: Checkpoint) -> AnyPath:
    """Folder around all samples of the checkpoint's run."""
    return checkpoint.run_folder / SAMPLES


def png_path(folder: AnyPath, seed: int) -> AnyPath:
    """Where the image of a seed lies: a thousand to a folder, as with EDM's generator."""
    first = seed - seed % IMAGES_PER_FOLDER
    return folder / f"{first:06d}" / f"{seed:06d}.png"


def trained_classes(state_dict: dict[str, Tensor]) -> int:
    """Classes that a network with these weights was trained with; 0 for an unconditional one."""
    embedding = state_dict.get("model.map_label.weight")
    return 0 if embedding is None else embedding.shape[1]


@dataclass(frozen=True)
class _Work:
    """What every task needs to know."""

    config: ImageConfig
    state_dict: dict[str, Tensor]
    label_dim: int
    folder: AnyPath


def _make_missing(work: _Work, seeds: range) -> int:
    """Write those of the seeds' images that are not there and whole; returns how many."""
    mode = MODES[work.config.data.channels]
    size = (work.config.data.resolution,) * 2
    missing = [seed for seed in seeds if not _is_whole(png_path(work.folder, seed), mode, size)]
    if not missing:
        return 0
    config, device = work.config, task_device()
    network = load_network(config, work.state_dict, work.label_dim, device)
    images = generate(network, config, missing, work.label_dim, config.sampler.kind, device)
    for seed, image in zip(missing, images.cpu(), strict=True):
        path = png_path(work.folder, seed)
        pixels = image.permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels.squeeze(2) if mode == "L" else pixels)
        write_whole(path, encode_png(picture))
    return len(missing)


def _is_whole(path: AnyPath, mode: str, size: tuple[int, int]) -> bool:
    """Whether a PNG of this kind is there, with the checksums of all of its parts right."""
    try:
        with path.open("rb") as file, Image.open(file, formats=["PNG"]) as image:
            image.verify()
            return (image.mode, image.size) == (mode, size)
    except FileNotFoundError:
        return False
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged PNG
        log.warning("%s: damaged (%s); making it again", path, error)
        return False


def _read(path: AnyPath) -> Tensor:
    """A PNG to uint8 [C, H, W]."""
    with path.open("rb") as file, Image.open(file) as image:
        pixels = np.array(image)
    return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)


def _check_arrived(folder: AnyPath, seeds: Iterable[int]) -> None:
    paths = [png_path(folder, seed) for seed in seeds]
    # Listings, since NFS would remember a question for a single file that is not there yet.
    there = {path for parent in {p.parent for p in paths} for path in list_folder(parent)}
    lost = [path for path in paths if path not in there]
    if lost:
        raise RunFailed(
            f"{folder}: {len(lost)} of {len(paths)} images were made and are not there "
            f"(first {lost[0].name}); this folder must be on storage that all machines share"
        )


def _batches(config: ImageConfig) -> list[range]:
    images = config.eval.images
    return split_evenly(images, math.ceil(images / config.eval.batch))


def _settings(config: ImageConfig, state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """Whatever determines the image of a seed. The kind of device is not in it: images of another
    kind are made from other random numbers, and are as good."""
    sampler = config.sampler
    other = "sde_" if sampler.kind == "ode" else "ode_"
    churns = configured_solver(sampler, sampler.kind).name == "churn"
    return {
        "weights": tensors_digest(state_dict),
        "network": config.network.model_dump(exclude={"init", "activation_checkpointing"}),
        "resolution": config.data.resolution,
        "sampler": {
            name: value
            for name, value in sampler.model_dump().items()
            if not name.startswith(other) and (churns or not name.startswith("churn"))
        },
    }
