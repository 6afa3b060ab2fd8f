"""Where the values of a sweep's axes are drawn: on a scale, or in bins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cdm_ray.sweep.settings import is_number, show_value, value_key
from cdm_ray.sweep.summary import Row

DECADE = 10.0
"""Positive values that span it are shown on a log scale."""
LABELLED = 7
"""Up to so many values of an axis have a tick or a bin each."""
BINS = 5
"""Of more values than that, about equally many in each."""


class Scale(NamedTuple):
    """Where the values of an axis are drawn."""

    places: dict[str, float]
    """By `setting_key` of the value alone."""
    log: bool
    ticks: dict[float, str] | None
    """None: as matplotlib finds them."""
    cut: float | None
    """Between a zero on a log scale, drawn at the left, and the rest."""

    def place(self, value: Any) -> float:
        return self.places[value_key(value)]


def scale_of(values: Sequence[Any]) -> Scale:
    """Of numbers: linear, or log where the positive ones span a decade and none is negative. Of
    other values: one after the other, in the order given."""
    kept = list({value_key(value): value for value in values}.values())
    if not all(is_number(value) for value in kept):
        order = {value_key(value): float(i) for i, value in enumerate(kept)}
        return Scale(order, False, {float(i): show_value(v) for i, v in enumerate(kept)}, None)
    numbers = sorted(float(value) for value in kept)
    positive = [number for number in numbers if number > 0]
    if numbers[0] < 0 or not positive or positive[-1] < DECADE * positive[0]:
        ticks = _own_ticks(numbers, log=False)
        return Scale({value_key(number): number for number in numbers}, False, ticks, None)
    places = {value_key(number): number for number in positive}
    ticks = _own_ticks(positive, log=True) or decades(positive[0], positive[-1])
    if numbers[0] > 0:
        return Scale(places, True, ticks, None)
    gap = max(2.0, (positive[-1] / positive[0]) ** 0.15)
    zero = positive[0] / gap
    return Scale({value_key(0.0): zero, **places}, True, {zero: "0", **ticks}, zero * gap**0.5)


def _own_ticks(numbers: Sequence[float], *, log: bool) -> dict[float, str] | None:
    """Ticks at the values themselves if their labels have room."""
    along = np.log(numbers) if log else np.asarray(numbers)
    if len(along) > LABELLED or (len(along) > 1 and np.diff(along).min() < np.ptp(along) / 12):
        return None
    return {number: show_value(number) for number in numbers}


def decades(low: float, high: float) -> dict[float, str]:
    factors = (1, 2, 5) if high < 200 * low else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    return {tick: show_value(tick) for tick in ticks if 0.99 * low <= tick <= 1.01 * high}


def bins_of(values: Sequence[Any]) -> tuple[dict[str, int], list[str]]:
    """The bin of each value, and the labels of the bins: one for each value, or `BINS` of about
    equally many numbers."""
    size = 1
    if len(values) > LABELLED and all(is_number(value) for value in values):
        size = math.ceil(len(values) / BINS)
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    # A zero is the method switched off: never one with small numbers.
    if size > 1 and values[0] == 0:
        rest = values[1:]
        groups = [values[:1], *(rest[i : i + size] for i in range(0, len(rest), size))]
    labels = [
        show_value(g[0]) if len(g) == 1 else f"{_short(g[0])} to {_short(g[-1])}" for g in groups
    ]
    return {value_key(value): i for i, group in enumerate(groups) for value in group}, labels


def _short(value: float) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def distinct(rows: Iterable[Row], axis: str) -> list[Any]:
    """The axis's values in these settings: numbers in order, others by name."""
    found = [row.setting[axis] for row in rows if axis in row.setting]
    values = list({value_key(value): value for value in found}.values())
    return sorted(values, key=None if all(map(is_number, values)) else show_value)
