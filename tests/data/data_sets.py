"""Small data sets whose pixels say which sample they are."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cdm_ray.data.images import encode_png
from cdm_ray.data.manifest import Manifest, ShardInfo
from cdm_ray.data.shards import PackedSample, file_sha256, write_shard

SIDE = 4


def serial_map(function, items, _description):
    """`cluster.map_tasks` without Ray."""
    return [function(item) for item in items]


def pixels_of(number: int) -> np.ndarray:
    """Greyscale pixels [SIDE, SIDE] that differ for every number below 2^24."""
    rest = np.arange(SIDE * SIDE, dtype=np.uint8)
    rest[:3] = number & 255, number >> 8 & 255, number >> 16
    return rest.reshape(SIDE, SIDE)


def png_of(number: int) -> bytes:
    return encode_png(Image.fromarray(pixels_of(number)))


def write_data_set(
    folder: Path,
    sizes: Sequence[int],
    *,
    num_classes: int = 10,
    damaged: dict[int, bytes] | None = None,
) -> Manifest:
    """Shards of the given sizes; sample i has key i, pixels_of(i) and label i % num_classes."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, first = [], 0
    for number, size in enumerate(sizes):
        path = folder / f"shard-{number:06d}.tar"
        samples = [
            PackedSample(
                key=f"{i:08d}",
                png=(damaged or {}).get(i, png_of(i)),
                label=i % num_classes if num_classes else None,
            )
            for i in range(first, first + size)
        ]
        write_shard(path, samples)
        shards.append(ShardInfo(name=path.name, samples=size, sha256=file_sha256(path)))
        first += size
    manifest = Manifest(
        resolution=SIDE,
        channels=1,
        num_classes=num_classes,
        shards=tuple(shards),
        fingerprint=hashlib.sha256(repr(list(sizes)).encode()).hexdigest(),
    )
    manifest.save(folder)
    return manifest


def save_image(path: Path, *, size=(6, 5), color=(10, 20, 30), mode="RGB") -> Path:
    """A one-colour image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, color).convert(mode)
    image.save(path)
    return path


def image_bytes(color=(10, 20, 30), size=(6, 5), kind="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()
