"""The command that packs data: dry runs, mistakes, and a real run as Ray tasks."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from data_sets import save_image, serial_map

from cdm_ray.config import DataConfig
from cdm_ray.data.manifest import Manifest
from cdm_ray.data.prepare import prepare

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
