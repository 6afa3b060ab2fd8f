"""CIFAR-10's python archive, read without running what its pickles may hold.

The archive is a gzipped tar of a folder cifar-10-batches-py with five pickles of 10,000 training
images, a test batch and a list of names. An ordinary unpickler runs whatever a pickle names; here
only what a batch needs is known, and only as stand-ins that hold bytes.
"""

from __future__ import annotations

import functools
import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cdm_ray.errors import ConfigError, one_line

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Batch = tuple[Pixels, list[int]]
"""Pixels [N, 32, 32, 3] and N labels."""

CLASS_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
SIDE = 32

_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_ROW = 3 * SIDE * SIDE
_LARGEST_BATCH = 2**26  # those of CIFAR-10 have 31 MB
_LARGEST_ARCHIVE = 2**28  # 186 MB unpacked
_GZIP_MAGIC = b"\x1f\x8b"
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
_PLAIN_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)  # no links, no sparse files


def is_cifar10(path: Path) -> bool:
    """Whether a folder holds batches of CIFAR-10, or a file is a tar: no other tar is a source."""
    if path.is_dir():
        return any((path / name).is_file() for name in _BATCHES)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_TAR_MAGIC_AT + len(_TAR_MAGIC))
    return head.startswith(_GZIP_MAGIC) or head[_TAR_MAGIC_AT:] == _TAR_MAGIC


def read_training_images(path: Path) -> tuple[Pixels, tuple[int, ...]]:
    """Pixels uint8 [N, 32, 32, 3] and labels of the training batches, in the archive's order.

    `path` is cifar-10-python.tar.gz, the same as a plain tar, or the unpacked folder. Nothing is
    extracted to disk, and the result is kept until another archive is read. Raises ConfigError for
    what is not such an archive.
    """
    files = [path / name for name in _BATCHES if (path / name).is_file()] if path.is_dir() else []
    stamp = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files or [path])
    return _read(path, stamp)


@functools.lru_cache(maxsize=1)
def _read(path: Path, _stamp: tuple[tuple[int, int], ...]) -> tuple[Pixels, tuple[int, ...]]:
    batches = _batches_of_folder(path) if path.is_dir() else _batches_of_tar(path)
    missing = [name for name in _BATCHES if name not in batches]
    if missing:
        raise ConfigError(
            f"data.source={path} holds no {', '.join(missing)}; CIFAR-10's training images are "
            f"the batches {_BATCHES[0]} to {_BATCHES[-1]} of its python version; "
            "of other archives give the unpacked folder"
        )
    parts = [batches.pop(name) for name in _BATCHES]
    pixels = np.concatenate([part for part, _ in parts])
    return pixels, tuple(label for _, labels in parts for label in labels)


def _batches_of_folder(path: Path) -> dict[str, Batch]:
    batches = {}
    for name in _BATCHES:
        file, where = path / name, f"data.source={path}: {name}"
        if file.is_file():
            _check_size(where, file.stat().st_size)
            batches[name] = _load_batch(where, file.read_bytes())
    return batches


def _batches_of_tar(path: Path) -> dict[str, Batch]:
    """Batches by their names without folders; the tar is unpacked in memory."""
    where = f"data.source={path}"
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == _GZIP_MAGIC
        with gzip.open(path) if zipped else path.open("rb") as stream:
            content = stream.read(_LARGEST_ARCHIVE + 1)
        if len(content) > _LARGEST_ARCHIVE:
            raise ConfigError(
                f"{where} unpacks to more than {_LARGEST_ARCHIVE} bytes, CIFAR-10's python archive "
                "to 186 MB; of other archives give the unpacked folder"
            )
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            return dict(_members(where, archive))
    except ConfigError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"{where}: the archive cannot be read: {one_line(error)}") from None


def _members(where: str, archive: tarfile.TarFile) -> Iterator[tuple[str, Batch]]:
    seen = set()
    for member in archive:
        parts = PurePosixPath(member.name).parts
        if member.name.startswith("/") or ".." in parts:
            raise ConfigError(
                f"{where}: the archive holds the unsafe name {member.name!r}; names must be "
                "relative, without '..'"
            )
        name = parts[-1] if parts else ""
        if name not in _BATCHES:
            continue
        if name in seen:
            raise ConfigError(f"{where}: the archive holds {name} more than once")
        seen.add(name)
        _check_size(f"{where}: {member.name!r}", member.size)
        file = archive.extractfile(member) if member.type in _PLAIN_FILES else None
        if file is None:
            raise ConfigError(f"{where}: {member.name!r} is no plain file")
        yield name, _load_batch(f"{where}: {name}", file.read())


def _check_size(where: str, size: int) -> None:
    if size > _LARGEST_BATCH:
        raise ConfigError(
            f"{where} has {size} bytes, more than a batch of CIFAR-10 can have ({_LARGEST_BATCH})"
        )


def _load_batch(where: str, content: bytes) -> Batch:
    """Pixels and labels of one pickled batch."""
    try:
        batch = _BatchUnpickler(where, content).load()
    except ConfigError:
        raise
    except Exception as error:  # a pickle can make the unpickler raise anything
        raise ConfigError(f"{where} is no pickled batch: {one_line(error)}") from None
    data, labels = (_entry(batch, key) for key in ("data", "labels"))
    rows = data.rows if isinstance(data, _Array) else None
    if rows is None or type(labels) is not list or len(labels) != len(rows):
        raise ConfigError(
            f"{where} is no batch of CIFAR-10: it must hold 'data', a uint8 array [N, {_ROW}], "
            "and 'labels', a list of N class numbers"
        )
    for label in labels:
        if type(label) is not int or not 0 <= label < len(CLASS_NAMES):
            raise ConfigError(
                f"{where} holds a label that is no class number from 0 to {len(CLASS_NAMES) - 1}"
            )
    pixels = rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), labels


def _entry(batch: object, key: str) -> object:
    """Python 2 wrote keys as bytes; a batch that was pickled again has text."""
    return batch.get(key.encode(), batch.get(key)) if type(batch) is dict else None


class _Array:
    """Stands for numpy's ndarray and for its `_reconstruct`: holds rows of bytes, or nothing.

    Every stand-in is a class with `__setstate__`, so that a pickle cannot set attributes on it.
    """

    def __init__(self, *_: object) -> None:
        self.rows: Pixels | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, raw = state
        if type(kind) is not _DType or type(raw) is not bytes or fortran:
            raise ValueError("its array is not of uint8 in C order")
        self.rows = np.frombuffer(raw, np.uint8).reshape(-1, _ROW)
        if self.rows.shape != shape:
            raise ValueError(f"its array has the shape {shape!r:.100}, not [N, {_ROW}]")


class _DType:
    """Stands for numpy's dtype, of which it knows uint8 alone."""

    def __init__(self, name: object, *_: object) -> None:
        if name not in (b"u1", "u1"):
            raise ValueError(f"its array has the type {name!r:.100}, not uint8")

    def __setstate__(self, _: object) -> None:
        """Byte order and alignment say nothing of single bytes."""


class _Encoded:
    """Stands for `_codecs.encode`, by which Python 3 writes bytes in Python 2's pickles."""

    def __new__(cls, text: str, encoding: str) -> Any:
        if encoding != "latin1":
            raise ValueError(f"it holds bytes as {encoding!r:.100}, not latin1")
        return text.encode("latin1")

    def __setstate__(self, _: object) -> None:
        raise ValueError("bytes have no state")


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _Encoded,
}


class _BatchUnpickler(pickle.Unpickler):
    """Knows the stand-ins and refuses every other name before anything is called."""

    def __init__(self, where: str, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise ConfigError(
                f"{self._where} asks for {f'{module}.{name}'!r:.100}, which no batch of CIFAR-10 "
                "needs; nothing of it was run. Download the archive again from a source you trust"
            )
        return _STAND_INS[module, name]
