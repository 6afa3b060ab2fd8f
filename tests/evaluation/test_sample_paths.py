"""Paths of a bridge's checkpoint: what the files hold, and that their weights are right.

The controls are those of networks whose output is 0, the guide to the end alone: exact for a
Brownian motion, and for any other process a proposal that only the weights make right. sigma is
0.7 wherever a process has one.
"""

import json
import math
import runpy
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from scipy.stats import ncx2, norm

from cdm_ray.bridges import bridge_of, control_of
from cdm_ray.config import BridgeConfig, build_config
from cdm_ray.errors import ConfigError, RunFailed
from cdm_ray.evaluation.bridge_evaluation import truth_of
from cdm_ray.evaluation.sample_images import SETTINGS_NAME
from cdm_ray.evaluation.sample_paths import CHUNK, paths_file, print_plan, sample_paths
from cdm_ray.storage import path_of
from tests.checkpoints import make_checkpoint

SIGMA = 0.7
JOBS = Path(__file__).parents[2] / "jobs"


def config(kind="brownian", *, start=(1.0,), end=(-0.4,), network=None, eval=None, **process):
    process = {"kind": kind} | ({} if kind == "cir" else {"sigma": SIGMA}) | process
    return build_config(
        BridgeConfig,
        {
            "process": process,
            "bridge": {"start": start, "end": end, "duration": 0.8},
            "network": {"width": 4, "depth": 1, "drift_coefficient": 0.0} | (network or {}),
            "eval": {"paths": 300, "steps": 40} | (eval or {}),
        },
    )


def checkpoint_of(config, folder, output=0.0):
    control = control_of(config, bridge_of(config))
    for parameter in control.network.out.parameters():
        parameter.data.fill_(output)
    return make_checkpoint(folder / "run", config, control.state_dict())


def test_the_file_has_all_paths_in_order_with_their_times(tmp_path):
    paths = CHUNK + 40
    asked = config("ou", start=(1.0, -2.0, 0.0), end=(-0.4, 1.0, 0.5), eval={"paths": paths})
    checkpoint = checkpoint_of(asked, tmp_path)
    samples = sample_paths(asked, checkpoint)
    assert samples.file.parent.parent == checkpoint.run_folder / "samples"
    assert samples.file.parent.name.startswith("step-00000007-")
    with np.load(samples.file) as file:
        assert sorted(file) == ["log_weights", "states", "times"]
        states, times, log_weights = file["states"], file["times"], file["log_weights"]
    assert (states.shape, states.dtype) == ((paths, 41, 3), np.float32)
    np.testing.assert_allclose(times, 0.02 * np.arange(41), rtol=1e-15)
    assert (log_weights.shape, log_weights.dtype) == ((paths,), np.float64)
    assert (states[:, 0] == np.float32((1.0, -2.0, 0.0))).all()
    assert np.abs(states[:, -1] - (-0.4, 1.0, 0.5)).max() < 1e-6  # the guide's last step
    assert len(np.unique(states[:, 20], axis=0)) == paths  # chunks have noise of their own


def test_weights_of_an_exact_control_are_the_density_of_the_end(tmp_path):
    asked = config()
    samples = sample_paths(asked, checkpoint_of(asked, tmp_path))
    exact = norm.logpdf(-0.4, 1.0, SIGMA * math.sqrt(0.8))
    with np.load(samples.file) as file:
        np.testing.assert_allclose(file["log_weights"], exact, atol=1e-4)  # drifts are float32
    assert samples.weights.ess == pytest.approx(1, abs=1e-6)


def test_weighted_averages_are_those_of_the_bridge(tmp_path):
    asked = config("ou", end=(0.8,), rate=3.0, eval={"paths": 2000, "steps": 160})
    samples = sample_paths(asked, checkpoint_of(asked, tmp_path))
    bridge = bridge_of(asked)
    truth = truth_of(asked, bridge, tmp_path)
    log_p = truth.log_density(bridge.start[None], 0.0).item()
    found = samples.weights.log_p
    # Errors, and the Euler chain's own p(end | start), which differs in the first order of dt.
    assert abs(found.mean - log_p) < 4 * found.error + 0.02
    with np.load(samples.file) as file:
        middle, weights = file["states"][:, 80, 0], np.exp(file["log_weights"])
    # X is Gaussian with the covariance sigma^2 / (2 rate) e^-rate|s-t| about e^-rate t around 0.
    half, full = math.exp(-3 * 0.4), math.exp(-3 * 0.8)
    exact = half + half * (1 - half**2) / (1 - full**2) * (0.8 - full)
    mean = (weights * middle).sum() / weights.sum()
    error = np.sqrt((weights**2 * (middle - mean) ** 2).sum()) / weights.sum()
    assert abs(mean - exact) < 4 * error + 0.005
    plain_error = middle.std() / math.sqrt(len(middle))
    assert abs(middle.mean() - exact) > 20 * plain_error  # without weights


def test_paths_of_a_square_root_process_are_those_of_its_own_states(tmp_path):
    cir = {"rate": 1.0, "mean": [2.0], "volatility": 0.8}
    asked = config("cir", start=(1.0,), end=(2.5,), **cir, eval={"paths": 1000, "steps": 160})
    samples = sample_paths(asked, checkpoint_of(asked, tmp_path))
    with np.load(samples.file) as file:
        states = file["states"]
    assert (states > 0).all()
    np.testing.assert_allclose(states[:, 0], 1.0, rtol=1e-6)
    np.testing.assert_allclose(states[:, -1], 2.5, rtol=1e-5)
    c = 2 / ((1 - math.exp(-0.8)) * 0.8**2)
    exact = math.log(2 * c) + ncx2.logpdf(2 * c * 2.5, 4 * 2 / 0.8**2, 2 * c * math.exp(-0.8))
    found = samples.weights.log_p
    assert abs(found.mean - exact) < 4 * found.error + 0.01


def test_the_same_command_writes_the_same_bytes_and_more_paths_begin_with_them(tmp_path):
    asked = config("ou", eval={"paths": CHUNK + 40})
    checkpoint = checkpoint_of(asked, tmp_path)
    first = sample_paths(asked, checkpoint)
    content = first.file.read_bytes()
    assert sample_paths(asked, checkpoint).file == first.file
    assert first.file.read_bytes() == content
    more = sample_paths(config("ou", eval={"paths": 2 * CHUNK + 1}), checkpoint)
    with np.load(first.file) as few, np.load(more.file) as many:
        for name in ("states", "log_weights"):
            assert len(many[name]) == 2 * CHUNK + 1
            assert (few[name] == many[name][: CHUNK + 40]).all()
    other = sample_paths(config("ou", eval={"seed": 1}), checkpoint)
    with np.load(first.file) as few, np.load(other.file) as many:
        assert not np.isin(few["log_weights"], many["log_weights"]).any()


def test_a_table_holds_what_the_arrays_do(tmp_path):
    settings, paths = {"start": (1.0, -2.0), "end": (-0.4, 1.0)}, CHUNK + 40
    asked = config("ou", **settings, eval={"paths": paths})
    checkpoint = checkpoint_of(asked, tmp_path)
    arrays = np.load(sample_paths(asked, checkpoint).file)
    as_table = config("ou", **settings, eval={"paths": paths, "format": "parquet"})
    samples = sample_paths(as_table, checkpoint)
    content = samples.file.read_bytes()
    table = pyarrow.parquet.read_table(samples.file)
    assert table.column_names == ["path", "step", "time", "x0", "x1", "log_weight"]
    rows = {name: table[name].to_numpy() for name in table.column_names}
    assert (rows["path"] == np.repeat(np.arange(paths), 41)).all()
    assert (rows["step"] == np.tile(np.arange(41), paths)).all()
    assert (rows["time"] == arrays["times"][rows["step"]]).all()
    for axis in (0, 1):
        assert (rows[f"x{axis}"] == arrays["states"][rows["path"], rows["step"], axis]).all()
    assert (rows["log_weight"] == arrays["log_weights"][rows["path"]]).all()
    sample_paths(as_table, checkpoint)
    assert samples.file.read_bytes() == content


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_memory_does_not_grow_with_the_number_of_paths(tmp_path, kind):
    peaks = []
    for paths in (CHUNK, 4 * CHUNK):
        asked = config(eval={"paths": paths, "steps": 60, "format": kind})
        checkpoint = checkpoint_of(asked, tmp_path / str(paths))
        sample_paths(config(eval={"paths": 2, "steps": 3, "format": kind}), checkpoint)  # imports
        tracemalloc.start()
        file = sample_paths(asked, checkpoint).file
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert file.stat().st_size > 4 * 4 * CHUNK * 60
    # Of torch's memory nothing is seen here, but the arrays and bytes on their way into the file.
    assert peaks[1] < 1.3 * peaks[0]


def test_a_path_that_diverges_leaves_no_file(tmp_path):
    asked = config("ou")
    checkpoint = checkpoint_of(asked, tmp_path, output=1e38)
    with pytest.raises(RunFailed, match=r"paths from 0, eval.seed=0: a path left .* at step \d"):
        sample_paths(asked, checkpoint)
    (folder,) = (checkpoint.run_folder / "samples").iterdir()
    assert [path.name for path in folder.iterdir()] == [SETTINGS_NAME]


def test_a_call_that_is_stopped_leaves_the_file_of_the_one_before(tmp_path, monkeypatch):
    asked = config("ou")
    checkpoint = checkpoint_of(asked, tmp_path)
    file = sample_paths(asked, checkpoint).file
    content = file.read_bytes()

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("cdm_ray.evaluation.sample_paths.check_paths", stopped)
    with pytest.raises(KeyboardInterrupt):
        sample_paths(asked, checkpoint)
    assert file.read_bytes() == content
    assert sorted(path.name for path in file.parent.iterdir()) == ["paths.npz", SETTINGS_NAME]


def test_a_folder_stands_for_all_that_determines_the_paths(tmp_path):
    checkpoint = checkpoint_of(config(), tmp_path)
    file = sample_paths(config(), checkpoint).file
    for other in ({"seed": 1}, {"steps": 41}, {"paths": 301}):
        assert paths_file(config(eval=other), checkpoint).parent != file.parent
    assert paths_file(config(), checkpoint_of(config(), tmp_path / "b", 1.0)).parent.name != (
        file.parent.name
    )
    same = paths_file(config(eval={"course_paths": 9, "format": "parquet"}), checkpoint)
    assert same == file.with_suffix(".parquet")
    settings = json.loads(file.with_name(SETTINGS_NAME).read_text())
    assert settings["eval"] == {"paths": 300, "steps": 40, "seed": 0}
    assert settings["process"]["sigma"] == SIGMA


def test_a_table_without_pyarrow_is_refused_before_anything_is_simulated(tmp_path, monkeypatch):
    asked = config(eval={"format": "parquet"})
    checkpoint = checkpoint_of(asked, tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="needs pyarrow .*; install it, or use eval.format=npz"):
        sample_paths(asked, checkpoint)


def test_the_job_tells_plan_file_and_weights(tmp_path, capsys):
    asked = config()
    checkpoint = checkpoint_of(asked, tmp_path)
    job = runpy.run_path(str(JOBS / "sample.py"))
    job["paths"](asked, checkpoint, True)
    told = capsys.readouterr().out
    file = paths_file(asked, checkpoint)
    assert f"file        {file}\n" in told
    assert "300 with 40 steps" in told
    assert not file.exists()
    job["paths"](asked, checkpoint, False)
    told = capsys.readouterr().out
    assert f"file   {file} (300 paths)" in told
    assert "ESS    1.000 of the paths" in told
    exact = norm.logpdf(-0.4, 1.0, SIGMA * math.sqrt(0.8))
    assert f"log p  {exact:.5g} ±" in told


def test_the_plan_refuses_weights_that_do_not_fit(tmp_path):
    checkpoint = checkpoint_of(config(), tmp_path)
    with pytest.raises(ConfigError, match="2 layers of 4 units"):
        print_plan(config(network={"depth": 2}), checkpoint)


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_paths_of_a_checkpoint_at_a_url_lie_beside_it(memory, tmp_path, form):
    asked = config(eval={"format": form})
    near = sample_paths(asked, checkpoint_of(asked, tmp_path)).file
    far = sample_paths(asked, checkpoint_of(asked, path_of(memory))).file
    assert str(far.parents[2]) == f"{memory}/run"
    assert far.read_bytes() == near.read_bytes()
    assert {path.name for path in far.parent.iterdir()} == {far.name, SETTINGS_NAME}
