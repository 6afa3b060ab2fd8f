"""Figures of a sweep: what they show, as numbers, and the same bytes each time."""

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from PIL import Image

from cdm_ray.sweep.figures import (
    cells_of,
    cost_figure,
    heat_figure,
    importance_figure,
    metric_figure,
    sweep_figures,
)
from cdm_ray.sweep.scales import bins_of, scale_of
from cdm_ray.sweep.schedules import schedule_figures
from cdm_ray.sweep.settings import value_key
from cdm_ray.sweep.summary import TrialResult, summarise


def trial(setting, seed=0, metric=1.0, status="finished", seconds=10.0):
    return TrialResult(setting, seed, status, metric, {}, 100, seconds, 2.0, "run", None)


def summary_of(trials, mode="min"):
    return summarise(trials, metric="fd", mode=mode, baseline={"cp.weight": 0})


@pytest.fixture(scope="module")
def grid():
    """Weights by steps with two seeds, a baseline of weight 0 without steps, one setting that was
    pruned, one that failed."""
    rng = np.random.default_rng(0)
    trials = [trial({"cp.weight": 0}, seed, 1.0 + 0.01 * seed, seconds=5.0) for seed in (0, 1)]
    for weight in (0.1, 1, 10):
        for steps in (1, 2):
            setting = {"cp.weight": weight, "cp.steps": steps}
            seconds = 5.0 + 4 * steps + weight
            trials += [
                trial(setting, seed, float(rng.uniform(0.5, 0.9)), seconds=seconds)
                for seed in (0, 1)
            ]
    trials.append(trial({"cp.weight": 10, "cp.steps": 1}, 2, 0.001, "pruned"))
    trials.append(trial({"cp.weight": 0.1, "cp.steps": 4}, 0, 0.002, "pruned"))
    trials.append(trial({"cp.weight": 1, "cp.steps": 4}, 0, None, "failed"))
    return summary_of(trials)


def test_the_same_results_give_the_same_bytes(grid, tmp_path):
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:
        folder.mkdir()
    first, second = (sweep_figures(grid, folder) for folder in folders)
    assert list(first) == [
        "metric_cp.weight", "metric_cp.steps", "heat_cp.weight_cp.steps", "cost", "importance",
    ]  # fmt: skip
    for name, path in first.items():
        assert path.read_bytes() == second[name].read_bytes()
        with Image.open(path) as image:
            assert min(image.size) > 150


def test_heat_maps_are_of_the_first_axes_only(tmp_path):
    trials = [trial({name: x for name in "abcde"} | {"same": 1}, metric=x) for x in (1.0, 2.0)]
    found = sweep_figures(summary_of(trials), tmp_path)
    assert [name for name in found if name.startswith("heat")] == [
        "heat_a_b", "heat_a_c", "heat_b_c",
    ]  # fmt: skip
    assert "metric_e" in found
    assert "metric_same" not in found


def test_nothing_finished_nothing_drawn(tmp_path):
    trials = [trial({"cp.weight": 0}, status="failed"), trial({"cp.weight": 1}, status="pruned")]
    assert sweep_figures(summary_of(trials), tmp_path) == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", [{"cp.weight": 0}, {}])
def test_a_single_trial_is_drawn(setting, tmp_path):
    assert "cost" in sweep_figures(summary_of([trial(setting)]), tmp_path)


# The metric along an axis


def drawn(figure):
    """(place, mean, low, high) of everything with an error bar."""
    [axes] = figure.axes
    found = []
    for container in axes.containers:
        assert isinstance(container, ErrorbarContainer)
        line, _, bars = container.lines
        [segment] = bars[0].get_segments() if bars else [np.full((2, 2), np.nan)]
        found.append((*line.get_xydata()[0], *segment[:, 1]))
    return np.array(found)


def test_means_and_intervals_are_those_of_the_rows(grid):
    found = drawn(metric_figure(grid, "cp.weight"))
    rows = [row for row in grid.rows if row.values]
    expected = [
        (i.mean, i.mean - i.half_width, i.mean + i.half_width)
        for i in (row.interval for row in rows)
    ]
    np.testing.assert_allclose(sorted(found[:, 1:].tolist()), sorted(expected), rtol=1e-12)


def test_the_baseline_of_zero_stands_left_of_a_log_scale(grid):
    figure = metric_figure(grid, "cp.weight")
    [axes] = figure.axes
    assert axes.get_xscale() == "log"
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["0", "0.1", "1", "10"]
    [baseline] = [row.mean for row in grid.rows if row.is_baseline]
    found = drawn(figure)
    place = found[found[:, 1] == baseline, 0].item()
    assert place == axes.get_xticks()[0]
    assert place < found[found[:, 1] != baseline, 0].min()


def test_settings_at_one_value_stand_beside_each_other(grid):
    places = drawn(metric_figure(grid, "cp.weight"))[:, 0]
    assert len(set(places.tolist())) == len(places)
    nearest = [min((0.1, 1, 10), key=lambda w: abs(np.log(x / w))) for x in places if x > 0.07]
    assert sorted(nearest) == [0.1, 0.1, 1, 1, 10, 10]


def test_settings_that_did_not_finish_are_marked_at_the_bad_edge(grid):
    [axes] = metric_figure(grid, "cp.steps").axes
    marks = {line.get_marker(): line for line in axes.lines if line.get_marker() in "x|"}
    places = {m: line.get_xydata()[0] for m, line in marks.items() if len(line.get_xydata()) == 1}
    assert places["x"] == pytest.approx((4, 0.97), abs=0.1)
    assert places["|"] == pytest.approx((4, 0.97), abs=0.1)


def test_results_of_all_sizes_are_shown_on_a_log_scale():
    trials = [trial({"cp.weight": w}, s, m + s) for w, m in ((0, 1.0), (1, 900.0)) for s in (0, 1)]
    figure = metric_figure(summary_of(trials), "cp.weight")
    assert figure.axes[0].get_yscale() == "log"
    assert (drawn(figure)[:, 2] > 0).all()  # the interval of 1 and 2 reaches below 0


# Scales


@pytest.mark.parametrize(
    ("values", "log", "labels"),
    [
        ([0, 0.1, 1], True, ["0", "0.1", "1"]),
        ([1, 2, 9], False, ["1", "2", "9"]),
        ([0, 1, 2], False, ["0", "1", "2"]),
        ([-1, 1, 100], False, None),
        ([0], False, ["0"]),
        ([50, 400, 1000], True, ["50", "400", "1000"]),
        (np.geomspace(0.02, 30, 12).tolist(), True, ["0.1", "1", "10"]),
        (np.geomspace(0.15, 3, 12).tolist(), True, ["0.2", "0.5", "1", "2"]),
        (["far", "near"], False, ["far", "near"]),
        ([False, True], False, ["false", "true"]),
        ([0.1, "auto"], False, ["0.1", "auto"]),
    ],
)
def test_scales(values, log, labels):
    scale = scale_of(values)
    assert scale.log is log
    assert (None if scale.ticks is None else list(scale.ticks.values())) == labels
    places = [scale.place(value) for value in values]
    assert places == sorted(places)
    assert len(set(places)) == len(values)
    assert not log or min(places) > 0
    assert (scale.cut is not None) == (log and 0 in values)


def test_many_numbers_are_joined_in_bins_and_zero_stays_alone():
    values = [0, *range(1, 21)]
    bins, labels = bins_of(values)
    assert labels == ["0", "1 to 5", "6 to 10", "11 to 15", "16 to 20"]
    assert [bins[value_key(v)] for v in (0, 1, 5, 6, 20)] == [0, 1, 1, 2, 4]


def test_few_values_and_names_have_a_bin_each():
    assert bins_of([0.1, 1])[1] == ["0.1", "1"]
    names = [f"name {i}" for i in range(9)]
    assert bins_of(names)[1] == names


# Two axes


def test_cells_hold_the_mean_of_their_finished_trials(grid):
    cells = cells_of(grid, "cp.weight", "cp.steps")
    assert (cells.columns, cells.lines) == (["0.1", "1", "10"], ["1", "2", "4"])
    assert cells.counts.tolist() == [[2, 2, 2], [2, 2, 2], [0, 0, 0]]
    assert cells.unfinished.tolist() == [[0, 0, 1], [0, 0, 0], [1, 1, 0]]
    for line, steps in enumerate((1, 2)):
        for column, weight in enumerate((0.1, 1, 10)):
            values = [
                t.metric
                for t in grid.trials
                if t.setting == {"cp.weight": weight, "cp.steps": steps} and t.status == "finished"
            ]
            assert cells.means[line, column] == pytest.approx(np.mean(values), rel=1e-12)
    assert np.isnan(cells.means[2]).all()


def test_a_heat_map_says_what_did_not_finish(grid):
    texts = [text.get_text() for text in heat_figure(grid, "cp.weight", "cp.steps").axes[0].texts]
    assert texts.count("none of 1\nfinished") == 2
    assert sum("n=2" in text for text in texts) == 6
    assert texts.count("") == 1


@pytest.mark.parametrize("mode", ["min", "max"])
def test_deeper_is_better_in_both_modes(mode):
    trials = [trial({"a": a, "b": b}, metric=10 * a + b) for a in (1.0, 2.0) for b in (1.0, 2.0)]
    image = heat_figure(summary_of(trials, mode), "a", "b").axes[0].images[0]
    low, high = (sum(image.cmap(image.norm(value))[:3]) for value in (11.0, 22.0))
    assert (low < high) == (mode == "min")


# Cost and importance


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_front_is_numbered_and_named(mode):
    trials = [
        trial({"cp.weight": 0}, metric=1.0, seconds=10.0),
        trial({"cp.weight": 1}, metric=2.0, seconds=5.0),
        trial({"cp.weight": 2}, metric=0.5, seconds=200.0),
        trial({"cp.weight": 3}, metric=1.5, seconds=300.0),
    ]
    summary = summary_of(trials, mode)
    [axes] = cost_figure(summary).axes
    assert axes.get_xscale() == "log"
    marks = [(text.get_text(), *text.xy) for text in axes.texts]
    assert marks == [
        (str(i), row.device_seconds, row.mean) for i, row in enumerate(summary.front, start=1)
    ]
    named = axes.get_xlabel()
    assert named.splitlines()[2:] == (
        ["1  cp.weight=1", "2  baseline: cp.weight=0", "3  cp.weight=2"]
        if mode == "min"
        else ["1  cp.weight=1"]
    )


def test_bars_are_shares_of_the_variance_with_their_meaning():
    values = [(1, "a", 1.0), (2, "a", 1.1), (3, "b", 3.0), (4, "b", 3.1), (5, "b", 4.0)]
    values.append((6, "a", 1.05))
    trials = [trial({"lr": x, "side": side}, metric=m) for x, side, m in values]
    summary = summary_of(trials)
    [axes] = importance_figure(summary).axes
    shares = {part.axis: part.share for part in summary.importance}
    order = [label.get_text() for label in axes.get_yticklabels()]
    assert order == ["lr", "side"]  # the largest on top
    assert [bar.get_width() for bar in axes.patches] == [shares[name] for name in order]
    texts = [text.get_text() for text in axes.texts]
    assert texts[0].startswith("ρ = ")
    assert texts[1].startswith("η² = 0.9")
    assert all("6 trials" in text for text in texts)


def test_too_few_trials_have_no_bar():
    trials = [trial({"lr": x}, metric=x) for x in (1.0, 2.0, 3.0)]
    [axes] = importance_figure(summary_of(trials)).axes
    assert [bar.get_width() for bar in axes.patches] == [0]
    assert [text.get_text() for text in axes.texts] == ["unknown: 3 of 4 trials"]


def test_schedules_are_drawn_as_steps_of_the_best_over_those_of_the_others(tmp_path):
    changes = [{"after": 2000, "set": {"cp.weight": 1.2}}, {"after": 4000, "set": {"cp.weight": 9}}]
    trials = [
        trial({"cp.weight": 0}, metric=3.0),
        trial({"cp.weight": 1.0, "schedule": changes}, metric=2.5),
        trial({"cp.weight": 20.0}, metric=4.0),
    ]
    summary = summary_of(trials, "min")
    assert summary.axes == ("cp.weight",)
    [(name, figure)] = schedule_figures(summary).items()
    assert name == "schedule_cp.weight"
    [axes] = figure.axes
    other, best = axes.lines  # the best one on top; the baseline is no member
    assert list(best.get_xdata())[:3] == [0, 2000, 4000]
    assert list(best.get_ydata()) == [1.0, 1.2, 9, 9]
    assert set(other.get_ydata()) == {20.0}
    assert axes.get_yscale() == "log"
    assert "schedule_cp.weight" in sweep_figures(summary, tmp_path)
    assert not schedule_figures(summary_of(trials[::2], "min"))
