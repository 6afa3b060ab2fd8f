"""Arrays in npz files, and caches made of them."""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cdm_ray.storage import AnyPath, write_whole

log = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray]
T = TypeVar("T")


def read_cache(path: AnyPath, parse: Callable[[Arrays], T]) -> T | None:
    """Content of a cache file, or None when there is none or it is damaged."""
    if not path.exists():
        return None
    try:
        return parse(read_npz(path.read_bytes()))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s); computing it again", path, error)
        return None


def read_npz(content: bytes) -> Arrays:
    """Arrays by name; raises ValueError, EOFError or BadZipFile for anything else, pickles too."""
    loaded = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError("a single array and not an npz")
    return dict(loaded)


def write_cache(path: AnyPath, arrays: Arrays) -> None:
    """Write an npz, whole or not at all."""
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **dict(arrays))
    write_whole(path, content.getvalue())


def short_digest(text: str) -> str:
    """16 hexadecimal digits of SHA-256, for file names."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
