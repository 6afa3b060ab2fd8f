"""The real images that generated ones are compared with, and their cached statistics."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdm_ray.config import EvalConfig
from cdm_ray.data.manifest import Manifest
from cdm_ray.data.shards import DamagedSample, DataError, Shard
from cdm_ray.data.storage import fetch, join
from cdm_ray.evaluation.features import load_extractor
from cdm_ray.evaluation.frechet import FeatureStatistics, merge_all
from cdm_ray.evaluation.tasks import MapTasks, split_evenly, task_device

log = logging.getLogger(__name__)

MAX_TASKS = 32
"""A task returns a covariance, 32 MiB with 2048 features: few tasks, each with many images."""

T = TypeVar("T")
Arrays = Mapping[str, NDArray]


@dataclass(frozen=True)
class LabelledImages:
    """Images uint8 [N, C, H, W] and labels int64 [N], or None for a data set without labels."""

    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> LabelledImages:
        labels = None if self.labels is None else self.labels[rows]
        return LabelledImages(self.images[rows], labels)


@dataclass(frozen=True)
class Dataset:
    """A packed data set: the folder or URL that holds its shards, and its manifest."""

    path: str
    manifest: Manifest
    max_bad_fraction: float = 0.0

    def read(self, shard: int, indices: Sequence[int] | None = None) -> LabelledImages:
        """Images and labels of one shard, all or those at `indices`, in order, without flips.

        Damaged images are left out and logged. Raises DataError for a shard that is not what was
        packed.
        """
        info = self.manifest.shards[shard]
        content = Shard(fetch(join(self.path, info.name)), info, self.manifest)
        size = self.manifest.resolution
        images, labels = [], []
        for index in range(info.samples) if indices is None else indices:
            pixels = np.empty((self.manifest.channels, size, size), np.uint8)
            try:
                labels.append(content.read_into(index, pixels))
            except DamagedSample as damage:
                log.warning("%s: %s left out: %s", info.name, content.keys[index], damage)
                continue
            images.append(torch.from_numpy(pixels))
        stacked = (
            torch.stack(images)
            if images
            else torch.empty((0, self.manifest.channels, size, size), dtype=torch.uint8)
        )
        return LabelledImages(stacked, torch.tensor(labels) if self.manifest.num_classes else None)

    def check_count(self, found: int, wanted: int) -> None:
        """Raise DataError when more images are damaged than `data.max_bad_fraction` allows."""
        if found < wanted * (1 - self.max_bad_fraction):
            raise DataError(
                f"{wanted - found} of {wanted} images in {self.path} are damaged, more than "
                f"data.max_bad_fraction={self.max_bad_fraction:g}; pack the data set again"
            )


def reference_statistics(
    dataset: Dataset, config: EvalConfig, cache_folder: Path, map_tasks: MapTasks
) -> FeatureStatistics:
    """Statistics of the features of every image of the data set, computed once and then cached.

    The cache is an npz with `mu`, `sigma` (unbiased) and `n`, keyed by the fingerprints of the data
    set and of the feature network. A damaged file is reported in the log and replaced.
    """
    extractor = load_extractor(config, "cpu")
    key = _short_digest(f"{dataset.manifest.fingerprint} {extractor.name} {extractor.fingerprint}")
    path = cache_folder / f"reference-{extractor.name}-{key}.npz"
    wanted = dataset.manifest.num_samples
    statistics = _read_cache(path, partial(_parse_statistics, dim=extractor.dim))
    if statistics is None:
        groups = split_evenly(len(dataset.manifest.shards), MAX_TASKS)
        parts = map_tasks(
            partial(_shard_statistics, dataset, config), groups, "reference statistics"
        )
        statistics = merge_all(part for part in parts if part is not None)
        dataset.check_count(statistics.count, wanted)
        arrays = {"mu": statistics.mean, "sigma": statistics.covariance}
        _write_cache(path, arrays | {"n": np.array(statistics.count)})
        log.info("reference statistics of %d images written to %s", statistics.count, path)
    dataset.check_count(statistics.count, wanted)
    return statistics


def reference_images(
    dataset: Dataset, count: int, cache_folder: Path, map_tasks: MapTasks
) -> LabelledImages:
    """`count` images, or all if there are fewer, evenly spaced over the data set; cached."""
    count = min(count, dataset.manifest.num_samples)
    path = cache_folder / f"images-{_short_digest(dataset.manifest.fingerprint)}-{count}.npz"
    found = _read_cache(path, partial(_parse_images, manifest=dataset.manifest))
    if found is None:
        parts = map_tasks(partial(_read_chosen, dataset), _evenly_spaced(dataset, count), "images")
        labels = [part.labels for part in parts if part.labels is not None]
        found = LabelledImages(
            torch.cat([part.images for part in parts]), torch.cat(labels) if labels else None
        )
        arrays = {"images": found.images.numpy()}
        if found.labels is not None:
            arrays["labels"] = found.labels.numpy()
        _write_cache(path, arrays)
    return found


def _shard_statistics(
    dataset: Dataset, config: EvalConfig, shards: range
) -> FeatureStatistics | None:
    extractor = load_extractor(config, task_device())
    parts = [
        FeatureStatistics.of(extractor(images))
        for shard in shards
        for images in dataset.read(shard).images.split(config.batch)
        if len(images)
    ]
    return merge_all(parts) if parts else None


def _read_chosen(dataset: Dataset, chosen: tuple[int, list[int]]) -> LabelledImages:
    shard, indices = chosen
    return dataset.read(shard, indices)


def _evenly_spaced(dataset: Dataset, count: int) -> list[tuple[int, list[int]]]:
    """(shard, indices in it) of `count` images at equal distances over the packing order.

    The packing order may be sorted: the first images would then all be of one class.
    """
    total = dataset.manifest.num_samples
    wanted = [(2 * position + 1) * total // (2 * count) for position in range(count)]
    chosen: list[tuple[int, list[int]]] = []
    start = 0
    for shard, info in enumerate(dataset.manifest.shards):
        inside = [index - start for index in wanted if start <= index < start + info.samples]
        if inside:
            chosen.append((shard, inside))
        start += info.samples
    return chosen


def _parse_statistics(arrays: Arrays, dim: int) -> FeatureStatistics:
    mean, covariance, count = arrays["mu"], arrays["sigma"], int(arrays["n"])
    if mean.shape != (dim,) or covariance.shape != (dim, dim) or count < 2:
        raise ValueError(f"not the statistics of {dim} features")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("not finite")
    return FeatureStatistics(count, mean, covariance * (count - 1))


def _parse_images(arrays: Arrays, manifest: Manifest) -> LabelledImages:
    images = torch.from_numpy(arrays["images"])
    size = manifest.resolution
    if images.shape[1:] != (manifest.channels, size, size) or images.dtype != torch.uint8:
        raise ValueError(f"not images of {size}x{size} with {manifest.channels} channels")
    if not manifest.num_classes:
        return LabelledImages(images, None)
    labels = torch.from_numpy(arrays["labels"])
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    return LabelledImages(images, labels)


def _read_cache(path: Path, parse: Callable[[Arrays], T]) -> T | None:
    """Content of a cache file, or None when there is none or it is damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return parse(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s); computing it again", path, error)
        return None


def _write_cache(path: Path, arrays: Arrays) -> None:
    """Write an npz that is either whole or not there, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez(temporary, allow_pickle=False, **dict(arrays))
    temporary.replace(path)


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
