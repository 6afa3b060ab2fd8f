"""Paths and URLs: where runs are kept, and where shards are read from.

A run's folder is a `pathlib.Path`, or for a URL such as s3://bucket/runs the `UPath` that has the
same methods. What differs between the two is here, and nowhere else.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from upath import UPath
from upath.implementations.cloud import CloudPath

from cdm_ray.errors import ConfigError, error_line, redact

log = logging.getLogger(__name__)

AnyPath = Path | UPath
"""A local path, or that of a URL."""

_RETRY_AFTER_SECONDS = (0.5, 2.0)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_url(path: str) -> bool:
    """Whether fsspec has to resolve the path; `file://` is local."""
    return "://" in path and not path.startswith("file://")


def absolute(path: str) -> str:
    """The path as every process understands it: URLs unchanged, local paths made absolute."""
    return path if is_url(path) else str(Path(path.removeprefix("file://")).absolute())


def join(folder: str, name: str) -> str:
    """Path of a file of the folder."""
    return f"{folder.rstrip('/')}/{name}"


def fetch(path: str) -> bytes:
    """The whole file in one read, from a local path or any fsspec URL.

    A connection that fails is tried three times. Raises FileNotFoundError when there is no such
    file, ImportError or ValueError when fsspec cannot handle the protocol, and otherwise what the
    file system raised last.
    """
    if not is_url(path):
        return Path(absolute(path)).read_bytes()
    system, inner = fsspec.core.url_to_fs(path)
    for pause in _RETRY_AFTER_SECONDS:
        try:
            return bytes(system.cat_file(inner))
        except _FINAL:
            raise
        except Exception as error:  # each protocol has its own classes of network errors
            log.warning("%s: %s; trying again in %g s", redact(path), error_line(error), pause)
            time.sleep(pause)
    return bytes(system.cat_file(inner))


def path_of(text: str) -> AnyPath:
    """The path that a text names, local or of any fsspec URL.

    Raises ConfigError when fsspec does not know the protocol, misses the package for it, or cannot
    connect, and for the credentials of an object store in its URL.
    """
    if not is_url(text):
        return Path(text.removeprefix("file://"))
    try:
        path = UPath(text)
        if isinstance(path, CloudPath):
            # Other processes write there too, and a listing that is remembered hides it.
            path = UPath(text, use_listings_cache=False)
        path.fs  # noqa: B018 - connects, where a protocol does so at all
    except ImportError as error:
        raise ConfigError(
            f"{redact(text)}: the package for this protocol is missing on this machine "
            f"({error_line(error)}); install it, or use a local path"
        ) from None
    except Exception as error:  # each protocol has its own classes of network errors
        raise ConfigError(
            f"{redact(text)}: cannot be opened ({error_line(error)}); use a local path, or a URL "
            "such as s3://BUCKET/FOLDER whose protocol fsspec knows"
        ) from None
    if isinstance(path, CloudPath) and re.search("://[^/@]*:[^/]*@", text):
        raise ConfigError(
            f"{redact(text)}: object stores take no credentials in their URL; leave them out, and "
            "give them as its package reads them, such as AWS_ACCESS_KEY_ID and its secret"
        )
    return path


def check_writable(folder: AnyPath, field: str) -> None:
    """Write and remove a small file in the folder that a field names, which is created if it can
    be; raises ConfigError when that fails."""
    probe = folder / f".writable-{uuid.uuid4().hex}"
    try:
        write_whole(probe, b"")
        probe.unlink()
        if probe.exists():  # an object store may refuse without an error
            raise PermissionError("files can be written but not removed")
    except Exception as error:  # each protocol has its own classes of network errors
        raise ConfigError(
            f"{field}={redact(str(folder))}: cannot be written to ({error_line(error)}); check "
            "that it exists and that this machine has the right to write and delete there"
        ) from None


@contextmanager
def whole_file(path: AnyPath) -> Iterator[Path]:
    """A local file to write, which becomes `path` when it is finished: whoever looks sees the file
    of before or the whole new one. Folders on the way are created."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = path.with_name(_hidden_name(path))
        try:
            yield hidden
            hidden.replace(path)
        finally:
            hidden.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="cdm_ray-") as folder:
        file = Path(folder, path.name)
        yield file
        _upload(file, path)


def _upload(file: Path, path: UPath) -> None:
    if isinstance(path, CloudPath):  # an object store shows a file when it is whole
        path.fs.put_file(str(file), path.path)
        return
    hidden = path.with_name(_hidden_name(path))
    path.fs.makedirs(path.parent.path, exist_ok=True)
    path.fs.put_file(str(file), hidden.path)
    path.fs.mv(hidden.path, path.path)


def _hidden_name(path: AnyPath) -> str:
    """For a file that is not whole; with the suffix, which tells writers the format."""
    return f".{uuid.uuid4().hex}.{path.name}"


def write_whole(path: AnyPath, content: bytes) -> None:
    """Write a file that is either whole or not there, whoever else writes it at the same time."""
    with whole_file(path) as file:
        file.write_bytes(content)


@contextmanager
def local_file(path: AnyPath) -> Iterator[Path]:
    """The file itself, or for a URL a copy on the local disk that has the same name."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="cdm_ray-") as folder:
        file = Path(folder, path.name)
        path.fs.get_file(path.path, str(file))
        yield file


def list_folder(folder: AnyPath) -> list[AnyPath]:
    """What is in a folder; nothing if there is none."""
    return list(folder.iterdir()) if folder.is_dir() else []


def matching(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """Files below a folder whose path in it matches a pattern such as `*/results.json`, sorted."""
    return sorted(folder.glob(pattern), key=str)


def remove_folder(folder: AnyPath) -> None:
    """Remove a folder and everything in it, if it is there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.is_dir():
        folder.fs.rm(folder.path, recursive=True)


def staging(folder: AnyPath) -> AnyPath:
    """Where to write the files of a folder that `publish` makes visible. An object store cannot
    rename a folder at once: there it is the folder itself, which a last file has to make whole."""
    if isinstance(folder, Path):
        return folder.with_name(f".{folder.name}.tmp")
    return folder


def copy_folder(source: AnyPath, folder: AnyPath) -> None:
    """Copy a folder that holds files alone."""
    staged = staging(folder)
    remove_folder(staged)
    for file in list_folder(source):
        with local_file(file) as local, whole_file(staged / file.name) as copy:
            shutil.copyfile(local, copy)
    publish(folder)


def publish(folder: AnyPath) -> None:
    """Make what was written into `staging(folder)` durable, then visible under its name, in the
    place of what was there."""
    staged = staging(folder)
    if not (isinstance(folder, Path) and isinstance(staged, Path)):
        return
    for path in [*staged.iterdir(), staged]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    remove_folder(folder)
    staged.rename(folder)
