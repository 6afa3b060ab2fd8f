"""Batches by lanes are a pure function of the step; an epoch shows every sample exactly once."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, deque

import fsspec
import numpy as np
import pytest
from data_sets import image_bytes, pixels_of, png_of
from PIL import Image

from cdm_ray.config import DataConfig
from cdm_ray.data.images import encode_png
from cdm_ray.data.manifest import Manifest, ShardInfo
from cdm_ray.data.order import DataOrder
from cdm_ray.data.shards import DataError, PackedSample, Shard, file_sha256, write_shard
from cdm_ray.data.stream import LaneStream

LAYOUTS = [
    # shard sizes, lanes, samples of a lane per step
    pytest.param([5], 1, 2, id="one-shard-one-lane"),
    pytest.param([5], 4, 3, id="one-shard-four-lanes"),
    pytest.param([4, 4], 8, 1, id="fewer-shards-than-lanes"),
    pytest.param([6, 6, 6, 2], 2, 4, id="short-last-shard"),
    pytest.param([1, 9, 3, 2, 5], 4, 7, id="uneven-and-batch-over-several-shards"),
    pytest.param([3] * 8, 8, 3, id="shard-per-lane"),
]


def read(data, manifest, steps, *, lanes=None, lane_batch=2, start_step=0, seed=0):
    """Batches of the given number of steps."""
    lanes = range(data.lanes) if lanes is None else lanes
    with LaneStream(
        data, manifest, seed=seed, lanes=lanes, lane_batch=lane_batch, start_step=start_step
    ) as stream:
        return list(itertools.islice(stream, steps))


def keys_of(batches):
    return [batch.keys for batch in batches]


def all_keys(manifest):
    return {f"{i:08d}" for i in range(manifest.num_samples)}


@pytest.mark.parametrize(("sizes", "lanes", "lane_batch"), LAYOUTS)
def test_an_epoch_shows_every_sample_exactly_once(data_set, sizes, lanes, lane_batch):
    data, manifest = data_set(sizes, lanes)
    order = DataOrder(sizes, lanes=lanes, seed=0)
    positions = 3 * len(sizes)
    visits = -(-positions // lanes)
    steps = -(-visits * max(sizes) // lane_batch)
    batches = read(data, manifest, steps, lane_batch=lane_batch)
    shown: dict[int, list[str]] = {}
    for lane in range(lanes):
        rows = slice(lane * lane_batch, (lane + 1) * lane_batch)
        sequence = iter([key for batch in batches for key in batch.keys[rows]])
        for position in range(lane, positions, lanes):
            count = sizes[order.shard_at(position)[1]]
            shown[position] = list(itertools.islice(sequence, count))
    for epoch in range(3):
        keys = [
            key
            for place in range(len(sizes))
            for key in shown[epoch * len(sizes) + place]
        ]  # fmt: skip
        assert Counter(keys) == Counter(all_keys(manifest)), f"epoch {epoch}"


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_with_equal_shards_the_steps_of_an_epoch_show_every_sample_exactly_once(data_set, lanes):
    data, manifest = data_set([6] * 4, lanes)
    steps = 24 // (3 * lanes)
    batches = read(data, manifest, 3 * steps, lane_batch=3)
    epochs = [batches[e * steps : (e + 1) * steps] for e in range(3)]
    for epoch in epochs:
        assert Counter(sum(keys_of(epoch), [])) == Counter(all_keys(manifest))
    assert keys_of(epochs[0]) != keys_of(epochs[1])


@pytest.mark.parametrize(("sizes", "lanes", "lane_batch"), LAYOUTS)
def test_workers_together_see_the_batch_of_one_worker(data_set, sizes, lanes, lane_batch):
    data, manifest = data_set(sizes, lanes)
    whole = read(data, manifest, 6, lane_batch=lane_batch)
    for workers in {1, 2, 3, lanes} & set(range(1, lanes + 1)):
        dealt = [list(part) for part in np.array_split(np.arange(lanes), workers)]
        parts = [read(data, manifest, 6, lane_batch=lane_batch, lanes=part) for part in dealt]
        for step, batch in enumerate(whole):
            assert sum((part[step].keys for part in parts), []) == batch.keys


def test_lanes_come_in_the_order_given(data_set):
    data, manifest = data_set([5, 5], 4)
    (whole,) = read(data, manifest, 1)
    (some,) = read(data, manifest, 1, lanes=[3, 0])
    assert some.keys == whole.keys[6:8] + whole.keys[0:2]


@pytest.mark.parametrize(("sizes", "lanes", "lane_batch"), LAYOUTS)
def test_a_stream_started_at_a_step_continues_one_that_ran_until_there(
    data_set, sizes, lanes, lane_batch
):
    data, manifest = data_set(sizes, lanes)
    whole = keys_of(read(data, manifest, 20, lane_batch=lane_batch))
    for start in (1, 7, 13):
        late = read(data, manifest, 20 - start, lane_batch=lane_batch, start_step=start)
        assert keys_of(late) == whole[start:]


def test_threads_and_prefetch_change_nothing(data_set):
    data, manifest = data_set([7, 2, 5], 4)
    expected = keys_of(read(data, manifest, 30))
    for threads, prefetch in [(1, 1), (4, 9)]:
        other = data.model_copy(update={"decode_threads": threads, "prefetch": prefetch})
        assert keys_of(read(other, manifest, 30)) == expected


def test_seeds_give_different_orders(data_set):
    data, manifest = data_set([20, 20], 2)
    assert keys_of(read(data, manifest, 5, seed=0)) != keys_of(read(data, manifest, 5, seed=1))


def test_images_and_labels_belong_to_their_keys(data_set):
    data, manifest = data_set([300, 20], 2)
    for batch in read(data, manifest, 20, lane_batch=16):
        assert batch.images.shape == (32, 1, 4, 4)
        assert str(batch.images.dtype) == "torch.uint8"
        assert str(batch.labels.dtype) == "torch.int64"
        for key, image, label in zip(batch.keys, batch.images, batch.labels, strict=True):
            assert np.array_equal(image[0].numpy(), pixels_of(int(key)))
            assert label == int(key) % 10


def test_a_data_set_without_labels_has_none(data_set):
    data, manifest = data_set([5], 1, num_classes=0)
    assert read(data, manifest, 1)[0].labels is None


def test_a_stream_is_read_from_any_fsspec_url(data_set, http_server, tmp_path):
    data, manifest = data_set([7, 2, 5], 2)
    expected = keys_of(read(data, manifest, 12))
    memory = fsspec.filesystem("memory")
    memory.put(data.path, "/streamed/data", recursive=True)
    try:
        for url in (f"{http_server}/packed", "memory://streamed/data", f"file://{data.path}/"):
            remote = data.model_copy(update={"path": url})
            assert Manifest.load(url) == manifest
            assert keys_of(read(remote, manifest, 12)) == expected
    finally:
        memory.rm("/streamed", recursive=True)


def test_a_shard_is_read_once_for_all_lanes_that_show_it(data_set, monkeypatch):
    data, manifest = data_set([40], 8)
    reads = []
    real = LaneStream._read_shard
    monkeypatch.setattr(
        LaneStream, "_read_shard", lambda self, i: (reads.append(i), real(self, i))[1]
    )
    read(data, manifest, 200)  # ten epochs
    assert reads == [0]


def test_only_the_current_and_the_next_shard_of_a_lane_are_read(data_set, monkeypatch):
    data, manifest = data_set([8] * 20, 1, prefetch=1)
    reads = []
    real = LaneStream._read_shard
    monkeypatch.setattr(
        LaneStream, "_read_shard", lambda self, i: (reads.append(i), real(self, i))[1]
    )
    alive = Counter()
    real_init, lock = Shard.__init__, threading.Lock()

    def counted(self, *args):
        real_init(self, *args)
        with lock:
            alive["now"] += 1
            alive["most"] = max(alive["most"], alive["now"])

    def freed(self):
        with lock:
            alive["now"] -= 1

    monkeypatch.setattr(Shard, "__init__", counted)
    monkeypatch.setattr(Shard, "__del__", freed, raising=False)
    with LaneStream(data, manifest, seed=0, lanes=[0], lane_batch=1) as stream:
        next(stream)
        assert len(reads) <= 2
        for _ in range(8 * 15):
            next(stream)
    # current and next one, and the one that a batch still being decoded holds
    assert alive["most"] <= 4


def test_no_more_than_the_prefetched_batches_are_decoded_ahead(data_set, monkeypatch):
    data, manifest = data_set([100], 1, prefetch=3)
    decoded = []
    real = Shard.read_into
    monkeypatch.setattr(
        Shard, "read_into", lambda self, i, out: (decoded.append(i), real(self, i, out))[1]
    )
    with LaneStream(data, manifest, seed=0, lanes=[0], lane_batch=2) as stream:
        next(stream)
        deadline = time.monotonic() + 5
        while len(decoded) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(decoded) == 2 * (1 + 3)


def test_closing_stops_the_threads(data_set):
    data, manifest = data_set([100], 2)
    with LaneStream(data, manifest, seed=0, lanes=[0, 1], lane_batch=2) as stream:
        next(stream)
        names = [thread.name for thread in threading.enumerate()]
        assert any(name.startswith("image-decoder") for name in names)
    names = [thread.name for thread in threading.enumerate()]
    assert not [n for n in names if n.startswith(("image-decoder", "shard-reader"))]
    with pytest.raises(RuntimeError):
        next(stream)
    stream.close()


@pytest.mark.parametrize("fault", ["missing", "truncated", "changed"])
def test_a_shard_that_is_not_what_was_packed_stops_the_run_with_its_name(data_set, tmp_path, fault):
    data, manifest = data_set([10, 10], 1)
    bad = DataOrder([10, 10], lanes=1, seed=0).shard_at(1)[1]
    shard = tmp_path / "packed" / manifest.shards[bad].name
    content = bytearray(shard.read_bytes())
    if fault == "missing":
        shard.unlink()
    elif fault == "truncated":
        shard.write_bytes(content[:-512])
    else:
        content[700] ^= 1
        shard.write_bytes(content)
    with LaneStream(data, manifest, seed=0, lanes=[0], lane_batch=2) as stream:
        for _ in range(5):
            next(stream)  # the sound shard
        with pytest.raises(DataError, match=manifest.shards[bad].name):
            next(stream)


def damage(kind: str) -> bytes:
    return {
        "no png": b"not an image",
        "truncated": png_of(0)[:-30],
        "other size": image_bytes(size=(5, 4)),
        "rgb": image_bytes(size=(4, 4)),
        "claims 10^9 pixels": png_of(0)[:16] + b"\0\0\xff\xff\0\0\xff\xff" + png_of(0)[24:],
    }[kind]


@pytest.mark.parametrize("kind", ["no png", "truncated", "other size", "rgb", "claims 10^9 pixels"])
def test_a_damaged_image_is_replaced_by_the_next_sound_one_counted_and_logged_once(
    data_set, caplog, kind
):
    data, manifest = data_set(
        [10, 10], 1, damaged={3: damage(kind), 4: damage(kind)}, max_bad_fraction=1
    )
    order = DataOrder([10, 10], lanes=1, seed=0)
    with (
        caplog.at_level(logging.WARNING, "cdm_ray.data.stream"),
        LaneStream(data, manifest, seed=0, lanes=[0], lane_batch=5) as stream,
    ):
        keys = [key for _ in range(8) for key in next(stream).keys]  # two epochs
        assert (stream.read, stream.bad) == (40, 4)
    expected = []
    for position in range(4):
        shard = order.shard_at(position)[1]
        samples = [10 * shard + i for i in order.samples_at(position).tolist()]
        for place in range(10):
            cycle = samples[place:] + samples[:place]
            expected.append(next(i for i in cycle if i not in (3, 4)))
    assert keys == [f"{i:08d}" for i in expected]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert all("shard-000000.tar" in line for line in lines)
    assert {key in line for key in ("00000003", "00000004") for line in lines} == {True, False}


def test_a_label_that_is_no_class_is_damage(tmp_path, data_set):
    data, manifest = data_set([10], 1, max_bad_fraction=1)
    fewer = manifest.model_copy(update={"num_classes": 8})  # labels 8 and 9 are none any more
    with LaneStream(data, fewer, seed=0, lanes=[0], lane_batch=10) as stream:
        batch = next(stream)
        assert stream.bad == 2
    assert set(batch.labels.tolist()) == set(range(8))


def test_damage_does_not_move_other_samples(data_set):
    data, manifest = data_set([10, 10], 2, damaged={3: b""}, max_bad_fraction=1)
    whole = keys_of(read(data, manifest, 20))
    assert keys_of(read(data, manifest, 11, start_step=9)) == whole[9:]


def test_too_much_damage_stops_the_run_with_the_counts(data_set):
    # 3 of the first 1,000 at most; the 4th damaged image is one too many
    damaged = dict.fromkeys(range(100, 104), b"")
    data, manifest = data_set([500, 500], 1, damaged=damaged, max_bad_fraction=0.003)
    with LaneStream(data, manifest, seed=0, lanes=[0], lane_batch=1) as stream:
        with pytest.raises(DataError, match=r"4 of the \d+ images .* are damaged.*0\.003"):
            deque(stream, maxlen=0)
        assert stream.bad == 4


def test_damage_within_the_share_is_tolerated_for_ever(data_set):
    data, manifest = data_set([100], 1, damaged={5: b""}, max_bad_fraction=0.01)
    batches = read(data, manifest, 50, lane_batch=20)
    assert len(batches) == 50


def test_a_small_data_set_is_judged_over_its_size(data_set):
    data, manifest = data_set([50], 1, damaged={5: b""}, max_bad_fraction=0.01)
    with pytest.raises(DataError, match="1 of the"):
        read(data, manifest, 50, lane_batch=1)


def test_a_shard_without_a_sound_image_stops_the_run_and_its_batch_is_never_passed_over(data_set):
    data, manifest = data_set([3, 3], 1, damaged=dict.fromkeys(range(3), b""), max_bad_fraction=1)
    sound_first = DataOrder([3, 3], lanes=1, seed=0).shard_at(0)[1] == 1
    with LaneStream(data, manifest, seed=0, lanes=[0], lane_batch=3) as stream:
        for _ in range(sound_first):
            next(stream)
        for _ in range(3):  # the batch after it would be a sound one
            with pytest.raises(DataError, match=r"shard-000000\.tar of 3 images has no sound one"):
                next(stream)


@pytest.mark.parametrize("lanes", [[], [0, 0], [4], [-1]])
def test_impossible_lanes_are_refused(data_set, lanes):
    data, manifest = data_set([5], 4)
    with pytest.raises(ValueError, match="different lanes below 4"):
        LaneStream(data, manifest, seed=0, lanes=lanes, lane_batch=1)


def test_rgb_images_are_channels_first(tmp_path):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    path = tmp_path / "shard-000000.tar"
    write_shard(path, [PackedSample("00000000", encode_png(Image.fromarray(pixels)), None)])
    info = ShardInfo(name=path.name, samples=1, sha256=file_sha256(path))
    manifest = Manifest(resolution=4, channels=3, shards=(info,), fingerprint="0" * 64)
    data = DataConfig(path=str(tmp_path), resolution=4, channels=3, lanes=1)
    (batch,) = read(data, manifest, 1, lane_batch=1)
    assert np.array_equal(batch.images[0].numpy(), pixels.transpose(2, 0, 1))
