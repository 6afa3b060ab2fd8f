"""The manifest: what a folder of shards holds, and how to know that it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cdm_ray.config import ImageConfig
from cdm_ray.errors import ConfigError, one_line
from cdm_ray.storage import fetch, join, write_whole

MANIFEST_NAME = "manifest.json"

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ShardInfo(_Record):
    """One tar file of the data set."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
    """File name inside the data set's folder; never a path."""
    samples: Annotated[int, Field(ge=1)]
    """Images in it."""
    sha256: _Digest
    """Of the file."""


class Manifest(_Record):
    """Content of `manifest.json`, written last when packing: a folder with one is complete."""

    format: Literal[1] = 1
    """Version of this layout."""
    resolution: Annotated[int, Field(ge=1)]
    """Height and width of every image."""
    channels: Literal[1, 3]
    """1 for greyscale, 3 for RGB."""
    num_classes: Annotated[int, Field(ge=0)] = 0
    """Labels are 0 .. num_classes - 1; 0: the images have no labels."""
    class_names: tuple[str, ...] = ()
    """Names of the labels, or none."""
    shards: Annotated[tuple[ShardInfo, ...], Field(min_length=1)]
    """In packing order."""
    fingerprint: _Digest
    """Of pixels and labels of all samples in packing order; independent of the shard size."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len({shard.name for shard in self.shards}) < len(self.shards):
            raise ValueError("two shards have the same name")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"{len(self.class_names)} class_names do not fit num_classes={self.num_classes}"
            )
        return self

    @property
    def num_samples(self) -> int:
        """Images in all shards."""
        return sum(shard.samples for shard in self.shards)

    @classmethod
    def find(cls, path: str) -> Manifest | None:
        """Manifest of a folder or fsspec URL, or None when there is none.

        Raises ConfigError when the place cannot be read or the manifest is not valid.
        """
        try:
            raw = fetch(join(path, MANIFEST_NAME))
        except FileNotFoundError:
            return None
        except Exception as error:  # each protocol has its own classes of errors
            raise ConfigError(
                f"data.path={path}: {MANIFEST_NAME} cannot be read: {one_line(error)}"
            ) from None
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(
                f"data.path={path}: {MANIFEST_NAME} is damaged "
                f"({where or 'file'}: {first['msg']}); pack the data set again"
            ) from None

    @classmethod
    def load(cls, path: str) -> Manifest:
        """Manifest of a folder or fsspec URL; raises ConfigError when there is no valid one."""
        manifest = cls.find(path)
        if manifest is None:
            raise ConfigError(
                f"data.path={path}: no packed data set there (no {MANIFEST_NAME}); set "
                f"data.source, or pack one with `python jobs/prepare_data.py data.source=... "
                f"data.path={path}`"
            )
        return manifest

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into the folder, whole or not at all."""
        text = self.model_dump_json(indent=1) + "\n"
        write_whole(folder / MANIFEST_NAME, text.encode())


def check_matches(manifest: Manifest, config: ImageConfig) -> None:
    """Raise ConfigError when the packed data set cannot feed the run."""
    for field in ("resolution", "channels"):
        packed, wanted = getattr(manifest, field), getattr(config.data, field)
        if packed != wanted:
            raise ConfigError(
                f"data.{field}={wanted}, but data.path={config.data.path} was packed with "
                f"data.{field}={packed}; set that, or pack into another data.path"
            )
    if config.network.class_conditional and manifest.num_classes == 0:
        raise ConfigError(
            f"network.class_conditional=true needs labels, and the images in "
            f"data.path={config.data.path} have none; set it to false, or pack a labelled source"
        )
    if config.data.lanes > manifest.num_samples:
        raise ConfigError(
            f"data.lanes={config.data.lanes} is more than the {manifest.num_samples} images in "
            f"data.path={config.data.path}; use fewer lanes"
        )
