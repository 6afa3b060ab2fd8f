"""The order of samples is a pure function of (seed, step), and an epoch is an epoch."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from cdm_ray.data.order import Cursor, DataOrder, packing_order

LAYOUTS = [
    pytest.param([5], 1, id="one-shard-one-lane"),
    pytest.param([7], 8, id="fewer-shards-than-lanes"),
    pytest.param([3, 3, 3, 3], 4, id="as-many-shards-as-lanes"),
    pytest.param([4, 1, 6], 2, id="uneven"),
    pytest.param([1, 1, 1, 1, 9], 4, id="one-big"),
    pytest.param([10, 10, 10, 3], 16, id="short-last-shard"),
]


def walk(order: DataOrder, lane: int, count: int) -> list[Cursor]:
    """The definition, sample by sample: where the lane stands after 0, 1, ..., count - 1."""
    cursors = []
    for position in itertools.count(lane, order.lanes):
        _, shard = order.shard_at(position)
        for offset in range(order.samples[shard]):
            cursors.append(Cursor(position, offset))
            if len(cursors) == count:
                return cursors
    raise AssertionError


@pytest.mark.parametrize(("sizes", "lanes"), LAYOUTS)
@pytest.mark.parametrize("seed", [0, 2**80])
def test_locate_agrees_with_walking_sample_by_sample(sizes, lanes, seed):
    order = DataOrder(sizes, lanes=lanes, seed=seed)
    walks = [walk(order, lane, 200) for lane in range(lanes)]
    for consumed in range(200):
        assert order.locate(range(lanes), consumed) == [w[consumed] for w in walks]


def test_locate_across_blocks_agrees_with_walking(monkeypatch):
    monkeypatch.setattr("cdm_ray.data.order._POSITIONS_AT_ONCE", 12)
    order = DataOrder([4, 1, 6, 2, 9], lanes=4, seed=1)
    walks = [walk(order, lane, 400) for lane in range(4)]
    for consumed in range(0, 400, 7):
        assert order.locate([3, 1], consumed) == [walks[3][consumed], walks[1][consumed]]


@pytest.mark.parametrize(("sizes", "lanes"), LAYOUTS)
def test_every_epoch_shows_every_shard_once_and_every_sample_of_it_once(sizes, lanes):
    order = DataOrder(sizes, lanes=lanes, seed=4)
    for epoch in range(5):
        positions = range(epoch * len(sizes), (epoch + 1) * len(sizes))
        assert {order.shard_at(p)[0] for p in positions} == {epoch}
        assert sorted(order.shard_at(p)[1] for p in positions) == list(range(len(sizes)))
        for p in positions:
            assert sorted(order.samples_at(p)) == list(range(sizes[order.shard_at(p)[1]]))


def test_skipping_a_million_steps_takes_no_time():
    order = DataOrder([100] * 20, lanes=16, seed=0)
    start = time.process_time()
    cursors = order.locate(range(16), 16 * 10**6)
    assert time.process_time() - start < 5  # takes 0.1 s; sample by sample it would be minutes
    assert cursors == [Cursor(16 * 160_000 + lane, 0) for lane in range(16)]


def test_all_permutations_of_the_shards_are_equally_frequent():
    order = DataOrder([1] * 4, lanes=1, seed=7)
    epochs = 4800
    seen = Counter(
        tuple(order.shard_at(4 * epoch + place)[1] for place in range(4)) for epoch in range(epochs)
    )
    assert len(seen) == 24
    assert chisquare(list(seen.values())).pvalue > 1e-4


def test_samples_are_ordered_anew_for_every_epoch_shard_and_seed():
    order = DataOrder([50, 50], lanes=1, seed=0)
    other = DataOrder([50, 50], lanes=1, seed=1)
    orders = [tuple(o.samples_at(p)) for o in (order, other) for p in range(10)]
    assert len(set(orders)) == 20
    first = np.array([DataOrder([50], lanes=1, seed=s).samples_at(0)[0] for s in range(2000)])
    assert chisquare(np.bincount(first, minlength=50)).pvalue > 1e-4


def test_the_order_is_the_same_in_every_version():
    """A checkpoint stores a step and no order: these numbers must never change."""
    order = DataOrder([5, 6, 7], lanes=2, seed=3)
    assert [order.shard_at(p)[1] for p in range(9)] == [0, 2, 1, 0, 1, 2, 0, 2, 1]
    assert order.samples_at(4).tolist() == [3, 4, 2, 5, 1, 0]
    assert packing_order(8).tolist() == [6, 1, 0, 4, 2, 5, 7, 3]


@pytest.mark.parametrize(("sizes", "lanes"), [([], 1), ([3, 0], 1), ([3], 0)])
def test_impossible_layouts_are_refused(sizes, lanes):
    with pytest.raises(ValueError, match="lanes over shards"):
        DataOrder(sizes, lanes=lanes, seed=0)
