"""Work whose results are files, so that what was finished before a kill is not done again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cdm_ray.errors import RunFailed
from cdm_ray.evaluation.features import tensors_digest
from cdm_ray.evaluation.tasks import MapTasks
from cdm_ray.storage import AnyPath, list_folder, local_file, write_whole

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
T = TypeVar("T")

_DIGEST = "digest"


class DamagedPart(ValueError):
    """A part that cannot be read, or whose content is not what was written; names the file."""


def compute_parts(
    work: Callable[[T], Tensors],
    items: Sequence[T],
    folder: AnyPath,
    map_tasks: MapTasks,
    description: str,
) -> list[AnyPath]:
    """Tensors `work(item)` of every item, each in a file of the folder; paths in the items' order.

    Items whose file is already there and whole are left alone: the folder must stand for whatever
    determines the tensors. A damaged file is replaced with a warning. The tensors travel through
    the folder, which every machine that runs tasks must therefore share; raises RunFailed when the
    files do not arrive.
    """
    paths = [folder / f"{index:05d}.safetensors" for index in range(len(items))]
    # A listing, since NFS would remember each single question for a file that is not there yet.
    there = {path.name for path in list_folder(folder)}
    whole = {path for path in paths if path.name in there and _is_whole(path)}
    missing = [(item, path) for item, path in zip(items, paths, strict=True) if path not in whole]
    if missing:
        if whole:
            description = f"{description} ({len(whole)} of {len(items)} parts done before)"
        map_tasks(partial(_compute, work), missing, description)
        arrived = {path.name for path in list_folder(folder)}
        lost = [path for path in paths if path.name not in arrived]
        if lost:
            raise RunFailed(
                f"{folder}: {len(lost)} of {len(items)} parts were computed and are not there "
                f"(first {lost[0].name}); this folder must be on storage that all machines share"
            )
    return paths


def read_part(path: AnyPath) -> Tensors:
    """The tensors of a part, on the CPU; raises DamagedPart unless they are those written."""
    try:
        with local_file(path) as local, safe_open(local, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DamagedPart(f"{path}: {error}") from None
    if metadata.get(_DIGEST) != tensors_digest(tensors):
        raise DamagedPart(f"{path}: changed since it was written")
    return tensors


def rows_of(path: AnyPath, name: str) -> int:
    """Length of the first axis of a tensor of a part that is whole."""
    with local_file(path) as local, safe_open(local, framework="pt") as file:
        return int(file.get_slice(name).get_shape()[0])


def write_part(path: AnyPath, tensors: Tensors) -> None:
    """Write tensors so that `read_part` knows whether they are whole."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(tensors, metadata={_DIGEST: tensors_digest(tensors)}))


def _compute(work: Callable[[T], Tensors], item_and_path: tuple[T, AnyPath]) -> None:
    item, path = item_and_path
    write_part(path, work(item))


def _is_whole(path: AnyPath) -> bool:
    try:
        read_part(path)
    except DamagedPart as damage:
        log.warning("%s; computing it again", damage)
        return False
    return True
