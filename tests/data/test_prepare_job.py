"""The command that packs data: dry runs, mistakes, and a real run as Ray tasks."""

from __future__ import annotations

import runpy
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data_sets import save_image, serial_map, write_cifar10
from PIL import Image

from cdm_ray.config import DataConfig, load_config
from cdm_ray.data.manifest import Manifest
from cdm_ray.data.prepare import PrepareConfig, prepare

JOB = Path(__file__).parents[2] / "jobs" / "prepare_data.py"


@pytest.fixture
def run_job(monkeypatch, capsys):
    """run_job(*arguments) -> (exit code, stdout, stderr), in this process; Ray must not start."""
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))

    def run(*arguments: str):
        monkeypatch.setattr(sys, "argv", [str(JOB), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(JOB), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


def test_a_dry_run_says_what_would_be_packed_and_writes_nothing(run_job, tmp_path):
    folder = tmp_path / "d"
    code, out, _ = run_job("digits", f"data.path={folder}", "--dry-run")
    assert code == 0
    assert "1797" in out
    assert "8x8 PNG, greyscale" in out
    assert not folder.exists()


def test_any_resolution_can_be_packed_without_a_recipe_that_trains_it(run_job, tmp_path):
    save_image(tmp_path / "s/1.png")
    code, out, err = run_job(
        f"data.source={tmp_path}/s", f"data.path={tmp_path}/d", "data.resolution=24",
        "data.channels=3", "--dry-run",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "24x24 PNG, RGB" in out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data.source=/nowhere", "data.source=/nowhere: no such file or folder"),
        ("data.sorce=x", "data.sorce: unknown key; did you mean data.source?"),
        ("data.path=s3://bucket/x", "data.path=s3://bucket/x"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_before_ray_starts(run_job, argument, message):
    code, _, err = run_job("digits", argument)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_ray_tasks_pack_the_same_bytes_as_one_process(tmp_path):
    for i in range(20):
        save_image(tmp_path / "source" / "ab"[i % 2] / f"{i:02d}.png", color=(i, 20, 30))
    settings = {"resolution": 4, "channels": 3, "samples_per_shard": 6}
    data = DataConfig(path=str(tmp_path / "serial"), source=str(tmp_path / "source"), **settings)
    manifest = prepare(data, serial_map)
    overrides = [f"data.{name}={value}" for name, value in settings.items()]
    done = subprocess.run(
        [sys.executable, str(JOB), "data.source=source", "data.path=parallel", *overrides],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"20 images in 4 shards, fingerprint {manifest.fingerprint[:16]}" in done.stdout
    assert "packing parallel: 100%" in done.stderr
    assert Manifest.load(str(tmp_path / "parallel")) == manifest
    for shard in manifest.shards:
        serial, parallel = (tmp_path / name / shard.name for name in ("serial", "parallel"))
        assert serial.read_bytes() == parallel.read_bytes()


def photo(path: Path, width: int, height: int) -> np.ndarray:
    """Write a noise image; the pixels that EDM's tool makes of it at 64x64 with center-crop."""
    seed = zlib.crc32(path.name.encode())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    image.save(path)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((64, 64), Image.Resampling.LANCZOS))


def write_ffhq(root: Path) -> dict[str, np.ndarray]:
    names = ("00000/00000.png", "00000/00001.png", "69000/69999.png")
    for name in names:
        save_image(root / "thumbnails128x128" / name, size=(128, 128))
    return {name: photo(root / "images1024x1024" / name, 96, 96) for name in names}


def write_afhq(root: Path) -> dict[str, np.ndarray]:
    names = ("cat/flickr_cat_1.png", "dog/flickr_dog_22.png", "wild/flickr_wild_333.png")
    for name in names:
        save_image(root / "test" / name, size=(128, 128))
    return {name: photo(root / "train" / name, 80 + 2 * i, 90) for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ("recipe", "write", "classes"),
    [("ffhq-64", write_ffhq, ()), ("afhqv2-64", write_afhq, ("cat", "dog", "wild"))],
)
def test_recipes_at_64x64_pack_look_alikes_of_their_data(run_job, tmp_path, recipe, write, classes):
    expected = write(tmp_path / "source")
    places = (f"data.source={tmp_path}/source", f"data.path={tmp_path}/packed")
    code, out, err = run_job(recipe, *places, "--dry-run")
    assert (code, err) == (0, "")
    assert "3, " in out
    assert "64x64 PNG, RGB" in out
    manifest = prepare(load_config(PrepareConfig, recipe, places).data, serial_map)
    assert (manifest.num_samples, manifest.class_names) == (3, classes)
    urls = [str(tmp_path / "packed" / shard.name) for shard in manifest.shards]
    found = {
        s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    }
    for index, name in enumerate(sorted(expected)):
        sample = found[f"{index:08d}"]
        assert np.array_equal(sample["png"], expected[name])
        assert sample.get("cls") == (index if classes else None)


def test_recipes_of_cifar10_pack_its_archive(run_job, tmp_path):
    write_cifar10(tmp_path / "cifar-10-python.tar.gz", rows=2)
    code, out, err = run_job(
        "cifar10-uncond",
        f"data.source={tmp_path}/cifar-10-python.tar.gz",
        f"data.path={tmp_path}/packed",
        "--dry-run",
    )
    assert (code, err) == (0, "")
    for part in ("10, 0 other files", "10 (airplane, automobile,", "32x32 PNG, RGB"):
        assert part in out
