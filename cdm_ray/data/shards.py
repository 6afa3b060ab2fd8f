"""The shard format: a WebDataset tar of `KEY.png` and, with labels, `KEY.cls`.

Written through `webdataset.TarWriter`, so that any WebDataset reader opens it. Read by a parser of
plain ustar headers: in memory it takes 2 us per image where `tarfile` takes 40 and `webdataset`
takes 60, as much as decoding a 32x32 PNG.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from numpy.typing import NDArray
from PIL import Image

from cdm_ray.data.images import MODES, why_undecodable
from cdm_ray.data.manifest import Manifest, ShardInfo
from cdm_ray.errors import RunFailed

_BLOCK = 512


class DataError(RunFailed):
    """The packed data set is damaged: a shard that is not what was packed, or too many images."""


class DamagedSample(ValueError):
    """One sample that cannot be shown."""


@dataclass(frozen=True)
class PackedSample:
    """One sample of a shard to be written: `key` has no dot or slash, `label` is None without."""

    key: str
    png: bytes
    label: int | None


def write_shard(path: Path, samples: Iterable[PackedSample]) -> None:
    """Write a tar whose bytes depend on the samples alone."""
    with (
        path.open("wb") as file,
        webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as writer,
    ):
        for sample in samples:
            members: dict[str, str | bytes] = {"__key__": sample.key, "png": sample.png}
            if sample.label is not None:
                members["cls"] = str(sample.label).encode()
            writer.write(members)


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Shard:
    """One shard in memory: verified against the manifest, indexed, images decoded on demand."""

    def __init__(self, data: bytes, info: ShardInfo, manifest: Manifest) -> None:
        """Raises DataError, naming the shard, when the bytes are not those that were packed."""
        self._data = data
        self._resolution, self._channels = manifest.resolution, manifest.channels
        self._num_classes = manifest.num_classes
        digest = hashlib.sha256(data).hexdigest()
        if digest != info.sha256:
            raise DataError(
                f"shard {info.name} is truncated or changed: its {len(data)} bytes have sha256 "
                f"{digest[:12]}..., the manifest says {info.sha256[:12]}...; copy or pack it again"
            )
        self.keys: list[str] = []
        self._images: list[memoryview] = []
        self._labels: list[bytes | None] = []
        try:
            self._index()
        except ValueError as error:
            raise DataError(f"shard {info.name} cannot be read: {error}") from None
        if len(self.keys) != info.samples:
            raise DataError(
                f"shard {info.name} holds {len(self.keys)} images, the manifest says {info.samples}"
            )

    def _index(self) -> None:
        labels: dict[str, bytes] = {}
        for name, content in _tar_members(self._data):
            key, _, kind = name.partition(".")
            if kind == "png":
                self.keys.append(key)
                self._images.append(content)
            elif kind == "cls":
                labels[key] = bytes(content)
        self._labels = [labels.get(key) for key in self.keys]

    def read_into(self, index: int, out: NDArray[np.uint8]) -> int:
        """Write the pixels of one sample into `out` [C, H, W] and return its label.

        Returns -1 for a data set without labels. Raises DamagedSample when the image cannot be
        decoded, has another size or mode, or lacks a valid label.
        """
        label = self._label(index) if self._num_classes else -1
        shape = (self._resolution, self._resolution)
        try:
            with Image.open(io.BytesIO(self._images[index]), formats=("PNG",)) as image:
                if image.size != shape or image.mode != MODES[self._channels]:
                    width, height = image.size
                    raise DamagedSample(f"{width}x{height} {image.mode} instead of {self._wanted}")
                pixels = np.frombuffer(image.tobytes(), np.uint8)
        except DamagedSample:
            raise
        except Exception as error:  # Pillow's decoders raise whatever the bytes lead them to
            raise DamagedSample(f"not a sound PNG: {why_undecodable(error)}") from None
        out[...] = pixels.reshape(*shape, self._channels).transpose(2, 0, 1)
        return label

    def _label(self, index: int) -> int:
        raw = self._labels[index]
        if raw is None:
            raise DamagedSample("the label is missing")
        if not raw.isdigit() or int(raw) >= self._num_classes:
            raise DamagedSample(f"the label {raw[:20]!r} is not below {self._num_classes}")
        return int(raw)

    @property
    def _wanted(self) -> str:
        return f"{self._resolution}x{self._resolution} {MODES[self._channels]}"


def _tar_members(data: bytes) -> Iterator[tuple[str, memoryview]]:
    """(name, content) of the regular files of a plain ustar archive; ValueError for another."""
    view = memoryview(data)
    position = 0
    while position < len(data) and data[position]:
        header = data[position : position + _BLOCK]
        if header[257:262] != b"ustar" or header[156:157] not in (b"0", b"\0"):
            raise ValueError(f"no plain ustar header at byte {position}")
        name = header[:100].rstrip(b"\0").decode()
        size = int(header[124:136].rstrip(b" \0"), 8)
        start = position + _BLOCK
        if not 0 <= size <= len(data) - start:
            raise ValueError(f"{name} ends outside the file")
        yield name, view[start : start + size]
        position = start + -(-size // _BLOCK) * _BLOCK
