"""CIFAR-10's archive is read to the last pixel; a hostile one is refused and nothing of it runs."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import webdataset
from data_sets import cifar10_batch, cifar10_batches, serial_map, write_cifar10, write_tar
from PIL import Image

from cdm_ray.config import DataConfig
from cdm_ray.data.prepare import prepare
from cdm_ray.data.sources import find_images, open_source
from cdm_ray.errors import ConfigError

FOLDER = "cifar-10-batches-py"


def refuse(path, message):
    with pytest.raises(ConfigError, match=message) as caught:
        find_images(str(path))
    assert "\n" not in str(caught.value)


def write_files(folder, **changes):
    """An unpacked archive of which some files are other bytes, or missing if None."""
    folder.mkdir()
    for name, content in (cifar10_batches(2)[0] | changes).items():
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


def assert_holds(source, pixels, labels):
    assert [image.label for image in source.images] == labels
    assert len({image.name for image in source.images}) == len(labels)
    assert [image.name for image in source.images] == sorted(i.name for i in source.images)
    with open_source(source.kind, source.location) as read:
        for image, expected in zip(source.images, pixels, strict=True):
            found = np.asarray(Image.open(io.BytesIO(read(image.name))))
            assert np.array_equal(found, expected)


def test_the_look_alike_is_a_pickle_of_python_2():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    loaded = pickle.loads(cifar10_batch(pixels, [3, 1, 9]), encoding="bytes")
    assert np.array_equal(loaded[b"data"], pixels)
    assert loaded[b"labels"] == [3, 1, 9]
    assert loaded[b"filenames"][2] == b"some_2.png"


def test_the_archive_gives_its_training_images_in_order_with_their_classes(tmp_path):
    pixels, labels = write_cifar10(tmp_path / "cifar-10-python.tar.gz", rows=3)
    source = find_images(str(tmp_path / "cifar-10-python.tar.gz"))
    assert (len(source.images), source.num_classes, source.other_files) == (15, 10, 0)
    assert (source.class_names[0], source.class_names[9]) == ("airplane", "truck")
    assert_holds(source, pixels, labels)


def test_the_unpacked_folder_gives_the_same(tmp_path):
    write_files(tmp_path / FOLDER)
    _, pixels, labels = cifar10_batches(2)
    assert_holds(find_images(str(tmp_path / FOLDER)), pixels, labels)


def test_a_plain_tar_gives_the_same(tmp_path):
    files, pixels, labels = cifar10_batches(2)
    assert_holds(find_images(str(write_tar(tmp_path / "c.tar", files, "w"))), pixels, labels)


def test_batches_pickled_again_by_python_3_are_read(tmp_path):
    """numpy 2 writes other module names, text keys, and bytes through `_codecs.encode`."""
    _, pixels, labels = cifar10_batches(2)
    planar = pixels.transpose(0, 3, 1, 2).reshape(5, 2, -1)
    files = {
        f"data_batch_{i + 1}": pickle.dumps(
            {"data": planar[i], "labels": labels[2 * i : 2 * i + 2]}, protocol=2
        )
        for i in range(5)
    }
    assert b"_codecs" in files["data_batch_1"]
    assert_holds(find_images(str(write_tar(tmp_path / "c.tgz", files))), pixels, labels)


def test_packing_keeps_every_pixel_and_label(tmp_path):
    pixels, labels = write_cifar10(tmp_path / "c.tar.gz", rows=4)
    config = DataConfig(
        path=str(tmp_path / "d"), source=str(tmp_path / "c.tar.gz"), samples_per_shard=8
    )
    manifest = prepare(config, serial_map)
    assert (manifest.num_samples, manifest.num_classes, manifest.resolution) == (20, 10, 32)
    urls = [str(tmp_path / "d" / shard.name) for shard in manifest.shards]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert sorted(int(sample["__key__"]) for sample in found) == list(range(20))
    for sample in found:
        index = int(sample["__key__"])
        assert sample["cls"] == labels[index]
        assert np.array_equal(sample["png"], pixels[index])


def test_another_archive_under_the_same_name_is_read_anew(tmp_path):
    path = tmp_path / "c.tar.gz"
    for seed in (0, 1):
        pixels, labels = write_cifar10(path, rows=2 + seed, seed=seed)
        assert_holds(find_images(str(path)), pixels, labels)


class Exploding:
    """What an attacker would pickle: a command that the ordinary unpickler runs."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["the batch", "data", "labels", "a label", "a key"])
def test_a_command_in_a_pickle_is_refused_by_name_and_does_not_run(tmp_path, place, protocol):
    bomb = Exploding(os.system, f"touch {tmp_path}/exploded")
    batch = {
        "the batch": bomb,
        "data": {"data": bomb, "labels": [1]},
        "labels": {"labels": bomb},
        "a label": {"labels": [1, bomb]},
        "a key": {bomb: 1},
    }[place]
    files = write_files(tmp_path / FOLDER, data_batch_3=pickle.dumps(batch, protocol))
    refuse(files, r"data_batch_3 asks for '(posix|nt)\.system'.*nothing of it was run")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        (b"c__builtin__\nexec\n(S'1'\ntR.", "__builtin__.exec"),
        (b"(S'touch exploded'\nios\nsystem\n.", "os.system"),
        (b"cnumpy.core.multiarray\nfromfile\n.", "numpy.core.multiarray.fromfile"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile2\x93.", "numpy.ndarray.tofile2"),
        (b"cnumpy\nload\n.", "numpy.load"),
        (b"c_codecs\ndecode\n.", "_codecs.decode"),
        (b"cbad\x1b[2J\nname\n.", "bad\\x1b[2J.name"),
    ],
)
def test_every_name_but_those_of_a_batch_is_refused(tmp_path, content, named):
    with pytest.raises(ConfigError) as caught:
        find_images(str(write_files(tmp_path / FOLDER, data_batch_1=content)))
    assert f"data_batch_1 asks for '{named}'" in str(caught.value)


def reduced(array) -> bytes:
    return pickle.dumps({"data": array, "labels": [1]}, protocol=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (reduced(np.zeros((1, 3072), np.int64)), "the type 'i8', not uint8"),
        (reduced(np.array([[None] * 3072])), "the type 'O8', not uint8"),
        (reduced(np.zeros((3072, 1), np.uint8)), r"the shape \(3072, 1\)"),
        (reduced(np.zeros((1, 3071), np.uint8)), "no pickled batch"),
        (reduced(np.zeros((3072, 2), np.uint8).T), "no pickled batch: its array is not of uint8"),
        (reduced(7), "'data', a uint8 array"),
        (reduced(np.zeros((2, 3072), np.uint8)), "a list of N class numbers"),
        (cifar10_batch(np.zeros((1, 3072)), [10]), "a label that is no class number"),
        (pickle.dumps([1, 2]), "'data', a uint8 array"),
        (b"\x80\x02K\x01Q.", "no pickled batch"),
        (b"<html>", "no pickled batch"),
        (b"", "no pickled batch"),
        (cifar10_batch(np.zeros((2, 3072)), [1, 2])[:-2000], "no pickled batch"),
        (None, "holds no data_batch_4"),
    ],
    ids=[
        "int64", "objects", "shape", "width", "fortran", "no array", "lengths", "class", "list",
 "persistent", "html", "empty", "cut", "missing",
    ],
)  # fmt: skip
def test_what_is_no_batch_is_refused(tmp_path, content, message):
    refuse(write_files(tmp_path / FOLDER, data_batch_4=content), message)


@pytest.mark.parametrize(
    "name", ["numpy.core.multiarray\n_reconstruct", "numpy\ndtype", "_codecs\nencode"]
)
def test_a_pickle_cannot_change_what_later_ones_are_read_with(tmp_path, name):
    attribute = b"X\x0c\x00\x00\x00__setstate__"
    patch = b"\x80\x02c" + name.encode() + b"\nN}" + attribute + b"K\x01s\x86b."
    refuse(write_files(tmp_path / FOLDER, data_batch_1=patch), "no pickled batch")
    pixels, labels = write_cifar10(tmp_path / "c.tar.gz")
    assert_holds(find_images(str(tmp_path / "c.tar.gz")), pixels, labels)


@pytest.mark.parametrize("name", ["/etc/data_batch_1", "../data_batch_2", "x/../../test_batch"])
def test_a_tar_with_names_that_point_outside_is_refused(tmp_path, name):
    files = cifar10_batches(1)[0] | {name: b"evil"}
    path = write_tar(tmp_path / "c.tar.gz", files)
    before = sorted(tmp_path.rglob("*"))
    refuse(path, f"unsafe name '{name}'")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_in_the_place_of_a_batch_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(cifar10_batch(np.zeros((1, 3072)), [1]))
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        info = tarfile.TarInfo("data_batch_1")
        info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        archive.addfile(info)
    refuse(tmp_path / "c.tar", "'data_batch_1' is no plain file")


def test_a_batch_that_is_there_twice_is_refused(tmp_path):
    files, _, _ = cifar10_batches(1)
    files["elsewhere/data_batch_2"] = files["data_batch_2"]
    refuse(write_tar(tmp_path / "c.tar.gz", files), "data_batch_2 more than once")


def test_sizes_that_no_batch_has_are_refused_before_reading(tmp_path):
    info = tarfile.TarInfo("data_batch_1")
    info.size = 2**40
    (tmp_path / "c.tar").write_bytes(info.tobuf() + bytes(1024))
    refuse(tmp_path / "c.tar", "1099511627776 bytes, more than a batch")
    write_files(tmp_path / FOLDER)
    os.truncate(tmp_path / FOLDER / "data_batch_5", 2**27)  # sparse: takes no room
    refuse(tmp_path / FOLDER, "data_batch_5 has 134217728 bytes")


def test_an_archive_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("cdm_ray.data.cifar10._LARGEST_ARCHIVE", 2**20)
    with gzip.open(tmp_path / "c.tar.gz", "wb") as file:
        for _ in range(64):
            file.write(bytes(2**16))
    refuse(tmp_path / "c.tar.gz", "unpacks to more than 1048576 bytes")


def test_an_archive_that_is_damaged_or_another_is_refused(tmp_path):
    write_cifar10(tmp_path / "c.tar.gz", rows=2)
    content = (tmp_path / "c.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(content[:-100])
    refuse(tmp_path / "cut.tar.gz", "the archive cannot be read")
    middle = len(content) // 2
    (tmp_path / "bad.tar.gz").write_bytes(content[:middle] + bytes(99) + content[middle + 99 :])
    refuse(tmp_path / "bad.tar.gz", "the archive cannot be read")
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"hello"))
    refuse(tmp_path / "text.gz", "the archive cannot be read")
    write_tar(tmp_path / "photos.tar", {"cat/1.png": b"", "dog/2.png": b""}, "w")
    refuse(tmp_path / "photos.tar", "of other archives give the unpacked folder")
