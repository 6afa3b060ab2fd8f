"""Student intervals of means and differences, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

ALPHA = 0.05
"""The share of intervals that miss the truth."""


class Deviate(NamedTuple):
    """An estimated mean, its standard error and Student's degrees of freedom."""

    mean: float
    error: float
    freedom: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Deviate:
        """Of two or more independent values."""
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
        return cls(float(np.mean(values)), error, len(values) - 1)

    @classmethod
    def of_difference(cls, first: Sequence[float], second: Sequence[float]) -> Deviate:
        """Mean of `first` less that of `second`, independent groups of two or more (Welch)."""
        one, two = cls.of(first), cls.of(second)
        error = math.hypot(one.error, two.error)
        freedom = math.inf
        if error > 0:
            shares = [(part.error / error) ** 4 / part.freedom for part in (one, two)]
            freedom = 1 / sum(shares)
        return cls(one.mean - two.mean, error, freedom)

    def half_width(self, alpha: float = ALPHA) -> float:
        """Of the interval that misses the true mean with probability alpha."""
        return float(stats.t.ppf(1 - alpha / 2, self.freedom)) * self.error


@dataclass(frozen=True)
class Interval:
    """Mean and half width of its interval; no width for a single value."""

    mean: float
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        if len(values) == 1:
            return cls(float(values[0]), None)
        found = Deviate.of(values)
        return cls(found.mean, found.half_width())

    def __str__(self) -> str:
        """The width to two digits and the mean as far; four digits without a width."""
        if not self.half_width:
            exact = "" if self.half_width is None else " ± 0"
            return show_number(self.mean) + exact
        if not 1e-4 <= max(abs(self.mean), self.half_width) < 1e6:
            return f"{self.mean:.3g} ± {self.half_width:.2g}"
        decimals = _decimals(self.half_width, 2)
        return f"{self.mean:.{decimals}f} ± {self.half_width:.{decimals}f}"


def show_number(value: float) -> str:
    """Four digits."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3e}"
    return f"{value:.{_decimals(value, 4)}f}"


def _decimals(value: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))
