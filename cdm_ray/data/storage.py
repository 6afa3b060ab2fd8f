"""Paths and URLs: where shards and their manifest are read from and written to."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import fsspec

from cdm_ray.errors import ConfigError

log = logging.getLogger(__name__)

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
            log.warning("%s: %s; trying again in %g s", path, one_line(error), pause)
            time.sleep(pause)
    return bytes(system.cat_file(inner))


def one_line(error: Exception) -> str:
    """The error's message, or its class when it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def local_folder(path: str) -> Path:
    """`data.path` as an absolute local folder to write to; raises ConfigError for a URL."""
    if is_url(path):
        raise ConfigError(
            f"data.path={path}: shards are packed into a local folder; give one, then copy the "
            "folder to the URL"
        )
    return Path(absolute(path))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either whole or not there."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    temporary.replace(path)
