"""What is shown while a sweep runs."""

import io
import pickle
from types import SimpleNamespace

import pytest
from rich.console import Console

from cdm_ray.sweep import live
from cdm_ray.sweep.live import LiveTable
from cdm_ray.sweep.trials import GIVEN, RUNG


def trial(lr, status="RUNNING", rung=0, kl=None):
    last = {} if kl is None else {RUNG: rung, "kl": kl}
    return SimpleNamespace(
        config={GIVEN: ({"optimizer.lr": lr}, 0)},
        status=status,
        last_result=last,
        is_finished=lambda: status in ("TERMINATED", "ERROR"),
    )


@pytest.fixture
def trials():
    return [
        trial(0.1, "TERMINATED", 3, 0.5),
        trial(0.2, "TERMINATED", 1, 0.2),  # pruned: its number is of a shorter run
        trial(0.3, "TERMINATED", 3, float("nan")),
        trial(0.4, "TERMINATED", 3, 0.4),
        trial(0.5, "RUNNING", 2, 0.1),
    ]


def told(table, trials, capsys):
    table.setup(total_num_samples=8)
    table.on_trial_result(1, trials, trials[-1], {RUNG: 2, "kl": 0.1})
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize(("mode", "best"), [("min", "0.4: optimizer.lr=0.4"), ("max", "0.5: ")])
def test_a_line_tells_how_far_it_is_and_the_best_whole_trial(mode, best, trials, capsys):
    line = told(LiveTable("kl", mode, 3), trials, capsys)
    assert line.startswith(f"[4/8 trials, best so far {best}")
    assert line.endswith("optimizer.lr=0.5 (seed 0): rung 2/3, kl 0.1")


def test_a_failure_is_told_as_one(trials, capsys):
    table = LiveTable("kl", "min", 3)
    table.setup(total_num_samples=8)
    table.on_trial_result(1, trials, trials[2], {RUNG: 3, "kl": float("nan")})
    trials[1].is_finished = lambda: False  # not yet
    table.on_trial_complete(1, trials, trials[1])
    first, second = capsys.readouterr().out.splitlines()
    assert second.startswith("[4/8 trials")
    assert first.endswith("optimizer.lr=0.3 (seed 0): failed")
    assert second.endswith("optimizer.lr=0.2 (seed 0): pruned at rung 1/3")


def test_on_a_terminal_there_is_a_table_with_running_trials_first(trials, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(live, "Console", lambda: console)
    monkeypatch.setattr(live, "MOST_ROWS", 3)
    table = LiveTable("kl", "min", 3)
    table.setup(total_num_samples=8)
    table.on_trial_start(1, trials, trials[-1])
    pickle.dumps(table)  # as Tune does to keep its state
    table.on_experiment_end(trials)
    shown = screen.getvalue()
    rows = [line for line in shown.splitlines() if "optimizer.lr=0." in line and "│" in line]
    assert [row.split()[1] for row in rows[:3]] == [f"optimizer.lr={lr}" for lr in (0.5, 0.2, 0.4)]
    assert "and 2 more" in shown
    assert "best so far 0.4" in shown
