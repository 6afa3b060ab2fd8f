"""Where images come from: digits, a folder, a zip, or CIFAR-10's archive; labels where they are."""

from __future__ import annotations

import functools
import json
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from cdm_ray.data import cifar10
from cdm_ray.data.images import SUFFIXES
from cdm_ray.errors import ConfigError, one_line
from cdm_ray.storage import absolute, is_url

Kind = Literal["digits", "cifar10", "folder", "zip"]

_LARGEST_FILE = 2**30
_MOST_CLASSES = 2**20
_FFHQ_FOLDER = 1000
_LABELS_NAME = "dataset.json"
_OTHER_SPLITS = {"test", "val", "valid", "validation"}
_FFHQ_VERSIONS = ("images1024x1024", "thumbnails128x128", "in-the-wild-images")
KINDS = "`digits`, a folder of images, a zip of images, or CIFAR-10's python archive"


@dataclass(frozen=True)
class SourceImage:
    """One image of a source: `name` is its path inside, `label` None without labels."""

    name: str
    size: int
    label: int | None


@dataclass(frozen=True)
class Source:
    """The images of a source in the order of their names; nothing is decoded yet."""

    kind: Kind
    location: str
    images: tuple[SourceImage, ...]
    class_names: tuple[str, ...] = ()
    other_files: int = 0
    """Files that are no images by their names, and are left out."""

    @property
    def num_classes(self) -> int:
        """Classes of the labels, 0 without labels."""
        if self.images[0].label is None:
            return 0
        return len(self.class_names) or 1 + max(image.label or 0 for image in self.images)


def find_images(source: str) -> Source:
    """The images that `data.source` names; raises ConfigError when there are none to be had.

    - `digits`: 1,797 images of scikit-learn, 8x8, 16 grey levels, classes 0 to 9.
    - CIFAR-10's python archive, cifar-10-python.tar.gz, or the folder that it unpacks to: the
      50,000 training images with their classes; the test images are left out.
    - A folder: all images below it. If every image lies below one of several first-level folders,
      these are the classes, except in FFHQ's layout, whose folders 00000, 01000, ... of at most
      1,000 images only keep the folders small. A lone folder around everything is no class; what
      it holds counts. AFHQ: beside other splits, `train` is the source. FFHQ: beside the same
      pictures in other sizes, `images1024x1024` is the source.
    - A zip: the same, unless it holds a dataset.json as EDM's tool writes it,
      `{"labels": [[name, class number], ...]}` or `{"labels": null}`.
    """
    if source == "digits":
        return _digits()
    if is_url(source):
        raise ConfigError(
            f"data.source={source}: images are packed from this machine's files; copy them first"
        )
    path = Path(absolute(source))
    if cifar10.is_cifar10(path):
        found = _cifar10(path)
    elif path.is_dir():
        found = _folder(path)
    elif path.is_file() and zipfile.is_zipfile(path):
        found = _zip(path)
    elif path.exists():
        raise ConfigError(f"data.source={source} is neither a folder, a zip nor a tar; use {KINDS}")
    else:
        raise ConfigError(f"data.source={source}: no such file or folder; use {KINDS}")
    if not found.images:
        raise ConfigError(
            f"data.source={source} holds no images, only {found.other_files} other files; "
            f"images are named *{', *'.join(SUFFIXES)}"
        )
    return found


@contextmanager
def open_source(kind: Kind, location: str) -> Iterator[Callable[[str], bytes]]:
    """A function from an image's name to the bytes of its file."""
    if kind == "digits":
        pixels = _digit_pixels()[0]
        # a binary PGM, so that digits are decoded like any other file
        yield lambda name: b"P5 8 8 255\n" + pixels[int(name)].tobytes()
    elif kind == "cifar10":
        images = cifar10.read_training_images(Path(location))[0]
        yield lambda name: b"P6 32 32 255\n" + images[int(name)].tobytes()
    elif kind == "zip":
        with zipfile.ZipFile(location) as archive:
            yield archive.read
    else:
        yield lambda name: (Path(location) / name).read_bytes()


@functools.cache
def _digit_pixels() -> tuple[np.ndarray[Any, np.dtype[np.uint8]], list[int]]:
    from sklearn.datasets import load_digits  # takes a second to import, and only digits need it

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return pixels, [int(label) for label in bunch.target]


def _digits() -> Source:
    pixels, labels = _digit_pixels()
    images = tuple(
        SourceImage(f"{index:04d}", pixel.nbytes, label)
        for index, (pixel, label) in enumerate(zip(pixels, labels, strict=True))
    )
    return Source("digits", "digits", images, tuple("0123456789"))


def _cifar10(path: Path) -> Source:
    pixels, labels = cifar10.read_training_images(path)
    images = tuple(
        SourceImage(f"{index:05d}", pixel.nbytes, label)
        for index, (pixel, label) in enumerate(zip(pixels, labels, strict=True))
    )
    return Source("cifar10", str(path), images, cifar10.CLASS_NAMES)


def _folder(root: Path) -> Source:
    files = {file.relative_to(root).as_posix(): file for file in _walk(root)}
    prefix = _source_folder(filter(_is_image, files))
    inside = {name[len(prefix) :]: file for name, file in files.items() if name.startswith(prefix)}
    sizes = {name: file.stat().st_size for name, file in inside.items() if _is_image(name)}
    labels, class_names = _labels_by_folder(sorted(sizes))
    others = len(inside) - len(sizes)
    return Source("folder", str(root / prefix), _listing(sizes, labels), class_names, others)


def _walk(root: Path) -> Iterator[Path]:
    """All files below a folder, through links to folders but never into a cycle."""
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        yield from (Path(folder, file) for file in files)


def _zip(path: Path) -> Source:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            _refuse_hostile(path, members)
            sizes = {info.filename: info.file_size for info in members}
            text = archive.read(_LABELS_NAME) if _LABELS_NAME in sizes else None
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise ConfigError(
            f"data.source={path}: the zip cannot be read: {one_line(error)}"
        ) from None
    if text is not None:
        del sizes[_LABELS_NAME]
        images = {name: size for name, size in sizes.items() if _is_image(name)}
        labels = _edm_labels(path, text, sorted(images))
        return Source("zip", str(path), _listing(images, labels), (), len(sizes) - len(images))
    prefix = _source_folder(filter(_is_image, sizes))
    inside = {name: size for name, size in sizes.items() if name.startswith(prefix)}
    images = {name: size for name, size in inside.items() if _is_image(name)}
    by_folder, class_names = _labels_by_folder(sorted(name[len(prefix) :] for name in images))
    labels = {prefix + name: label for name, label in by_folder.items()}
    others = len(inside) - len(images)
    return Source("zip", str(path), _listing(images, labels), class_names, others)


def _refuse_hostile(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    """ConfigError for names that point outside, doubles, encryption and absurd sizes."""
    twice = [name for name, n in Counter(info.filename for info in members).items() if n > 1]
    if twice:
        raise ConfigError(f"data.source={path}: the zip holds {twice[0]!r} more than once")
    for info in members:
        name = info.filename
        outside = name.startswith("/") or "\\" in name or ":" in name
        if outside or ".." in PurePosixPath(name).parts:
            raise ConfigError(
                f"data.source={path}: the zip holds the unsafe name {name!r}; names must be "
                "relative, without '..', '\\' and ':'"
            )
        if info.flag_bits & 1:
            raise ConfigError(f"data.source={path}: {name!r} is encrypted; give a plain zip")
        if info.file_size > _LARGEST_FILE:
            raise ConfigError(
                f"data.source={path}: {name!r} has {info.file_size} bytes, more than a sane image "
                f"({_LARGEST_FILE})"
            )


def _edm_labels(path: Path, text: bytes, names: Sequence[str]) -> dict[str, int]:
    """Labels of dataset.json, for every image or for none."""
    where = f"data.source={path}: {_LABELS_NAME}"
    try:
        content = json.loads(text)
        entries = content["labels"]
        pairs = [(name, label) for name, label in entries or ()]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ConfigError(
            f'{where} must be {{"labels": [[name, class number], ...]}} or {{"labels": null}}'
        ) from None
    if entries is None:
        return {}
    for name, label in pairs:
        if type(name) is not str or type(label) is not int or not 0 <= label < _MOST_CLASSES:
            raise ConfigError(
                f"{where} gives {name!r} the label {label!r}; labels are whole numbers from 0 to "
                f"{_MOST_CLASSES - 1}"
            )
    labels = dict(pairs)
    missing = [name for name in names if name not in labels]
    if missing:
        raise ConfigError(
            f"{where} has no label for {len(missing)} of {len(names)} images, the first "
            f"{missing[0]!r}; label all of them, or set labels to null"
        )
    return labels


def _source_folder(names: Iterable[str]) -> str:
    """What the names of the images to take begin with: "" for all, else a folder's path and "/"."""
    parts = [name.split("/") for name in names]
    prefix: list[str] = []
    while (chosen := _chosen(parts)) is not None:
        prefix.append(f"{chosen}/")
        parts = [part[1:] for part in parts if part[0] == chosen and len(part) > 1]
    return "".join(prefix)


def _chosen(parts: Sequence[Sequence[str]]) -> str | None:
    """The first-level folder that alone is the source; None: everything is."""
    folders = {part[0] for part in parts if len(part) > 1}
    if "train" in folders and folders - {"train"} <= _OTHER_SPLITS:
        return "train"
    if folders and folders <= set(_FFHQ_VERSIONS):
        return next(name for name in _FFHQ_VERSIONS if name in folders)
    if len(folders) == 1 and all(len(part) > 1 for part in parts):
        return next(iter(folders))
    return None


def _labels_by_folder(names: Sequence[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Labels and class names when the first-level folders are classes, else nothing."""
    parts = {name: PurePosixPath(name).parts for name in names}
    if any(len(part) < 2 for part in parts.values()):
        return {}, ()
    counts = Counter(part[0] for part in parts.values())
    numbered = all(len(name) == 5 and name.isascii() and name.isdigit() for name in counts)
    if len(counts) < 2 or (numbered and max(counts.values()) <= _FFHQ_FOLDER):
        return {}, ()
    class_names = tuple(sorted(counts))
    number = {name: label for label, name in enumerate(class_names)}
    return {name: number[part[0]] for name, part in parts.items()}, class_names


def _is_image(name: str) -> bool:
    """By its suffix; hidden files and macOS's resource forks are none."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and name.lower().endswith(SUFFIXES)


def _listing(sizes: dict[str, int], labels: dict[str, int]) -> tuple[SourceImage, ...]:
    return tuple(SourceImage(name, sizes[name], labels.get(name)) for name in sorted(sizes))
