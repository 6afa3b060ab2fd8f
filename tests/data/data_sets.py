"""Small data sets whose pixels say which sample they are."""

from __future__ import annotations

import hashlib
import io
import tarfile
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


def cifar10_batch(pixels: np.ndarray, labels: Sequence[int]) -> bytes:
    """A batch as CIFAR-10 distributes it: rows uint8 [N, 3072], pickled by Python 2 and numpy 1."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    raw = pixels.astype(np.uint8).tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87R"
        b"q\x09(K\x01M" + len(pixels).to_bytes(2, "little") + b"M\x00\x0c\x86"
        b"cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    names = b"](" + b"".join(text(b"some_%d.png" % i) for i in range(len(labels))) + b"e"
    entries = (
        text(b"batch_label") + text(b"training batch 1 of 5") + text(b"labels") + numbers
        + text(b"data") + array + text(b"filenames") + names
    )  # fmt: skip
    return b"\x80\x02}q\x01(" + entries + b"u."


def cifar10_batches(rows: int, seed: int = 0) -> tuple[dict[str, bytes], np.ndarray, list[int]]:
    """Files of cifar-10-batches-py with few rows, and pixels [N, 32, 32, 3] and labels to find."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (6, rows, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, 10, (6, rows)).tolist()
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    files = {
        name: cifar10_batch(pixels[i].reshape(rows, -1), labels[i]) for i, name in enumerate(names)
    }
    files |= {"batches.meta": b"never read", "readme.html": b"<html>"}
    train = pixels[:5].transpose(0, 1, 3, 4, 2).reshape(-1, 32, 32, 3)
    return files, train, [label for part in labels[:5] for label in part]


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_cifar10(path: Path, rows: int = 4, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """cifar-10-python.tar.gz with few rows; pixels [N, 32, 32, 3] and labels of its images."""
    files, pixels, labels = cifar10_batches(rows, seed)
    write_tar(path, {f"cifar-10-batches-py/{name}": body for name, body in files.items()})
    return pixels, labels
