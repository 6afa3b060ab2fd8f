"""Which setting of a sweep is best, how sure that is, and what it costs.

Only finished trials enter means; seeds are what is counted. Intervals are Student's at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from cdm_ray.sweep.importance import Importance, importance_of
from cdm_ray.sweep.intervals import ALPHA, Deviate, Interval
from cdm_ray.sweep.settings import SCHEDULE, Setting, setting_key, show_setting

COUNTS = ("fd_images", "paths")
"""Metrics that say how many generated images or paths the others come from."""
Status = Literal["finished", "pruned", "failed"]
Mode = Literal["min", "max"]


@dataclass(frozen=True)
class TrialResult:
    """What is left of a trial; `metric` is what it reported last."""

    setting: Setting
    seed: int
    status: Status
    metric: float | None
    metrics: Mapping[str, float]
    steps: int
    device_seconds: float | None
    """That its training steps take, of all its workers together, at the run's median speed; None
    if not measured."""
    held_seconds: float
    """Device-seconds for which it held its workers, from start to end, evaluations included."""
    run: str
    failure: str | None = None


@dataclass(frozen=True)
class Row:
    """All trials of a setting."""

    setting: Setting
    is_baseline: bool
    values: Mapping[int, float]
    """The metric of the finished trials by seed, seeds in order."""
    device_seconds: float | None
    """Mean of the finished trials whose cost was measured; None if there is none."""
    pruned: int
    failed: int
    rank: int | None = None
    """From 1, shared by ties; None without a finished trial."""
    on_front: bool = False
    """No other setting is as good and as cheap, and better in one of both."""

    @property
    def interval(self) -> Interval | None:
        return Interval.of(list(self.values.values())) if self.values else None

    @property
    def mean(self) -> float:
        """NaN without a finished trial."""
        return float(np.mean(list(self.values.values()))) if self.values else math.nan


Outcome = Literal["better", "worse", "not distinguishable", "one seed"]


@dataclass(frozen=True)
class Comparison:
    """The best setting other than the baseline against the baseline."""

    row: Row
    gain: Interval
    """How much better it is: positive is better, whatever the mode."""
    method: Literal["paired", "welch", "none"]
    """Differences seed by seed where two or more seeds are shared, else Welch's interval if both
    have two or more seeds."""
    counts: tuple[int, int]
    """Compared seeds of the setting and of the baseline."""
    chosen_from: int
    """Settings other than the baseline, this one among them, with a trial on one of its compared
    seeds: above 1, the winner was chosen by the same noise that it is judged by."""
    corrected: float | None
    """Half width with that allowed for (Bonferroni: alpha / chosen_from)."""

    @property
    def outcome(self) -> Outcome:
        if self.gain.half_width is None:
            return "one seed"
        if abs(self.gain.mean) <= self.gain.half_width:
            return "not distinguishable"
        return "better" if self.gain.mean > 0 else "worse"

    def __str__(self) -> str:
        name, counted = show_setting(self.row.setting), self._counted()
        size = Interval(abs(self.gain.mean), self.gain.half_width)
        amount = f"{'worse' if self.gain.mean < 0 else 'better'} by {size}"
        if self.outcome == "one seed":
            return f"one seed: no interval; {name} against the baseline: {amount}{self._luck()}"
        if self.outcome == "not distinguishable":
            known = f"{name} is not distinguishable from the baseline ({counted})"
            return f"{known}: {amount}{self._luck()}"
        known = f"{name} is {self.outcome} than the baseline by {size} (95 %, {counted})"
        return known if self.outcome == "worse" else known + self._luck()

    def _counted(self) -> str:
        first, second = self.counts
        number = f"n={first}" if first == second else f"n={first} against {second}"
        return f"{number}, {'seed by seed' if self.method == 'paired' else 'Welch'}"

    def _luck(self) -> str:
        """What there is to say of the choice of the best on the seeds that it is judged by."""
        if self.chosen_from == 1:
            return ""
        text = f"; it is the best of {self.chosen_from} settings, chosen on the same "
        text += "seeds" if max(self.counts) > 1 else "seed"
        if self.outcome != "better" or self.corrected is None:
            return f"{text}, which favours it"
        verdict = "still better" if self.gain.mean > self.corrected else "not distinguishable"
        return (
            f"{text}: with that allowed for {Interval(self.gain.mean, self.corrected)}, {verdict}"
        )


@dataclass(frozen=True)
class Summary:
    """What a sweep found."""

    metric: str
    mode: Mode
    trials: tuple[TrialResult, ...]
    """As given, but bad numbers are failures."""
    rows: tuple[Row, ...]
    """Best first: by mean, ties by cost, the baseline before its equals; where a setting other
    than the baseline has several seeds, those with one stand below. Last, those without a
    finished trial."""
    comparison: Comparison | None
    """None if the baseline or everything else has no finished trial."""
    axes: tuple[str, ...]
    importance: tuple[Importance, ...]
    """In the order of the axes."""

    @property
    def best(self) -> Row | None:
        """The first of the ranking, which may be the baseline."""
        return self.rows[0] if self.rows and self.rows[0].values else None

    @property
    def baseline(self) -> Row | None:
        return next((row for row in self.rows if row.is_baseline), None)

    @property
    def label(self) -> str:
        """The metric, with what it was measured on if that is known, and which way is better."""
        counts = {trial.metrics.get(name) for trial in self.trials for name in COUNTS} - {None}
        of = f"n={next(iter(counts)):,.0f}; " if len(counts) == 1 else ""
        return f"{self.metric} ({of}{'lower' if self.mode == 'min' else 'higher'} is better)"

    @property
    def fields(self) -> tuple[str, ...]:
        """The axes, and the schedule if there are any."""
        scheduled = any(SCHEDULE in row.setting for row in self.rows)
        return (*self.axes, SCHEDULE) if scheduled else self.axes

    @property
    def front(self) -> tuple[Row, ...]:
        """The Pareto front of quality and device-seconds, cheapest first."""
        front = [row for row in self.rows if row.on_front]
        return tuple(sorted(front, key=lambda row: row.device_seconds or 0.0))

    @property
    def verdict(self) -> str:
        """One line: is the best setting better than the baseline?"""
        if self.comparison is not None:
            return str(self.comparison)
        if self.best is None:
            counts = {s: sum(t.status == s for t in self.trials) for s in ("pruned", "failed")}
            return "no trial finished: " + ", ".join(f"{n} {s}" for s, n in counts.items())
        if self.best.is_baseline:
            return "only the baseline finished: nothing to compare it with"
        return "the baseline has no finished trial: nothing to compare with"


def summarise(
    trials: Iterable[TrialResult], *, metric: str, mode: Mode, baseline: Setting
) -> Summary:
    """Rows, ranking, comparison and importance; trials in any order, and none is fine."""
    checked = tuple(_checked(trial, metric) for trial in trials)
    groups: dict[str, list[TrialResult]] = {}
    for trial in checked:
        groups.setdefault(setting_key(trial.setting), []).append(trial)
    base = setting_key(baseline)
    rows = [_row(group, is_baseline=key == base) for key, group in groups.items()]
    ranked = _mark_front(_ranked(rows, mode), mode)
    names = dict.fromkeys(name for trial in checked for name in trial.setting)
    axes = tuple(name for name in names if name != SCHEDULE)
    return Summary(
        metric=metric,
        mode=mode,
        trials=checked,
        rows=tuple(ranked),
        comparison=_compare(ranked, checked, mode),
        axes=axes,
        importance=tuple(importance_of(axis, _along(axis, ranked)) for axis in axes),
    )


def _checked(trial: TrialResult, metric: str) -> TrialResult:
    """A failure instead of a finished trial without the metric or of any bad number."""
    if trial.status == "failed":
        return trial
    bad = None
    if trial.metric is None:
        bad = f"{metric} was never reported" if trial.status == "finished" else None
    elif not math.isfinite(trial.metric):
        bad = f"{metric} is {trial.metric}"
    if bad is None and not math.isfinite(trial.device_seconds or 0.0):
        bad = f"device-seconds are {trial.device_seconds}"
    return trial if bad is None else replace(trial, status="failed", failure=bad)


def _row(trials: Sequence[TrialResult], *, is_baseline: bool) -> Row:
    finished = [trial for trial in trials if trial.status == "finished"]
    by_seed: dict[int, list[float]] = {}
    for trial in finished:
        if trial.metric is not None:
            by_seed.setdefault(trial.seed, []).append(trial.metric)
    costs = [trial.device_seconds for trial in finished if trial.device_seconds is not None]
    return Row(
        setting=trials[0].setting,
        is_baseline=is_baseline,
        # A search may draw a setting twice: with the same seed that is no second sample.
        values={seed: float(np.mean(by_seed[seed])) for seed in sorted(by_seed)},
        device_seconds=float(np.mean(costs)) if costs else None,
        pruned=sum(trial.status == "pruned" for trial in trials),
        failed=sum(trial.status == "failed" for trial in trials),
    )


def _ranked(rows: Sequence[Row], mode: Mode) -> list[Row]:
    sign = 1.0 if mode == "min" else -1.0
    # One lucky seed must not beat settings whose luck has been averaged out.
    repeated = any(len(row.values) > 1 for row in rows if not row.is_baseline)

    def quality(row: Row) -> tuple[bool, float]:
        return repeated and len(row.values) < 2, sign * row.mean

    def order(row: Row) -> tuple[tuple[bool, float], bool, float]:
        return quality(row), not row.is_baseline, row.device_seconds or 0.0

    measured = sorted((row for row in rows if row.values), key=order)
    ranks = [1 + sum(quality(other) < quality(row) for other in measured) for row in measured]
    ranked = [replace(row, rank=rank) for row, rank in zip(measured, ranks, strict=True)]
    return ranked + [row for row in rows if not row.values]


def _mark_front(rows: Sequence[Row], mode: Mode) -> list[Row]:
    sign = 1.0 if mode == "min" else -1.0
    points = {
        index: (sign * row.mean, row.device_seconds)
        for index, row in enumerate(rows)
        if row.device_seconds is not None
    }

    def on_front(index: int) -> bool:
        point = points.get(index)
        return point is not None and not any(
            p != point and p[0] <= point[0] and p[1] <= point[1] for p in points.values()
        )

    return [replace(row, on_front=on_front(index)) for index, row in enumerate(rows)]


def _compare(rows: Sequence[Row], trials: Sequence[TrialResult], mode: Mode) -> Comparison | None:
    base = next((row for row in rows if row.is_baseline and row.values), None)
    best = next((row for row in rows if not row.is_baseline and row.values), None)
    if base is None or best is None:
        return None
    sign = -1.0 if mode == "min" else 1.0
    own, other = ([sign * v for v in row.values.values()] for row in (best, base))
    shared = [seed for seed in best.values if seed in base.values]
    deviate: Deviate | None = None
    method: Literal["paired", "welch", "none"] = "none"
    seeds, counts = list(best.values), (len(own), len(other))
    if len(shared) > 1:
        seeds, counts, method = shared, (len(shared), len(shared)), "paired"
        deviate = Deviate.of([sign * (best.values[s] - base.values[s]) for s in shared])
    elif min(counts) > 1:
        deviate, method = Deviate.of_difference(own, other), "welch"
    elif shared:
        seeds, counts = shared, (1, 1)
        own, other = ([sign * row.values[shared[0]]] for row in (best, base))
    chosen_from = _rivals(trials, seeds, setting_key(base.setting))
    if deviate is None:
        gain, corrected = Interval(float(np.mean(own) - np.mean(other)), None), None
    else:
        gain = Interval(deviate.mean, deviate.half_width())
        corrected = deviate.half_width(ALPHA / chosen_from)
    return Comparison(best, gain, method, counts, chosen_from, corrected)


def _rivals(trials: Sequence[TrialResult], seeds: Sequence[int], baseline: str) -> int:
    """Settings besides the baseline that these seeds had a say in: pruned ones lost by them too."""
    took_part = [t for t in trials if t.status != "failed" and t.seed in seeds]
    return len({setting_key(t.setting) for t in took_part} - {baseline})


def _along(axis: str, rows: Sequence[Row]) -> list[tuple[Any, float]]:
    return [(r.setting[axis], v) for r in rows if axis in r.setting for v in r.values.values()]
