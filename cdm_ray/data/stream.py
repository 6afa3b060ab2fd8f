"""Batches by lanes: shards are fetched ahead, images decoded in background threads."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdm_ray.config import DataConfig
from cdm_ray.data.manifest import Manifest
from cdm_ray.data.order import Cursor, DataOrder
from cdm_ray.data.shards import DamagedSample, DataError, Shard
from cdm_ray.errors import one_line
from cdm_ray.storage import fetch, join

log = logging.getLogger(__name__)

_JUDGED_OVER = 1000
"""Damaged images are a share of whole thousands read, or of whole passes of a smaller data set."""


@dataclass(frozen=True, eq=False)
class RawBatch:
    """Samples of one step, lane-major: the first lane's samples first."""

    images: Tensor
    """uint8 [n, C, H, W]."""
    labels: Tensor | None
    """int64 [n], or None for a data set without labels."""
    keys: list[str]
    """Keys of the samples shown, unique in the data set."""


@dataclass(frozen=True)
class _Damage:
    shard: str
    key: str
    reason: str


class _Book:
    """A shard that is being read or has been; shared by the lanes that show it."""

    def __init__(self, shard: Future[Shard]) -> None:
        self.shard = shard


@dataclass(frozen=True, eq=False)
class _Visit:
    """One lane's visit of one position."""

    position: int
    name: str
    order: NDArray[np.int64]
    book: _Book


@dataclass(frozen=True, eq=False)
class _Piece:
    """Consecutive samples of a visit: order[start:stop]."""

    visit: _Visit
    start: int
    stop: int


class _Lane:
    """A lane's place: the shard it shows, with the following one already being fetched."""

    def __init__(self, current: _Visit, offset: int) -> None:
        self.current, self.offset = current, offset
        self.following: _Visit | None = None


class LaneStream:
    """Iterates `RawBatch` for the steps start_step, start_step + 1, ..., without end.

    A batch holds `lane_batch` samples of each of `lanes`, in the order given; `data.lanes` is the
    number of all lanes. Which samples these are follows from (seed, step, lane) alone, see
    `cdm_ray.data.order`: it does not matter who reads the other lanes, or where reading started.
    A relative `data.path` is resolved here: send other processes its `storage.absolute`.

    A damaged image (not a PNG, other size or mode, bad label) is logged once and replaced by the
    next sound sample of its shard in the order shown, cyclically. `read` and `bad` count the
    samples delivered and the damaged ones among them. DataError is raised when `bad` exceeds
    `data.max_bad_fraction` of `read` (rounded up to whole thousands, or to multiples of the size of
    a smaller data set), and for a shard that is missing, truncated or changed.

    The stream is read from one thread and must be closed, by `close()` or as a context manager.
    """

    def __init__(
        self,
        data: DataConfig,
        manifest: Manifest,
        *,
        seed: int,
        lanes: Sequence[int],
        lane_batch: int,
        start_step: int = 0,
    ) -> None:
        if not lanes or len(set(lanes)) < len(lanes) or not set(lanes) <= set(range(data.lanes)):
            raise ValueError(f"lanes {list(lanes)} are not different lanes below {data.lanes}")
        if lane_batch < 1 or start_step < 0:
            raise ValueError(f"lane_batch={lane_batch} and start_step={start_step} are too small")
        self.read = 0
        self.bad = 0
        self._data, self._manifest, self._lane_batch = data, manifest, lane_batch
        self._order = DataOrder(
            [shard.samples for shard in manifest.shards], lanes=data.lanes, seed=seed
        )
        self._logged: set[tuple[str, str]] = set()
        self._books: WeakValueDictionary[int, _Book] = WeakValueDictionary()
        self._readers = ThreadPoolExecutor(data.decode_threads, "shard-reader")
        self._decoders = ThreadPoolExecutor(data.decode_threads, "image-decoder")
        self._ahead: deque[Future[tuple[RawBatch, list[_Damage]]]] = deque()
        cursors = self._order.locate(lanes, start_step * lane_batch)
        self._lanes = [self._start(cursor) for cursor in cursors]

    def __iter__(self) -> Iterator[RawBatch]:
        return self

    def __next__(self) -> RawBatch:
        while len(self._ahead) <= self._data.prefetch:
            pieces = [piece for lane in self._lanes for piece in self._take(lane)]
            self._ahead.append(self._decoders.submit(self._decode, pieces))
        batch, damages = self._ahead[0].result()  # an error stays in front: no batch is passed over
        self._ahead.popleft()
        self._account(len(batch.keys), damages)
        return batch

    def close(self) -> None:
        """Stop the threads; the stream cannot be read any more."""
        for pool in (self._decoders, self._readers):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self._decoders, self._readers):
            pool.shutdown(wait=True)
        self._ahead.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, cursor: Cursor) -> _Lane:
        return _Lane(self._visit(cursor.position), cursor.offset)

    def _visit(self, position: int) -> _Visit:
        _, index = self._order.shard_at(position)
        book = self._books.get(index)
        if book is None:
            book = _Book(self._readers.submit(self._read_shard, index))
            self._books[index] = book
        name = self._manifest.shards[index].name
        return _Visit(position, name, self._order.samples_at(position), book)

    def _read_shard(self, index: int) -> Shard:
        info = self._manifest.shards[index]
        try:
            content = fetch(join(self._data.path, info.name))
        except Exception as error:  # each protocol has its own classes of errors
            raise DataError(
                f"shard {info.name} of data.path={self._data.path} cannot be read: "
                f"{one_line(error)}"
            ) from error
        return Shard(content, info, self._manifest)

    def _take(self, lane: _Lane) -> Iterator[_Piece]:
        """The lane's next `lane_batch` samples; moves the lane on."""
        wanted = self._lane_batch
        while wanted:
            if lane.following is None:
                lane.following = self._visit(lane.current.position + self._data.lanes)
            stop = min(lane.offset + wanted, len(lane.current.order))
            yield _Piece(lane.current, lane.offset, stop)
            wanted -= stop - lane.offset
            lane.offset = stop
            if stop == len(lane.current.order):
                lane.current, lane.following, lane.offset = lane.following, None, 0

    def _decode(self, pieces: list[_Piece]) -> tuple[RawBatch, list[_Damage]]:
        count = sum(piece.stop - piece.start for piece in pieces)
        side = self._manifest.resolution
        images = np.empty((count, self._manifest.channels, side, side), np.uint8)
        labels = np.empty(count, np.int64) if self._manifest.num_classes else None
        keys: list[str] = []
        damages: list[_Damage] = []
        for piece in pieces:
            shard = piece.visit.book.shard.result()
            for offset in range(piece.start, piece.stop):
                row = len(keys)
                index, label, damage = _show(piece.visit, shard, offset, images[row])
                keys.append(shard.keys[index])
                if labels is not None:
                    labels[row] = label
                if damage is not None:
                    damages.append(damage)
        tensor = None if labels is None else torch.from_numpy(labels)
        return RawBatch(torch.from_numpy(images), tensor, keys), damages

    def _account(self, read: int, damages: list[_Damage]) -> None:
        """Count, log and judge when a batch is delivered, so that it does not depend on threads."""
        self.read += read
        self.bad += len(damages)
        for damage in damages:
            if (damage.shard, damage.key) not in self._logged:
                self._logged.add((damage.shard, damage.key))
                log.warning(
                    "damaged image skipped: shard %s, key %s: %s",
                    damage.shard, damage.key, damage.reason,
                )  # fmt: skip
        allowed = self._data.max_bad_fraction
        unit = min(_JUDGED_OVER, self._manifest.num_samples)
        judged_over = -(-self.read // unit) * unit
        if self.bad > allowed * judged_over:
            raise DataError(
                f"{self.bad} of the {self.read} images read from data.path={self._data.path} are "
                f"damaged, more than data.max_bad_fraction={allowed} allows of {judged_over}; the "
                "log names them; pack the data set again"
            )


def _show(
    visit: _Visit, shard: Shard, offset: int, out: NDArray[np.uint8]
) -> tuple[int, int, _Damage | None]:
    """Decode the sample at `offset` of the visit, or the next sound one, into `out` [C, H, W].

    Returns the index shown, its label, and what was wrong with the sample that belongs there.
    """
    damage: _Damage | None = None
    count = len(visit.order)
    for shift in range(count):
        index = int(visit.order[(offset + shift) % count])
        try:
            return index, shard.read_into(index, out), damage
        except DamagedSample as error:
            damage = damage or _Damage(visit.name, shard.keys[index], str(error))
    raise DataError(f"shard {visit.name} of {count} images has no sound one: {damage}")
