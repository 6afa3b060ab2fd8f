"""Packing a source into shards: in parallel, byte-identical when repeated, safe to interrupt.

The images are put in a fixed permutation of their sorted names (`order.packing_order`) and cut into
shards, one task each. A shard is written under another name, renamed, and then recorded in
`.packing/`; the manifest comes last. Running the same packing again verifies what is there, packs
what is missing, and ends with the same bytes; anything that would end with other bytes is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from cdm_ray.config import DataConfig, ImageConfig
from cdm_ray.data.manifest import MANIFEST_NAME, Manifest, ShardInfo
from cdm_ray.data.order import packing_order
from cdm_ray.data.packing import PARTIAL, STATE_FOLDER, ShardReport, ShardTask, pack_shard
from cdm_ray.data.sources import KINDS, Source, find_images
from cdm_ray.errors import ConfigError
from cdm_ray.storage import absolute, is_url, write_whole

log = logging.getLogger(__name__)

_PLAN_NAME = "plan.json"
_NAMED = 5


class PrepareConfig(ImageConfig):
    """Configuration of `jobs/prepare_data.py`: a recipe of a run, of which `data` and `ray` count.

    Whether the sections fit together is a question of the run: `data.resolution=64` can be packed
    with a recipe whose network and evaluation are for 8x8.
    """

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        return self


class MapTasks(Protocol):
    """`cdm_ray.cluster.map_tasks`, or anything that maps a function over items in order."""

    def __call__(self, function: Any, items: Sequence[Any], description: str, /) -> list[Any]: ...


class _Plan(BaseModel):
    """What decides the bytes of a packing; kept in its folder to refuse another one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    resolution: int
    channels: int
    samples_per_shard: int
    images: int
    class_names: tuple[str, ...]
    listing: str
    """Digest of the images' names, sizes and labels."""


@dataclass(frozen=True)
class Packing:
    """A packing that has been checked and not begun."""

    config: DataConfig
    source: Source
    folder: Path
    plan: _Plan
    tasks: tuple[ShardTask, ...]

    def describe(self) -> str:
        """What would be packed, one fact per line."""
        source, classes = self.source, self.source.num_classes
        names = ", ".join(source.class_names[:10]) + (", ..." if classes > 10 else "")
        lines = {
            "source": f"{source.location} ({source.kind})",
            "images": f"{len(source.images)}, {source.other_files} other files left out",
            "classes": f"{classes} ({names})" if names else str(classes or "no labels"),
            "packed as": f"{self.plan.resolution}x{self.plan.resolution} PNG, "
            f"{'RGB' if self.plan.channels == 3 else 'greyscale'}",
            "into": f"{self.folder}: {len(self.tasks)} shards of up to "
            f"{self.plan.samples_per_shard} images",
        }
        return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


def ensure_prepared(config: DataConfig, map_tasks: MapTasks) -> Manifest:
    """Manifest of `data.path`; packs `data.source` first when there is none and a source is given.

    A manifest that exists is taken as it is, whatever `data.source` says. Raises ConfigError.
    """
    if config.source is None:
        return Manifest.load(config.path)
    return Manifest.find(config.path) or prepare(config, map_tasks)


def prepare(config: DataConfig, map_tasks: MapTasks) -> Manifest:
    """Pack `data.source` into `data.path`; see `plan_packing` and `pack` for the errors."""
    return pack(plan_packing(config), map_tasks)


def plan_packing(config: DataConfig) -> Packing:
    """Find the images and check that `data.path` can take them; writes nothing.

    Raises ConfigError when there are no images, when the folder holds anything but this packing,
    finished or not, or is a URL.
    """
    if config.source is None:
        raise ConfigError(f"data.source is not set: name the images to pack, {KINDS}")
    if is_url(config.path):
        raise ConfigError(
            f"data.path={config.path}: shards are packed into a local folder; give one, then copy "
            "the folder to the URL"
        )
    folder = Path(absolute(config.path))
    source = find_images(config.source)
    listing = hashlib.sha256()
    for image in source.images:
        label = -1 if image.label is None else image.label
        listing.update(f"{image.name}\0{image.size}\0{label}\n".encode(errors="surrogateescape"))
    plan = _Plan(
        resolution=config.resolution,
        channels=config.channels,
        samples_per_shard=config.samples_per_shard,
        images=len(source.images),
        class_names=source.class_names,
        listing=listing.hexdigest(),
    )
    _check_folder(config, folder, plan)
    return Packing(config, source, folder, plan, tuple(_tasks(config, source, folder)))


def pack(packing: Packing, map_tasks: MapTasks) -> Manifest:
    """Do what was planned and return the manifest.

    Raises ConfigError naming images that cannot be packed (nothing is kept then), images that have
    changed since an earlier packing into the same folder, or a packing that is still running.
    """
    state = packing.folder / STATE_FOLDER
    state.mkdir(parents=True, exist_ok=True)
    with _locked(packing.folder):
        _check_folder(packing.config, packing.folder, packing.plan)
        for partial in state.glob(f"*{PARTIAL}"):
            partial.unlink(missing_ok=True)
        write_whole(state / _PLAN_NAME, packing.plan.model_dump_json().encode())
        reports: list[ShardReport] = map_tasks(
            pack_shard, packing.tasks, f"packing {packing.folder.name}"
        )
        _refuse_unsound(packing, reports)
        manifest = _manifest(packing, reports)
        manifest.save(packing.folder)
    reused = sum(report.reused for report in reports)
    log.info("%s: %d shards packed, %d reused", packing.folder, len(reports) - reused, reused)
    return manifest


def _tasks(config: DataConfig, source: Source, folder: Path) -> Iterator[ShardTask]:
    order = packing_order(len(source.images)).tolist()
    size = config.samples_per_shard
    for number, start in enumerate(range(0, len(order), size)):
        yield ShardTask(
            kind=source.kind,
            location=source.location,
            folder=str(folder),
            name=f"shard-{number:06d}.tar",
            images=tuple(
                (f"{index:08d}", source.images[index]) for index in order[start : start + size]
            ),
            resolution=config.resolution,
            channels=config.channels,
        )


def _check_folder(config: DataConfig, folder: Path, plan: _Plan) -> None:
    """ConfigError unless the folder is empty or holds this very packing, finished or not."""
    advice = "choose another data.path, or delete that folder to pack again"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"data.path={config.path} is a file; choose a folder")
    try:
        there = _Plan.model_validate_json((folder / STATE_FOLDER / _PLAN_NAME).read_bytes())
    except FileNotFoundError:
        if (folder / MANIFEST_NAME).exists():
            raise ConfigError(
                f"data.path={config.path} holds a data set that was packed elsewhere; leave "
                f"data.source empty to use it, or {advice}"
            ) from None
        if folder.is_dir() and any(entry.name != STATE_FOLDER for entry in folder.iterdir()):
            raise ConfigError(
                f"data.path={config.path} holds files but no packed data set; {advice}"
            ) from None
        return
    except ValidationError:
        raise ConfigError(
            f"data.path={config.path} holds a packing of another version; {advice}"
        ) from None
    differences = _differences(there, plan)
    if differences:
        raise ConfigError(
            f"data.path={config.path} was packed with {'; '.join(differences)}; {advice}"
        )


def _differences(there: _Plan, here: _Plan) -> list[str]:
    settings = [
        f"data.{name}={getattr(there, name)}, not {getattr(here, name)}"
        for name in ("resolution", "channels", "samples_per_shard")
        if getattr(there, name) != getattr(here, name)
    ]
    if there.images != here.images:
        settings.append(f"{there.images} images, and data.source has {here.images}")
    elif there.listing != here.listing or there.class_names != here.class_names:
        settings.append("another data.source (names, sizes or labels of the images differ)")
    return settings


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process packs into a folder; the lock ends with the process, however it ends."""
    with (folder / STATE_FOLDER / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"data.path={folder}: another process is packing into it; wait until it ends"
            ) from None
        yield


def _refuse_unsound(packing: Packing, reports: Sequence[ShardReport]) -> None:
    source = packing.config.source
    unusable = [line for report in reports for line in report.unusable]
    changed = [name for report in reports for name in report.changed]
    if changed:
        raise ConfigError(
            f"data.source={source}: {_some(changed)} changed since data.path="
            f"{packing.config.path} was packed; choose another data.path, or delete that folder"
        )
    if unusable:
        if not (packing.folder / MANIFEST_NAME).exists():
            _discard(packing)  # or the repaired source would be refused as another one
        raise ConfigError(
            f"data.source={source}: {len(unusable)} of {len(packing.source.images)} images cannot "
            f"be packed: {_some(unusable)}; repair or remove them"
        )


def _discard(packing: Packing) -> None:
    for task in packing.tasks:
        task.path.unlink(missing_ok=True)
    shutil.rmtree(packing.folder / STATE_FOLDER)


def _some(lines: Sequence[str]) -> str:
    more = f" and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
    return ", ".join(lines[:_NAMED]) + more


def _manifest(packing: Packing, reports: Sequence[ShardReport]) -> Manifest:
    plan, classes = packing.plan, packing.source.num_classes
    fingerprint = hashlib.sha256(f"{plan.resolution} {plan.channels} {classes}\n".encode())
    shards = []
    for task, report in zip(packing.tasks, reports, strict=True):
        if report.record is None:
            raise RuntimeError(f"{task.name} has neither a record nor an error")
        for content in report.record.contents:
            fingerprint.update(content.encode())
        shards.append(
            ShardInfo(name=task.name, samples=len(task.images), sha256=report.record.sha256)
        )
    return Manifest(
        resolution=plan.resolution,
        channels=packing.config.channels,
        num_classes=classes,
        class_names=plan.class_names,
        shards=tuple(shards),
        fingerprint=fingerprint.hexdigest(),
    )
