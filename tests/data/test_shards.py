"""Shards are WebDataset tars with reproducible bytes, read back only when they are whole."""

from __future__ import annotations

import hashlib
import tarfile

import numpy as np
import pytest
import webdataset
from data_sets import pixels_of, png_of, write_data_set

from cdm_ray.data.manifest import ShardInfo
from cdm_ray.data.shards import DataError, PackedSample, Shard, write_shard


def load(folder, manifest, number=0):
    info = manifest.shards[number]
    return Shard((folder / info.name).read_bytes(), info, manifest)


def test_a_shard_gives_back_what_was_written(tmp_path):
    manifest = write_data_set(tmp_path, [3, 20])
    shard = load(tmp_path, manifest, 1)
    assert shard.keys == [f"{i:08d}" for i in range(3, 23)]
    out = np.empty((1, 4, 4), np.uint8)
    for index in (5, 0, 19):
        assert shard.read_into(index, out) == (index + 3) % 10
        assert np.array_equal(out[0], pixels_of(index + 3))


def test_plain_webdataset_reads_our_shards(tmp_path):
    manifest = write_data_set(tmp_path, [12])
    url = str(tmp_path / manifest.shards[0].name)
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode("l8"))
    assert [sample["__key__"] for sample in samples] == [f"{i:08d}" for i in range(12)]
    for i, sample in enumerate(samples):
        assert sample["cls"] == i % 10
        assert np.array_equal(sample["png"], pixels_of(i))


def test_the_bytes_depend_on_the_samples_alone(tmp_path, monkeypatch):
    samples = [PackedSample(f"{i:08d}", png_of(i), i) for i in range(5)]
    write_shard(tmp_path / "a.tar", samples)
    monkeypatch.setattr("time.time", lambda: 1e9)
    write_shard(tmp_path / "b.tar", samples)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
            assert (member.uname, member.gname) == ("", "")


def describe(content: bytes, samples: int) -> ShardInfo:
    """A manifest entry that vouches for the content: only its structure can be wrong."""
    digest = hashlib.sha256(content).hexdigest()
    return ShardInfo(name="shard-000000.tar", samples=samples, sha256=digest)


def test_a_shard_with_another_number_of_images_is_refused(tmp_path):
    manifest = write_data_set(tmp_path, [3])
    content = (tmp_path / "shard-000000.tar").read_bytes()
    with pytest.raises(DataError, match=r"shard-000000\.tar holds 3 images, the manifest says 4"):
        Shard(content, describe(content, 4), manifest)


@pytest.mark.parametrize("kind", ["text", "link", "cut in a member", "negative size", "not utf-8"])
def test_what_is_no_plain_tar_is_refused_with_the_name_of_the_shard(tmp_path, kind):
    manifest = write_data_set(tmp_path, [3])
    content = bytearray((tmp_path / "shard-000000.tar").read_bytes())
    if kind == "text":
        content = bytearray(b"<html>not found</html>" * 100)
    elif kind == "link":
        content[156:157] = b"2"
    elif kind == "cut in a member":
        content = content[: 3 * 512 + 40]
    elif kind == "negative size":
        content[124:136] = b"-0000001000\0"  # -512: a parser that believes it never ends
    else:
        content[0:2] = b"\xff\xfe"
    raw = bytes(content)
    with pytest.raises(DataError, match=r"shard-000000\.tar cannot be read"):
        Shard(raw, describe(raw, 3), manifest)
