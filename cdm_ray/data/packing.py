"""Packing one shard: the part of `prepare` that runs as a task, on any machine."""

from __future__ import annotations

import hashlib
import os
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from cdm_ray.data.images import UnusableImage, encode_png, load_image
from cdm_ray.data.shards import PackedSample, file_sha256, write_shard
from cdm_ray.data.sources import Kind, SourceImage, open_source
from cdm_ray.errors import one_line
from cdm_ray.storage import write_whole

STATE_FOLDER = ".packing"
PARTIAL = ".partial"


@dataclass(frozen=True)
class ShardTask:
    """What one task needs: everything, so that it can run anywhere that sees the files."""

    kind: Kind
    location: str
    folder: str
    name: str
    images: tuple[tuple[str, SourceImage], ...]
    """(key, image) in packing order."""
    resolution: int
    channels: int

    @property
    def path(self) -> Path:
        """The shard's file."""
        return Path(self.folder, self.name)

    @property
    def record_path(self) -> Path:
        """The file that says that the shard is finished."""
        return Path(self.folder, STATE_FOLDER, f"{self.name}.json")


class ShardRecord(BaseModel):
    """Written beside a finished shard: what it holds and what it was made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    sources: tuple[str, ...]
    """Digest of each source file."""
    contents: tuple[str, ...]
    """Digest of each packed sample's label and pixels."""


@dataclass
class ShardReport:
    """What became of a shard; `record` is None when some of its images are unusable."""

    record: ShardRecord | None = None
    reused: bool = False
    unusable: list[str] = field(default_factory=list)
    """`name: reason` of each image that cannot be packed."""
    changed: list[str] = field(default_factory=list)
    """Names of the images that are not what this shard was first packed from."""


def pack_shard(task: ShardTask) -> ShardReport:
    """Pack one shard, or verify it when a record says that it is finished.

    Mistakes in the source are reported and not raised, so that one run names all of them.
    """
    known = _read_record(task)
    if known is not None:
        changed = _changed_images(task, known)
        if changed:
            return ShardReport(changed=changed)
        if task.path.is_file() and file_sha256(task.path) == known.sha256:
            return ShardReport(record=known, reused=True)
    return _pack(task)


def _read_record(task: ShardTask) -> ShardRecord | None:
    try:
        record = ShardRecord.model_validate_json(task.record_path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None  # nothing was finished that could be relied on
    return record if len(record.sources) == len(task.images) else None


def _changed_images(task: ShardTask, known: ShardRecord) -> list[str]:
    changed = []
    with open_source(task.kind, task.location) as read:
        for (_, image), digest in zip(task.images, known.sources, strict=True):
            try:
                same = _digest(_read(read, image)) == digest
            except UnusableImage:
                same = False
            if not same:
                changed.append(image.name)
    return changed


def _pack(task: ShardTask) -> ShardReport:
    report = ShardReport()
    sources: list[str] = []
    contents: list[str] = []

    def samples() -> Iterator[PackedSample]:
        with open_source(task.kind, task.location) as read:
            for key, source in task.images:
                try:
                    raw = _read(read, source)
                    image = load_image(raw, resolution=task.resolution, channels=task.channels)
                except UnusableImage as error:
                    report.unusable.append(f"{source.name}: {error}")
                    continue
                sources.append(_digest(raw))
                contents.append(_content_digest(image, source.label))
                yield PackedSample(key, encode_png(image), source.label)

    # killed tasks of an earlier run may still be writing: never share a temporary name
    partial = task.record_path.with_name(f"{task.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        write_shard(partial, samples())
        if report.unusable:
            return report
        digest = file_sha256(partial)
        os.replace(partial, task.path)
    finally:
        partial.unlink(missing_ok=True)
    report.record = ShardRecord(sha256=digest, sources=tuple(sources), contents=tuple(contents))
    write_whole(task.record_path, report.record.model_dump_json().encode())
    return report


def _read(read: Callable[[str], bytes], image: SourceImage) -> bytes:
    try:
        return read(image.name)
    except (OSError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UnusableImage(one_line(error)) from None


def _digest(content: bytes) -> str:
    """128 bits: one per image is kept, and nobody gains by making two collide."""
    return hashlib.sha256(content).hexdigest()[:32]


def _content_digest(image: Image.Image, label: int | None) -> str:
    number = -1 if label is None else label
    return _digest(number.to_bytes(8, "little", signed=True) + image.tobytes())
