"""Which settings a sweep tries. A setting is {field: value} of its active axes, or its baseline."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from scipy.stats import qmc

from cdm_ray.config import Axis, JobConfig, SweepConfig, load_config
from cdm_ray.config.axes import text_of
from cdm_ray.config.sweeps import as_overrides, overlay
from cdm_ray.errors import ConfigError
from cdm_ray.sweep.settings import setting_key

J = TypeVar("J", bound=JobConfig)

Setting = dict[str, Any]

REDRAWN = 0.25
"""Share of the values that population-based training draws anew."""
_DRAWS_PER_TRIAL = 100  # a small space may not have as many settings as there are trials


class OptunaTrial(Protocol):
    """What is used of `optuna.Trial`."""

    @property
    def number(self) -> int: ...

    def suggest_categorical(self, name: str, choices: list[str]) -> str: ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...


def fields(sweep: SweepConfig) -> list[str]:
    """Fields in which trials differ: the axes, then those of the baseline alone."""
    return list(sweep.axes | sweep.baseline)


def settings(sweep: SweepConfig) -> list[Setting]:
    """The different settings of a grid or random search, the baseline first.

    The number of settings is all of a grid; of random ones `trials`, or fewer if the space has no
    more. More trials begin with those of fewer. Settings that lead to the same configuration are
    one. Raises ConfigError for a setting whose values do not fit together.
    """
    if sweep.search == "grid":
        grid = sweep.combinations({key: axis.values for key, axis in sweep.axes.items()})
        return _different(sweep, grid, None)
    if sweep.search == "random":
        return _different(sweep, _draws(sweep), sweep.trials)
    raise ValueError("the settings of search=optuna depend on results; use to_optuna")


def to_optuna(sweep: SweepConfig) -> Callable[[OptunaTrial], Setting]:
    """`define(trial) -> setting` for `OptunaSearch(space=define)`; trial 0 is the baseline.

    It can be pickled, as OptunaSearch is when Tune saves its state. Raises ConfigError if values do
    not fit together in one of as many random settings as there are trials.
    """
    _different(sweep, _draws(sweep), sweep.trials)
    return partial(_define, sweep)


def trial_config(root: type[J], sweep: SweepConfig, setting: Mapping[str, Any], seed: int) -> J:
    """Configuration of a trial: recipe, `set`, its setting, and `run.seed`."""
    base = load_config(root, sweep.recipe, as_overrides(sweep.set))
    return overlay(base, {**setting, "run.seed": seed})


def trial_name(setting: Mapping[str, Any]) -> str:
    """Such as `cp.weight=0.3,cp.window=0.1`, whatever the order; `recipe` if nothing is changed."""
    return ",".join(f"{key}={text_of(setting[key])}" for key in sorted(setting)) or "recipe"


def mutated(sweep: SweepConfig, setting: Mapping[str, Any], rng: np.random.Generator) -> Setting:
    """Other values of the axes near a setting's, as population-based training tries them.

    A quarter of them is drawn anew; the others go to the choice beside theirs, or up or down: by a
    fifth, of a `uniform` axis by a tenth of its range. Never the same setting.
    """
    while True:
        found = {key: _near(sweep.axes[key], value, rng) for key, value in setting.items()}
        if setting_key(found) != setting_key(setting):
            return found


def _near(axis: Axis, value: Any, rng: np.random.Generator) -> Any:
    if rng.random() < REDRAWN:
        return _value_at(axis, rng.random())
    up = rng.random() < 0.5
    if axis.kind == "choice":
        place = axis.values.index(value) + (1 if up else -1)
        return axis.values[min(max(place, 0), len(axis.values) - 1)]
    low, high = axis.values
    if axis.kind == "int":
        step = max(1, round(0.2 * abs(value)))
        return int(min(max(value + (step if up else -step), low), high))
    if axis.kind == "uniform":
        return _rounded(value + (0.1 if up else -0.1) * (high - low), axis)
    return _rounded(value * (1.2 if up else 0.8), axis)


def _different(
    sweep: SweepConfig, candidates: Iterable[Setting], limit: int | None
) -> list[Setting]:
    """The baseline and the candidates up to `limit` altogether, each configuration once."""
    found: dict[str, Setting] = {}
    tried: set[str] = set()
    for setting in itertools.chain([dict(sweep.baseline)], candidates):
        name = trial_name(setting)
        if name in tried:
            continue
        tried.add(name)
        try:
            learned = overlay(sweep.base, setting).learned()
        except ConfigError as error:
            raise ConfigError(
                f"{name}: {error}; give an axis a `when`, so that these do not meet"
            ) from None
        found.setdefault(json.dumps(learned, sort_keys=True), setting)
        if len(found) == limit:
            break
    return list(found.values())


def _draws(sweep: SweepConfig) -> Iterator[Setting]:
    """A scrambled Halton sequence: few draws fill the space more evenly than independent ones."""
    points = qmc.Halton(d=len(sweep.order), rng=sweep.seed)
    for _ in range(_DRAWS_PER_TRIAL * sweep.trials):
        place = dict(zip(sweep.order, points.random()[0].tolist(), strict=True))
        yield _pick(sweep, partial(_value_in, place))


def _value_in(place: Mapping[str, float], key: str, axis: Axis) -> Any:
    return _value_at(axis, place[key])


def _pick(sweep: SweepConfig, value_of: Callable[[str, Axis], Any]) -> Setting:
    """A setting with the axes that are active, in the sweep's order."""
    setting: Setting = {}
    for key in sweep.order:
        if sweep.is_active(key, setting):
            setting[key] = value_of(key, sweep.axes[key])
    return {key: setting[key] for key in sweep.axes if key in setting}


def _value_at(axis: Axis, share: float) -> Any:
    """The value below which a share in [0, 1) of the axis's distribution lies."""
    if axis.kind == "choice":
        return axis.values[int(share * len(axis.values))]
    low, high = axis.values
    if axis.kind == "int":
        return low + int(share * (high - low + 1))
    if axis.kind == "uniform":
        return _rounded(low + share * (high - low), axis)
    return _rounded(low * (high / low) ** share, axis)


def _define(sweep: SweepConfig, trial: OptunaTrial) -> Setting:
    if trial.number == 0:
        return dict(sweep.baseline)
    return _pick(sweep, partial(_suggest, trial))


def _suggest(trial: OptunaTrial, key: str, axis: Axis) -> Any:
    if axis.kind == "choice":
        # Optuna stores texts and numbers only, and a choice may be a list.
        values = {text_of(value): value for value in axis.values}
        return values[trial.suggest_categorical(key, list(values))]
    low, high = axis.values
    if axis.kind == "int":
        return trial.suggest_int(key, low, high)
    value = trial.suggest_float(key, low, high, log=axis.kind == "loguniform")
    return _rounded(value, axis)


def _rounded(value: float, axis: Axis) -> float:
    """A draw to four digits of its own size, or of the range's width if that is less: finer makes
    no difference, and a trial's name can say all of it."""
    low, high = axis.values
    scale = high - low if axis.kind == "uniform" else min(value, high - low)
    return min(max(round(value, 3 - math.floor(math.log10(scale))), low), high)
