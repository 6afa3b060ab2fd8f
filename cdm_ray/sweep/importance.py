"""How much of a sweep's metric goes with each axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cdm_ray.sweep.settings import is_number, value_key

Array = NDArray[np.float64]

FEWEST_TRIALS = 4
"""From which the importance of an axis is stated."""
_SHUFFLES = 999
_USUAL = 0.95


@dataclass(frozen=True)
class Importance:
    """How much of the metric goes with an axis, over finished trials that have it."""

    axis: str
    numeric: bool
    value: float | None
    """Spearman's rank correlation of a numeric axis, which sees trends and no optimum in the
    middle; of choices, the share of the variance between them (eta squared). None with fewer than
    4 trials, where nothing varies, or where no choice has two trials."""
    chance: float | None
    """95 % of shuffled results have a `share` up to this."""
    trials: int

    @property
    def share(self) -> float | None:
        """Of the variance: comparable between both kinds of axes."""
        if self.value is None:
            return None
        return self.value**2 if self.numeric else self.value


def importance_of(axis: str, results: Sequence[tuple[Any, float]]) -> Importance:
    """From the axis's value and the metric of each trial."""
    numeric = all(is_number(value) for value, _ in results)
    # What cannot be told from these trials stays None.
    nothing = Importance(axis, numeric, None, None, len(results))
    codes = np.unique([value_key(value) for value, _ in results], return_inverse=True)[1]
    found = np.array([result for _, result in results])
    if len(results) < FEWEST_TRIALS or np.ptp(found) == 0 or np.ptp(codes) == 0:
        return nothing
    if numeric:
        along = stats.rankdata([value for value, _ in results])
        found = stats.rankdata(found)

        def score(values: Array) -> float:
            return float(np.corrcoef(along, values)[0, 1])

    else:
        sizes = np.bincount(codes)
        if sizes.max() == 1:
            return nothing

        def score(values: Array) -> float:
            centred = values - values.mean()
            between = np.bincount(codes, centred) ** 2 / sizes
            return float(between.sum() / (centred**2).sum())

    rng = np.random.default_rng(0)
    shuffled = np.array([score(rng.permutation(found)) for _ in range(_SHUFFLES)])
    chance = np.quantile(shuffled**2 if numeric else shuffled, _USUAL)
    return Importance(axis, numeric, score(found), float(chance), len(results))
