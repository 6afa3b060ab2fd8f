"""Packing is byte-identical when repeated, survives interruption, and refuses what would differ."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data_sets import image_bytes, save_image, serial_map
from PIL import Image
from sklearn.datasets import load_digits

from cdm_ray.config import DataConfig
from cdm_ray.data.manifest import Manifest
from cdm_ray.data.prepare import ensure_prepared, plan_packing, prepare
from cdm_ray.errors import ConfigError


def digits(folder: Path, **changes) -> DataConfig:
    values = {"resolution": 8, "channels": 1, "samples_per_shard": 500, "source": "digits"}
    return DataConfig(path=str(folder), **(values | changes))


def content(folder: Path) -> dict[str, bytes]:
    """Bytes of what was published."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}


def samples(folder: Path) -> list[dict]:
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    return list(webdataset.WebDataset(urls, shardshuffle=False).decode("l8"))


def photos(folder: Path, count=12) -> Path:
    """A source of one-colour images in two classes."""
    for i in range(count):
        save_image(folder / "source" / "ab"[i % 2] / f"{i:02d}.png", color=(i, 20, 30))
    return folder / "source"


def photo_config(folder: Path, source: Path, **changes) -> DataConfig:
    values = {"resolution": 4, "channels": 3, "samples_per_shard": 5, "source": str(source)}
    return DataConfig(path=str(folder), **(values | changes))


def test_digits_are_packed_whole_with_their_pixels_and_labels(tmp_path):
    manifest = prepare(digits(tmp_path / "d"), serial_map)
    assert [shard.samples for shard in manifest.shards] == [500, 500, 500, 297]
    assert (manifest.resolution, manifest.channels, manifest.num_classes) == (8, 1, 10)
    for shard in manifest.shards:
        assert hashlib.sha256((tmp_path / "d" / shard.name).read_bytes()).hexdigest() == (
            shard.sha256
        )
    bunch = load_digits()
    found = samples(tmp_path / "d")
    assert sorted(int(s["__key__"]) for s in found) == list(range(1797))
    for sample in found:
        index = int(sample["__key__"])
        assert sample["cls"] == bunch.target[index]
        assert np.abs(sample["png"] - bunch.images[index] * 255 / 16).max() <= 0.5


def test_packing_twice_gives_the_same_bytes(tmp_path):
    first = prepare(digits(tmp_path / "a"), serial_map)
    second = prepare(digits(tmp_path / "b"), serial_map)
    assert first == second
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_the_fingerprint_depends_on_the_content_and_not_on_the_shards(tmp_path):
    source = photos(tmp_path)
    names = iter("abcdef")

    def fingerprint(**changes):
        return prepare(photo_config(tmp_path / next(names), source, **changes), serial_map)

    first = fingerprint()
    assert fingerprint(samples_per_shard=4).fingerprint == first.fingerprint
    assert fingerprint(resolution=5).fingerprint != first.fingerprint
    (source / "b/01.png").rename(source / "a/zz.png")  # another label; the order is the same
    assert fingerprint().fingerprint != first.fingerprint


def test_shards_mix_the_classes_of_a_sorted_source(tmp_path):
    for i in range(200):
        save_image(tmp_path / "source" / "ab"[i >= 100] / f"{i:03d}.png", size=(4, 4))
    prepare(photo_config(tmp_path / "d", tmp_path / "source", samples_per_shard=50), serial_map)
    for shard in sorted((tmp_path / "d").glob("*.tar")):
        found = webdataset.WebDataset(str(shard), shardshuffle=False).decode("rgb8")
        counts = Counter(sample["cls"] for sample in found)
        assert min(counts[0], counts[1]) >= 10, counts


def test_packing_again_verifies_and_rewrites_nothing(tmp_path):
    config = digits(tmp_path / "d")
    manifest = prepare(config, serial_map)
    times = written(tmp_path / "d")
    assert prepare(config, serial_map) == manifest
    assert written(tmp_path / "d") == times


def test_a_damaged_shard_is_packed_again(tmp_path):
    config = digits(tmp_path / "d")
    prepare(config, serial_map)
    before = content(tmp_path / "d")
    shard = tmp_path / "d" / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes()[:-100])
    (tmp_path / "d" / "shard-000001.tar").unlink()
    prepare(config, serial_map)
    assert content(tmp_path / "d") == before


SLOW_PACKING = """
import sys, time
from cdm_ray.config import DataConfig
from cdm_ray.data.prepare import prepare
def slow_map(function, items, _):
    out = []
    for item in items:
        out.append(function(item))
        print(item.name, flush=True)
    return out
prepare(DataConfig(path=sys.argv[1], source="digits", resolution=8, channels=1,
                   samples_per_shard=20), slow_map)
"""


def test_packing_killed_in_the_middle_is_continued_and_ends_in_the_same_bytes(tmp_path):
    prepare(digits(tmp_path / "undisturbed", samples_per_shard=20), serial_map)
    folder = tmp_path / "killed"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_PACKING, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        for _ in range(8):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert Manifest.find(str(folder)) is None
    done = written(folder)
    assert 8 <= len(done) < 90
    # what a kill in the middle of a write leaves
    (folder / ".packing" / "shard-000050.tar.0123.partial").write_bytes(b"half a shard")
    prepare(digits(folder, samples_per_shard=20), serial_map)
    assert content(folder) == content(tmp_path / "undisturbed")
    again = written(folder)
    finished = [name for name in done if (folder / ".packing" / f"{name}.json").exists()]
    assert sum(again[name] == done[name] for name in finished) >= 8
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 16}, r"data\.resolution=8, not 16"),
        ({"channels": 3}, r"data\.channels=1, not 3"),
        ({"samples_per_shard": 100}, r"data\.samples_per_shard=500, not 100"),
        ({"resolution": 4, "channels": 3}, r"resolution=8, not 4; data\.channels=1, not 3"),
    ],
)
def test_other_settings_for_the_same_folder_are_refused_by_name(
    tmp_path, finished, changes, message
):
    prepare(digits(tmp_path / "d"), serial_map)
    if not finished:
        (tmp_path / "d" / "manifest.json").unlink()
    before = content(tmp_path / "d")
    with pytest.raises(ConfigError, match=message):
        prepare(digits(tmp_path / "d", **changes), serial_map)
    assert content(tmp_path / "d") == before


def test_a_source_that_has_changed_is_refused(tmp_path):
    source = photos(tmp_path)
    config = photo_config(tmp_path / "d", source)
    prepare(config, serial_map)
    before = content(tmp_path / "d")

    def refused(message):
        with pytest.raises(ConfigError, match=message):
            prepare(config, serial_map)
        assert content(tmp_path / "d") == before

    extra = save_image(source / "a/99.png")
    refused("12 images, and data.source has 13")
    extra.unlink()
    (source / "a/00.png").rename(source / "b/00.png")
    refused("names, sizes or labels")
    (source / "b/00.png").rename(source / "a/00.png")
    original = (source / "a/00.png").read_bytes()
    other = bytearray(original)
    other[-20] ^= 1
    (source / "a/00.png").write_bytes(other)  # same name, same size
    refused(r"a/00\.png changed since")
    (source / "a/00.png").write_bytes(original)
    prepare(config, serial_map)


def test_a_moved_source_is_the_same_source(tmp_path):
    source = photos(tmp_path)
    manifest = prepare(photo_config(tmp_path / "d", source), serial_map)
    moved = source.rename(tmp_path / "elsewhere")
    assert prepare(photo_config(tmp_path / "d", moved), serial_map) == manifest


def test_a_folder_with_other_files_is_never_written_to(tmp_path):
    source = photos(tmp_path)
    for path in (source, source / "a"):
        before = sorted(path.rglob("*"))
        with pytest.raises(ConfigError, match="holds files but no packed data set"):
            prepare(photo_config(path, source), serial_map)
        assert sorted(path.rglob("*")) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        prepare(photo_config(tmp_path / "file", source), serial_map)


def test_a_data_set_packed_elsewhere_is_used_and_not_packed_over(tmp_path):
    manifest = prepare(digits(tmp_path / "a"), serial_map)
    (tmp_path / "copy").mkdir()
    for name, raw in content(tmp_path / "a").items():
        (tmp_path / "copy" / name).write_bytes(raw)
    with pytest.raises(ConfigError, match="packed elsewhere"):
        prepare(digits(tmp_path / "copy"), serial_map)
    assert ensure_prepared(digits(tmp_path / "copy"), serial_map) == manifest


def test_all_images_that_cannot_be_packed_are_named_at_once_and_nothing_is_kept(tmp_path):
    source = photos(tmp_path)
    (source / "a/02.png").write_bytes(b"not an image")
    (source / "b/07.png").write_bytes(image_bytes()[:-30])
    config = photo_config(tmp_path / "d", source)
    with pytest.raises(ConfigError, match=r"2 of 12 images cannot be packed") as error:
        prepare(config, serial_map)
    assert "a/02.png: the content is no image" in str(error.value)
    assert "b/07.png: " in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "d").iterdir())
    (source / "a/02.png").unlink()
    (source / "b/07.png").unlink()
    assert prepare(config, serial_map).num_samples == 10


def test_many_unusable_images_are_counted_and_a_few_named(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    with pytest.raises(ConfigError, match="9 of 9 images .* and 4 more; repair"):
        prepare(photo_config(tmp_path / "d", tmp_path), serial_map)


def test_two_processes_do_not_pack_into_one_folder(tmp_path):
    config = digits(tmp_path / "d")

    def map_that_packs_again(function, items, description):
        with pytest.raises(ConfigError, match="another process is packing"):
            prepare(config, serial_map)
        return serial_map(function, items, description)

    prepare(config, map_that_packs_again)


def test_a_run_packs_its_source_once(tmp_path):
    config = digits(tmp_path / "d")
    manifest = ensure_prepared(config, serial_map)
    assert ensure_prepared(config, lambda *_: pytest.fail("packed again")) == manifest
    unset = config.model_copy(update={"source": None})
    assert ensure_prepared(unset, lambda *_: pytest.fail("packed again")) == manifest


def test_planning_writes_nothing_and_says_what_would_be_packed(tmp_path):
    source = photos(tmp_path)
    (source / "notes.txt").write_text("")
    text = plan_packing(photo_config(tmp_path / "d", source)).describe()
    assert not (tmp_path / "d").exists()
    for fact in ("12, 1 other files", "2 (a, b)", "4x4 PNG, RGB", "3 shards of up to 5"):
        assert fact in text


def test_packing_needs_a_source(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.source is not set"):
        prepare(digits(tmp_path / "d", source=None), serial_map)


def test_greyscale_and_colour_are_what_was_asked_for(tmp_path):
    save_image(tmp_path / "s" / "1.png", color=(200, 100, 0))
    for channels, mode in ((1, "L"), (3, "RGB")):
        folder = tmp_path / f"d{channels}"
        prepare(photo_config(folder, tmp_path / "s", channels=channels), serial_map)
        (sample,) = webdataset.WebDataset(str(folder / "shard-000000.tar"), shardshuffle=False)
        assert "cls" not in sample
        (folder / "1.png").write_bytes(sample["png"])
        with Image.open(folder / "1.png") as image:
            assert (image.mode, image.size) == (mode, (4, 4))


def test_packing_into_a_url_is_refused():
    config = DataConfig(path="s3://b/x", resolution=8, channels=1, source="digits")
    with pytest.raises(ConfigError, match="data.path=s3://b/x: .*local folder"):
        plan_packing(config)
