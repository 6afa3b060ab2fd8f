"""Which sample each lane shows at each step: pure functions of (seed, step), no state.

Shards are shown in the order of one infinite sequence of *positions*: position p belongs to epoch
p // S of the S shards and shows shard `order_of_epoch[p % S]`, where each epoch has its own seeded
permutation. Lane l of L reads positions l, l + L, l + 2L, ... and inside a position the shard's
samples in an order seeded by (epoch, shard). All lanes consume the same number of samples per step.

*An epoch shows every sample exactly once* means: the positions eS .. (e+1)S - 1 together hold every
sample of the data set exactly once, whatever the number of lanes. Lanes whose shards differ in size
reach the end of an epoch at different steps; when the shards have equal sizes and L divides S, an
epoch is a whole number of samples per lane, and its steps show every sample exactly once.

Permutations come from sorting hashes (the finaliser of splitmix64: Steele, Lea, Flood, OOPSLA 2014)
and not from a generator: the hashes of thousands of epochs are one array operation, which makes
skipping ahead fast, and they do not depend on the version of a library.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Hash = NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_PLUS_ONE = np.asarray([1], dtype=np.uint64)
_SHARDS, _SAMPLES, _PACKING = 0, 1, 2
_POSITIONS_AT_ONCE = 2**18


@dataclass(frozen=True)
class Cursor:
    """Place of a lane: `offset` samples of the shard at `position` have been shown."""

    position: int
    offset: int


class DataOrder:
    """Order of a data set with the given number of samples in each shard."""

    def __init__(self, samples: Sequence[int], *, lanes: int, seed: int) -> None:
        if not samples or min(samples) < 1 or lanes < 1:
            raise ValueError(f"{lanes} lanes over shards of {list(samples)[:8]} samples")
        self.samples = np.asarray(samples, dtype=np.int64)
        self.lanes = lanes
        self._shard_key, self._sample_key = _keys(_SHARDS, seed), _keys(_SAMPLES, seed)

    def shard_at(self, position: int) -> tuple[int, int]:
        """(epoch, index of the shard) of a position."""
        epoch, place = divmod(position, len(self.samples))
        return epoch, int(_order_of_epoch(int(self._shard_key[0]), len(self.samples), epoch)[place])

    def samples_at(self, position: int) -> NDArray[np.int64]:
        """Order in which the samples of the position's shard are shown, [samples of the shard]."""
        epoch, shard = self.shard_at(position)
        within = _absorb(_absorb(self._sample_key, np.uint64(epoch)), np.uint64(shard))
        return _permutations(within, int(self.samples[shard]))[0]

    def locate(self, lanes: Sequence[int], consumed: int) -> list[Cursor]:
        """Where each of the lanes stands after it has shown `consumed` samples.

        Walks the sizes of the shards on the way, 2^18 positions at once, for all lanes together:
        about 0.1 s for a million positions.
        """
        columns = np.asarray(lanes, dtype=np.int64)
        remaining = np.full(len(columns), consumed, dtype=np.int64)
        cursors: list[Cursor | None] = [None] * len(columns)
        row = 0
        while None in cursors:
            guess = math.ceil(remaining.max() / self.samples.mean()) + 1
            rows = max(1, min(guess, _POSITIONS_AT_ONCE // self.lanes))
            sizes = self._sizes(row * self.lanes, rows * self.lanes).reshape(rows, self.lanes)
            ends = sizes[:, columns].cumsum(axis=0)
            for number, lane in enumerate(lanes):
                if cursors[number] is not None:
                    continue
                full = int(np.searchsorted(ends[:, number], remaining[number], side="right"))
                if full < rows:
                    shown = int(ends[full - 1, number]) if full else 0
                    position = (row + full) * self.lanes + lane
                    cursors[number] = Cursor(position, int(remaining[number]) - shown)
                    remaining[number] = 0
                else:
                    remaining[number] -= ends[-1, number]
            row += rows
        return [cursor for cursor in cursors if cursor is not None]

    def _sizes(self, first: int, count: int) -> NDArray[np.int64]:
        """Samples of the shards at positions first .. first + count - 1."""
        shards = len(self.samples)
        start, stop = first // shards, (first + count - 1) // shards + 1
        epochs = _absorb(self._shard_key, np.arange(start, stop, dtype=np.uint64))
        order = _permutations(epochs, shards).ravel()
        return self.samples[order[first - start * shards :][:count]]


def packing_order(samples: int) -> NDArray[np.int64]:
    """The fixed permutation in which the images of a source are packed, [samples].

    Sources are sorted by class, and a shard of a single class would make batches of few classes.
    """
    return _permutations(_keys(_PACKING, 0), samples)[0]


def _keys(domain: int, seed: int) -> _Hash:
    """Start of a hash, [1]: SeedSequence takes seeds of any size and is specified to be stable."""
    return np.random.SeedSequence((domain, seed)).generate_state(1, np.uint64).astype(np.uint64)


def _absorb(state: _Hash, value: _Hash | np.uint64) -> _Hash:
    """Hash of (everything in `state`, value); arrays broadcast, arithmetic is modulo 2^64."""
    x: _Hash = state + _GOLDEN * (value + _PLUS_ONE)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _permutations(states: _Hash, size: int) -> NDArray[np.int64]:
    """One permutation of range(size) for each state: [states, size]."""
    hashes = _absorb(states[:, None], np.arange(size, dtype=np.uint64)[None, :])
    return np.argsort(hashes, axis=1, kind="stable")


@functools.lru_cache(maxsize=64)
def _order_of_epoch(key: int, shards: int, epoch: int) -> NDArray[np.int64]:
    state = _absorb(np.asarray([key], dtype=np.uint64), np.uint64(epoch))
    return _permutations(state, shards)[0]
