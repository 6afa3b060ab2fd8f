"""The command line of the sweeps, and the sweeps that come with it; nothing is started."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from cdm_ray.config import ImageConfig, load_config, load_sweep
from cdm_ray.sweep.metrics import check_metric
from cdm_ray.sweep.record import best_recipe
from cdm_ray.sweep.run import sweep_folder
from cdm_ray.sweep.summary import TrialResult, summarise

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SWEEPS = ROOT / "sweeps"


@pytest.fixture
def sweep(monkeypatch, capsys, tmp_path):
    """Runs a command line of a sweep; returns the exit code and what was printed."""
    monkeypatch.chdir(tmp_path)

    def call(command):
        python, script, *arguments = shlex.split(command)
        assert python == "python"
        monkeypatch.setattr("sys.argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        told = capsys.readouterr()
        return ended.value.code, told.out + told.err

    return call


@pytest.mark.parametrize(
    "command", re.findall(r"^python sweeps/.*$", README, re.MULTILINE), ids=shlex.split
)
def test_the_commands_of_the_readme(command, sweep, tmp_path):
    code, told = sweep(command)
    assert code == 0
    assert ("sweep.trials = 8" in told) if "--help" in command else ("each trial" in told)
    assert not list(tmp_path.iterdir())  # nothing was started


@pytest.mark.parametrize("name", [file.stem for file in SWEEPS.glob("*.yaml")])
def test_every_sweep_that_comes_along_can_be_planned(name, sweep):
    job = load_sweep(name, SWEEPS).job
    script = {"images": "tune_cp_weight", "bridges": "tune_bridge"}[job]
    assert sweep(f"python sweeps/{script}.py {name} --dry-run")[0] == 0


def test_the_sweep_of_the_readme_is_one(tmp_path):
    written = re.search(r"```yaml\n(recipe:.*?)```", README, re.DOTALL)[1]
    (tmp_path / "mine.yaml").write_text(written)
    mine = load_sweep(str(tmp_path / "mine.yaml"), tmp_path)
    check_metric(mine)
    assert (mine.search, mine.top, mine.repeats) == ("optuna", 3, 4)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            "cp-weigt-digits",
            "error: unknown sweep 'cp-weigt-digits'; did you mean cp-weight-digits?",
        ),
        ("sweep.metric=fd_digit_ode", "not a metric of these trials; did you mean fd_digits_ode?"),
        ("sweep.metric=kl_from_truth", "error: metric=kl_from_truth: not a metric of these"),
        ("sweep.axes.cp.weight={choice: [-1]}", "error: axes.cp.weight=-1: "),
    ],
)
def test_a_mistake_is_answered_in_one_line(words, answer, sweep):
    code, told = sweep(f"python sweeps/tune_cp_weight.py '{words}'")
    assert code == 2
    assert answer in told
    assert len(told.strip().splitlines()) == 1


def test_a_bridge_without_a_truth_cannot_be_judged_by_it(sweep):
    words = "sweep.metric=kl_from_truth eval.grid=null"
    code, told = sweep(f"python sweeps/tune_bridge.py {words}")
    assert code == 2
    assert "known: cost, endpoint_error, ess, log_p, log_p_bound" in told


def test_the_same_sweep_has_the_same_folder_whatever_its_file_is_called(tmp_path):
    first = load_sweep("cp-weight-digits", SWEEPS)
    copy = tmp_path / "copy.yaml"
    copy.write_text((SWEEPS / "cp-weight-digits.yaml").read_text())
    digest = sweep_folder(first).name.removeprefix("cp-weight-digits")
    assert sweep_folder(load_sweep(str(copy), tmp_path)).name == f"copy{digest}"
    other = load_sweep("cp-weight-digits", SWEEPS, ["sweep.trials=9"])
    assert not sweep_folder(other).name.endswith(digest)


def test_the_best_setting_is_a_recipe_with_its_schedule(tmp_path):
    sweep = load_sweep("cp-weight-digits", SWEEPS)
    schedule = [{"after": 1024, "set": {"cp.weight": 3.0}}]
    setting = {"cp.weight": 1.0, "schedule": schedule}
    trial = TrialResult(setting, 0, "finished", 1.0, {}, 10, 1.0, 2.0, "run")
    summary = summarise([trial], metric="fd_digits_ode", mode="min", baseline={"cp.weight": 0})
    (tmp_path / "best.yaml").write_text(best_recipe(sweep, summary, summary.rows[0]))
    best = load_config(ImageConfig, str(tmp_path / "best.yaml"))
    assert (best.cp.weight, best.at(0).cp.weight, best.at(best.steps - 1).cp.weight) == (1, 1, 3)
    assert best.train.images == sweep.base.train.images
