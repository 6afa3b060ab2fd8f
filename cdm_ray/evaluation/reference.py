"""The data set that generated images are compared with, and some of its images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cdm_ray.data.manifest import Manifest
from cdm_ray.data.shards import DamagedSample, DataError, Shard
from cdm_ray.evaluation.npz import Arrays, read_cache, short_digest, write_cache
from cdm_ray.evaluation.tasks import MapTasks
from cdm_ray.storage import AnyPath, fetch, join

log = logging.getLogger(__name__)


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


def reference_images(
    dataset: Dataset, count: int, cache_folder: AnyPath, map_tasks: MapTasks
) -> LabelledImages:
    """`count` images, or all if there are fewer, evenly spaced over the data set; cached."""
    count = min(count, dataset.manifest.num_samples)
    path = cache_folder / f"images-{short_digest(dataset.manifest.fingerprint)}-{count}.npz"
    found = read_cache(path, partial(_parse_images, manifest=dataset.manifest))
    if found is None:
        parts = map_tasks(partial(_read_chosen, dataset), _evenly_spaced(dataset, count), "images")
        labels = [part.labels for part in parts if part.labels is not None]
        found = LabelledImages(
            torch.cat([part.images for part in parts]), torch.cat(labels) if labels else None
        )
        arrays = {"images": found.images.numpy()}
        if found.labels is not None:
            arrays["labels"] = found.labels.numpy()
        write_cache(path, arrays)
    return found


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
