"""The summary of a sweep against scipy, brute force and cases worked out by hand."""

import csv
import io
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from cdm_ray.sweep.importance import importance_of
from cdm_ray.sweep.intervals import Deviate, Interval, show_number
from cdm_ray.sweep.settings import setting_key, show_setting
from cdm_ray.sweep.summary import TrialResult, summarise
from cdm_ray.sweep.tables import csv_text, markdown

BASELINE = {"cp.weight": 0}


def trial(setting, seed=0, metric=1.0, *, status="finished", seconds=10.0, failure=None):
    if not isinstance(setting, dict):
        setting = {"cp.weight": setting}
    return TrialResult(setting, seed, status, metric, {}, 100, seconds, 2.0, f"run-{seed}", failure)


def group(setting, values, first_seed=0, **options):
    return [trial(setting, first_seed + i, value, **options) for i, value in enumerate(values)]


def summary_of(trials, mode="min", baseline=None):
    return summarise(trials, metric="fd", mode=mode, baseline=baseline or BASELINE)


def row_of(summary, setting):
    return next(row for row in summary.rows if row.setting == setting)


# Intervals


def test_an_interval_is_students():
    values = [0.31, 0.35, 0.28, 0.40]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    found = Interval.of(values)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(
        (low, high), rel=1e-12
    )


def test_one_value_has_no_interval():
    assert Interval.of([2.0]) == Interval(2.0, None)


def test_the_difference_of_groups_is_welchs():
    first, second = [1.0, 1.3, 0.9, 1.8, 1.1], [2.0, 2.05, 2.1]
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    found = Deviate.of_difference(first, second)
    half = found.half_width()
    assert (found.mean - half, found.mean + half) == pytest.approx(tuple(expected), rel=1e-12)


def test_groups_without_scatter_differ_for_certain():
    assert Deviate.of_difference([1.0, 1.0], [2.0, 2.0]).half_width() == 0


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(0.51234, 0.0531), "0.512 ± 0.053"),
        (Interval(1234.5, 123.0), "1234 ± 123"),
        (Interval(0.5, None), "0.5000"),
        (Interval(0.5, 0.0), "0.5000 ± 0"),
        (Interval(0.0, 0.0), "0 ± 0"),
        (Interval(0.0, 0.12), "0.00 ± 0.12"),
        (Interval(2.0e-9, 1.0e-9), "2e-09 ± 1e-09"),
    ],
)
def test_intervals_are_written_as_far_as_they_are_known(interval, text):
    assert str(interval) == text


def test_numbers_have_four_digits():
    shown = [show_number(value) for value in (0.0, 0.123456, 12.3456, 123456.7, 1.2e-7, -3.5e8)]
    assert shown == ["0", "0.1235", "12.35", "123457", "1.200e-07", "-3.500e+08"]


# Rows


def test_pruned_and_failed_trials_never_enter_means():
    summary = summary_of(
        [
            *group(1, [0.4, 0.6]),
            trial(1, 2, 0.001, status="pruned", seconds=1.0),
            trial(1, 3, 0.002, status="failed", seconds=1.0),
            trial(2, 0, 0.0001, status="pruned"),
        ]
    )
    row = row_of(summary, {"cp.weight": 1})
    assert (row.mean, row.device_seconds, row.pruned, row.failed) == (0.5, 10.0, 1, 1)
    assert summary.best is row
    lost = summary.rows[-1]
    assert (lost.rank, lost.interval, lost.device_seconds) == (None, None, None)
    assert math.isnan(lost.mean)


@pytest.mark.parametrize("status", ["finished", "pruned"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_numbers_are_failures(status, bad):
    summary = summary_of([trial(1, metric=bad, status=status), trial(2)])
    assert [t.status for t in summary.trials] == ["failed", "finished"]
    assert summary.trials[0].failure == f"fd is {bad}"
    assert summary.best.setting == {"cp.weight": 2}


def test_a_finished_trial_without_the_metric_or_its_cost_failed():
    summary = summary_of([trial(1, metric=None), trial(2, seconds=math.nan)])
    failures = [t.failure for t in summary.trials]
    assert failures == ["fd was never reported", "device-seconds are nan"]
    assert summary.best is None


def test_a_trial_pruned_before_its_first_report_is_pruned():
    assert summary_of([trial(1, metric=None, status="pruned")]).trials[0].status == "pruned"


def test_a_failure_keeps_its_reason():
    [found] = summary_of([trial(1, metric=math.nan, status="failed", failure="a node died")]).trials
    assert found.failure == "a node died"


def test_the_same_seed_twice_is_no_second_sample():
    summary = summary_of([trial(1, 0, 0.4), trial(1.0, 0, 0.6)])
    assert [row.interval for row in summary.rows] == [Interval(0.5, None)]


def test_settings_are_equal_by_their_values():
    assert setting_key({"a": 1, "b": "x"}) == setting_key({"b": "x", "a": 1.0})
    assert setting_key({"a": 1}) == setting_key({"a": np.float64(1)}) == setting_key({"a": 1.0})
    assert setting_key({"a": np.int64(3)}) == setting_key({"a": 3})
    assert len({setting_key({"a": value}) for value in (1, True, "1", 2, None)}) == 5


def test_the_baseline_is_found_in_another_spelling():
    summary = summary_of([trial(1), trial(0.0)], baseline={"cp.weight": 0})
    assert summary.baseline.setting == {"cp.weight": 0.0}


# Ranking


@pytest.mark.parametrize(("mode", "order"), [("min", [3, 1, 2]), ("max", [2, 1, 3])])
def test_rows_come_best_first(mode, order):
    summary = summary_of([trial(1, metric=0.5), trial(2, metric=0.9), trial(3, metric=0.1)], mode)
    assert [row.setting["cp.weight"] for row in summary.rows] == order
    assert [row.rank for row in summary.rows] == [1, 2, 3]


def test_ties_share_a_rank_the_baseline_first_then_the_cheapest():
    summary = summary_of(
        [
            trial(1, metric=0.5, seconds=9.0),
            trial(2, metric=0.5, seconds=4.0),
            trial(0, metric=0.5, seconds=20.0),
            trial(3, metric=0.7),
        ]
    )
    found = [(row.setting["cp.weight"], row.rank) for row in summary.rows]
    assert found == [(0, 1), (2, 1), (1, 1), (3, 4)]
    assert summary.best.is_baseline


def test_one_lucky_seed_does_not_beat_repeated_settings():
    summary = summary_of([*group(0, [0.6, 0.7]), *group(1, [0.5, 0.55]), trial(2, metric=0.1)])
    assert [row.setting["cp.weight"] for row in summary.rows] == [1, 0, 2]
    assert summary.comparison.row.setting == {"cp.weight": 1}


def test_a_repeated_baseline_alone_does_not_push_the_others_down():
    summary = summary_of([*group(0, [0.6, 0.7]), trial(2, metric=0.1)])
    assert summary.best.setting == {"cp.weight": 2}


# Comparison

NOISE = [0.0, 0.5, -0.4, 0.2]
"""Of a seed: far larger than the difference of 0.1 between settings."""
BASE = [1.0 + noise for noise in NOISE]
GOOD = [0.9 + noise + wiggle for noise, wiggle in zip(NOISE, [0.01, -0.01, 0.0, 0.0], strict=True)]


def test_shared_seeds_are_compared_seed_by_seed():
    comparison = summary_of([*group(0, BASE), *group(1, GOOD)]).comparison
    low, high = stats.ttest_rel(BASE, GOOD).confidence_interval(0.95)
    assert comparison.method == "paired"
    assert comparison.gain.mean - comparison.gain.half_width == pytest.approx(low, rel=1e-9)
    assert comparison.gain.mean + comparison.gain.half_width == pytest.approx(high, rel=1e-9)
    assert comparison.outcome == "better"
    assert str(comparison) == (
        "cp.weight=1 is better than the baseline by 0.100 ± 0.013 (95 %, n=4, seed by seed)"
    )


def test_the_same_numbers_on_other_seeds_are_not_distinguishable():
    comparison = summary_of([*group(0, BASE), *group(1, GOOD, first_seed=10)]).comparison
    low, _ = stats.ttest_ind(BASE, GOOD, equal_var=False).confidence_interval(0.95)
    assert comparison.method == "welch"
    assert comparison.gain.mean - comparison.gain.half_width == pytest.approx(low, rel=1e-9)
    assert comparison.outcome == "not distinguishable"
    assert "not distinguishable from the baseline (n=4, Welch): better by 0.10" in str(comparison)


def test_one_shared_seed_of_several_is_no_pair():
    trials = [*group(0, [1.0, 1.1, 1.05]), *group(1, [0.5, 0.6], first_seed=2)]
    comparison = summary_of(trials).comparison
    assert (comparison.method, comparison.counts) == ("welch", (2, 3))
    assert "n=2 against 3, Welch" in str(comparison)


def test_only_shared_seeds_are_paired():
    comparison = summary_of([*group(0, [1.0, 1.2, 9.0]), *group(1, [0.9, 1.0])]).comparison
    assert comparison.counts == (2, 2)
    assert comparison.gain.mean == pytest.approx(0.15)


@pytest.mark.parametrize(("mode", "outcome", "best"), [("min", "worse", 0), ("max", "better", 1)])
def test_the_mode_decides_what_is_better(mode, outcome, best):
    summary = summary_of([*group(0, [1.0, 1.1, 1.2]), *group(1, [1.5, 1.6, 1.71])], mode)
    comparison = summary.comparison
    assert comparison.outcome == outcome
    assert abs(comparison.gain.mean) == pytest.approx(0.503, abs=1e-3)
    assert summary.best.setting == {"cp.weight": best}
    assert f"cp.weight=1 is {outcome} than the baseline by 0.503 ± 0.014" in str(comparison)


def test_equal_results_are_not_distinguishable():
    comparison = summary_of([*group(0, [1.0, 1.2]), *group(1, [1.0, 1.2])]).comparison
    assert comparison.outcome == "not distinguishable"


def test_one_seed_has_no_interval():
    comparison = summary_of([trial(0, metric=1.0), trial(1, metric=0.6)]).comparison
    assert (comparison.outcome, comparison.gain) == ("one seed", Interval(0.4, None))
    assert str(comparison).startswith("one seed: no interval; cp.weight=1 against the baseline")


def test_a_single_seed_is_compared_with_the_same_seed_of_the_baseline():
    comparison = summary_of([*group(0, [1.0, 3.0]), trial(1, 1, 2.5)]).comparison
    assert comparison.gain == Interval(0.5, None)


def test_the_choice_of_the_best_is_told_and_allowed_for():
    others = [t for weight in (2, 3, 4) for t in group(weight, [2.0, 2.5, 1.6, 2.1])]
    pruned = trial(5, 0, 3.0, status="pruned")
    failed = trial(6, 0, None, status="failed")
    elsewhere = trial(7, 99, 3.0)
    trials = [*group(0, BASE), *group(1, GOOD), *others, pruned, failed, elsewhere]
    comparison = summary_of(trials).comparison
    assert comparison.chosen_from == 5  # weights 1 to 5; 6 had no say, 7 was on another seed
    gains = np.subtract(BASE, GOOD)
    expected = stats.t.ppf(1 - 0.05 / 5 / 2, 3) * stats.sem(gains)
    assert comparison.corrected == pytest.approx(expected, rel=1e-9)
    assert "the best of 5 settings, chosen on the same seeds" in str(comparison)
    assert str(comparison).endswith("still better")


def test_a_win_that_many_tries_explain_is_called_so():
    gains = [0.2, 0.13, 0.17]
    p_value = stats.ttest_1samp(gains, 0).pvalue
    assert 0.05 / 9 < p_value < 0.05
    others = [t for weight in range(2, 10) for t in group(weight, [2.0, 2.1, 2.2])]
    trials = [*group(0, [1.0] * 3), *group(1, [1 - gain for gain in gains]), *others]
    comparison = summary_of(trials).comparison
    assert (comparison.outcome, comparison.chosen_from) == ("better", 9)
    assert "seed by seed); it is the best of 9 settings" in str(comparison)
    assert str(comparison).endswith("not distinguishable")


def test_fresh_seeds_of_the_best_alone_are_no_selection():
    trials = [*group(0, BASE, 10), *group(1, GOOD, 10), *group(2, [2.0, 2.1])]
    comparison = summary_of(trials).comparison
    assert (comparison.row.setting, comparison.chosen_from) == ({"cp.weight": 1}, 1)
    assert "chosen" not in str(comparison)


@pytest.mark.parametrize(
    ("trials", "verdict"),
    [
        ([], "no trial finished: 0 pruned, 0 failed"),
        (
            [trial(0, status="failed"), trial(1, status="pruned"), trial(2, metric=math.nan)],
            "no trial finished: 1 pruned, 2 failed",
        ),
        ([trial(0)], "only the baseline finished: nothing to compare it with"),
        ([trial(1)], "the baseline has no finished trial: nothing to compare with"),
        (
            [trial(1), trial(0, status="failed")],
            "the baseline has no finished trial: nothing to compare with",
        ),
    ],
)
def test_a_sweep_with_nothing_to_compare_says_so(trials, verdict):
    summary = summary_of(trials)
    assert (summary.comparison, summary.verdict) == (None, verdict)
    assert verdict in markdown(summary)
    assert len(csv_text(summary).splitlines()) == 1 + len(trials)


# Pareto front


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_front_is_what_brute_force_finds(mode):
    rng = np.random.default_rng(0)
    for _ in range(6):
        points = rng.integers(0, 6, (12, 2)).astype(float)  # small numbers: ties of all kinds
        trials = [trial(i, metric=q, seconds=c) for i, (q, c) in enumerate(points)]
        sign = 1 if mode == "min" else -1
        expected = {
            i
            for i, (q, c) in enumerate(points)
            if not any(
                (sign * p <= sign * q and d <= c) and (sign * p < sign * q or d < c)
                for p, d in points
            )
        }
        front = summary_of(trials, mode).front
        assert {row.setting["cp.weight"] for row in front} == expected
        costs = [row.device_seconds for row in front]
        assert costs == sorted(costs)


# Importance


def test_a_numeric_axis_has_spearmans_correlation():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, 15).tolist()  # with ties
    results = [v + float(e) for v, e in zip(values, rng.normal(0, 1.5, 15), strict=True)]
    found = importance_of("cp.weight", list(zip(values, results, strict=True)))
    expected = stats.spearmanr(values, results).statistic
    assert found.numeric
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert found.share == pytest.approx(expected**2, rel=1e-12)


def test_choices_have_the_share_of_the_variance_between_them():
    results = [("far", 1.0), ("far", 3.0), ("near", 5.0), ("near", 7.0)]
    found = importance_of("cp.detach", results)
    # Group means 2 and 6 around 4: between 16, in total 9 + 1 + 1 + 9.
    assert (found.numeric, found.value, found.trials) == (False, pytest.approx(16 / 20), 4)
    assert found.share == found.value


def test_true_and_false_are_choices():
    found = importance_of("on", [(True, 1.0), (True, 1.1), (False, 2.0), (False, 2.1)])
    assert not found.numeric


def test_chance_is_what_all_orders_give():
    """Six trials in two groups: the extreme split has 2 of 20 splits, so that more than 5 % of all
    orders reach it, and the 95 % quantile is its share."""
    results = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    splits = [set(split) for split in itertools.combinations(range(6), 3)]
    shares = [
        stats.pearsonr([i in split for i in range(6)], results).statistic ** 2 for split in splits
    ]
    found = importance_of("on", list(zip(["a", "b"] * 3, results, strict=True)))
    assert found.chance == pytest.approx(max(shares), rel=1e-9)


def test_four_trials_prove_no_trend():
    found = importance_of("x", [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)])
    assert (found.value, found.chance) == (pytest.approx(1), pytest.approx(1))


@pytest.mark.parametrize(
    "results",
    [
        [],
        [(1, 0.1), (2, 0.2), (3, 0.3)],
        [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5)],
        [(1, 0.1), (1, 0.2), (1.0, 0.3), (1, 0.4)],
        [("a", 0.1), ("b", 0.2), ("c", 0.3), ("d", 0.4)],
    ],
)
def test_what_trials_cannot_tell_is_none(results):
    found = importance_of("x", results)
    assert (found.value, found.share, found.chance, found.trials) == (None,) * 3 + (len(results),)


def test_importance_is_over_finished_trials_that_have_the_axis():
    trials = [
        trial(0, metric=0.9),
        *(trial({"cp.weight": w, "cp.steps": w}, metric=1 / w) for w in (1, 2, 3, 4)),
        trial({"cp.weight": 9, "cp.steps": 9}, metric=5.0, status="pruned"),
    ]
    summary = summary_of(trials)
    found = {part.axis: (part.trials, part.value) for part in summary.importance}
    assert summary.axes == ("cp.weight", "cp.steps")
    assert found["cp.steps"] == (4, pytest.approx(-1))
    assert found["cp.weight"][0] == 5


# Writers


def test_the_table_of_trials_reads_back():
    trials = [
        TrialResult(
            {"cp.weight": 0.1, "cp.detach": "a,b"}, 3, "finished", 1 / 3,
            {"kl": 0.25, "fd": 1 / 3}, 50, 12.5, 20.0, "run-a",
        ),
        trial(0, status="pruned", metric=0.7),
        trial(2, metric=math.nan),
    ]  # fmt: skip
    first, second, third = csv.DictReader(io.StringIO(csv_text(summary_of(trials))))
    assert (first["cp.detach"], first["seed"], first["run"]) == ("a,b", "3", "run-a")
    assert float(first["fd"]) == 1 / 3
    assert float(first["kl"]) == 0.25
    assert (second["status"], second["fd"], second["cp.detach"]) == ("pruned", "0.7", "")
    assert (third["status"], third["failure"]) == ("failed", "fd is nan")


def test_the_table_of_settings_has_marks_and_failures():
    text = markdown(
        summary_of(
            [
                *group(0, [1.0, 1.2], seconds=5.0),
                *group(1, [0.5, 0.6], seconds=20.0),
                trial(1, 2, status="pruned", seconds=3.0),
                trial({"cp.weight": "a|b"}, status="failed", failure="out of\nmemory"),
            ]
        )
    )
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows == [
        "| rank | cp.weight | fd | seeds | device-seconds | marks |",
        "|---|---|---|---|---|---|",
        "| 1 | 1 | 0.55 ± 0.64 | 2 | 20.0 | best, Pareto, 1 pruned |",
        "| 2 | 0 | 1.1 ± 1.3 | 2 | 5.0 | baseline, Pareto |",
        "| – | a\\|b | – | 0 | – | 1 failed |",
    ]
    assert "- cp.weight=a|b, seed 0 (run-0): out of memory" in text
    assert "All 6 trials together held their devices for 12 seconds" in text
    assert text.startswith("**cp.weight=1 is ")


def test_settings_are_written_as_overrides():
    assert show_setting({"a": 0.12345678, "b": True, "c": 3}) == "a=0.1235, b=true, c=3"
    assert show_setting({}) == "the recipe as it is"


@pytest.mark.parametrize(
    ("metrics", "label"),
    [
        ([{"fd_images": 500.0}, {"fd_images": 500.0}], "fd (n=500; lower is better)"),
        ([{"paths": 1024.0}, {}], "fd (n=1,024; lower is better)"),
        ([{"fd_images": 500.0}, {"fd_images": 600.0}], "fd (lower is better)"),
        ([{}], "fd (lower is better)"),
    ],
)
def test_the_label_tells_the_number_of_samples_if_it_is_the_same_in_all_trials(metrics, label):
    trials = [replace(trial(i), metrics=one) for i, one in enumerate(metrics)]
    assert summary_of(trials).label == label
    assert label in markdown(summary_of(trials))
