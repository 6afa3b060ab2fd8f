"""Configuration of sweeps: which fields are varied, how settings are chosen and compared.

A sweep is a YAML file:

    job: images
    recipe: digits
    set: {train.images: 6k}
    axes:
      cp.weight: {choice: [0.1, 1, 10]}
      cp.window: {loguniform: [0.05, 0.5], when: {cp.weight: [1, 10]}}
    baseline: {cp.weight: 0}
    search: random
    metric: fd_digits_ode
"""

from __future__ import annotations

import difflib
import graphlib
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from cdm_ray.config.axes import Axis, as_number, text_of
from cdm_ray.config.base import Fraction, PositiveCount, Section
from cdm_ray.config.bridges import BridgeConfig
from cdm_ray.config.common import JobConfig, TrackingConfig
from cdm_ray.config.images import ImageConfig
from cdm_ray.config.loading import build_config, describe, flatten, load_config
from cdm_ray.errors import ConfigError

C = TypeVar("C", bound=Section)

JOBS: dict[str, type[JobConfig]] = {"images": ImageConfig, "bridges": BridgeConfig}
"""Configuration of the trials of each `job`."""

GIVEN_BY_SWEEP = ("recipe", "run.name", "run.seed")
"""Fields that every trial has from the sweep."""

_MAPPINGS = ("set", "axes", "baseline")


class SweepConfig(Section):
    """Configuration of a sweep (`sweeps/*.yaml`)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "custom"
    """Name of the sweep; by default that of its file."""
    job: Literal["images", "bridges"] = "images"
    """What the trials train."""
    recipe: str | None = None
    """Recipe of the trials, or a YAML file; None: the defaults."""
    set: dict[str, Any] = {}
    """Fields of all trials over those of the recipe: section.field and value."""
    axes: dict[str, Axis] = {}
    """Fields that are varied: section.field and {choice: [...]}, {uniform: [low, high]},
    {loguniform: [low, high]} or {int: [low, high]}, with `when: {field: values}` if it matters only
    then."""
    baseline: dict[str, Any] = {}
    """Fields of the trial that the others are compared with, over the recipe and `set`."""
    search: Literal["grid", "random", "optuna"] = "random"
    """grid: all combinations of choices; random: draws that fill the space evenly; optuna: draws
    guided by the trials before (TPE)."""
    trials: PositiveCount = 8
    """Different settings, the baseline among them; a grid has all of its own."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draws."""
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """asha: trials that are behind the others at a rung end there, the baseline apart. pbt: they go
    on from the checkpoint of one that is ahead, with other values of the axes, so that schedules
    are found."""
    rungs: Annotated[int, Field(ge=1)] = 3
    """Evaluations of a whole run, that at its end included."""
    grace: Fraction = 0.4
    """scheduler=asha: share of a run before the first trial is ended."""
    metric: str = ""
    """Metric that decides, e.g. fd_digits_ode."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger metric is better."""
    seeds: Annotated[int, Field(ge=1)] = 1
    """Runs of each setting, with different seeds."""
    top: Annotated[int, Field(ge=0)] = 0
    """Best settings that are repeated in the end, the baseline with them."""
    repeats: Annotated[int, Field(ge=1)] = 2
    """Further seeds of those."""

    @field_validator("baseline")
    @classmethod
    def _numbers(cls, baseline: dict[str, Any]) -> dict[str, Any]:
        return {key: as_number(value) for key, value in baseline.items()}

    @property
    def root(self) -> type[JobConfig]:
        """Kind of configuration that the trials have."""
        return JOBS[self.job]

    @cached_property
    def base(self) -> JobConfig:
        """Recipe and `set`: what all trials start from."""
        return load_config(self.root, self.recipe, as_overrides(self.set))

    @property
    def tracking(self) -> TrackingConfig:
        """Where the sweep and its trials are recorded."""
        return self.base.tracking

    @cached_property
    def order(self) -> tuple[str, ...]:
        """The axes, each after those that its condition names."""
        needs = {key: [k for k in axis.when if k in self.axes] for key, axis in self.axes.items()}
        try:
            return tuple(graphlib.TopologicalSorter(needs).static_order())
        except graphlib.CycleError as error:
            circle = " -> ".join(reversed(error.args[1]))
            raise ConfigError(f"axes: conditions go in a circle: {circle}") from None

    def is_active(self, key: str, setting: Mapping[str, Any]) -> bool:
        """Whether an axis matters beside these values of the others: an axis that is not among them
        has no value, a field that is no axis that of all trials."""
        return all(
            setting[other] in allowed
            if other in setting
            else other not in self.axes and self._fixed[other] in allowed
            for other, allowed in self.axes[key].when.items()
        )

    def combinations(self, values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        """All settings of some axes with these values of each; the first axis changes last."""
        settings: list[dict[str, Any]] = [{}]
        for key in self.order:
            settings = [
                longer
                for setting in settings
                for longer in (
                    [setting | {key: value} for value in values[key]]
                    if key in values and self.is_active(key, setting)
                    else [setting]
                )
            ]
        return [{key: s[key] for key in self.axes if key in s} for s in settings]

    @cached_property
    def _fixed(self) -> dict[str, Any]:
        return flatten(self.base)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.metric):
            raise ValueError(
                f"metric={self.metric!r}: give the plain name of a metric, e.g. fd_digits_ode"
            )
        if self.scheduler != "none" and self.rungs < 2:
            raise ValueError(
                f"scheduler={self.scheduler} compares trials between evaluations, of which "
                f"rungs={self.rungs} leaves none; use rungs=2 or more"
            )
        if self.search == "optuna" and self.seeds > 1:
            raise ValueError(
                f"search=optuna chooses by single runs, given seeds={self.seeds}; repeat the best "
                "settings in the end instead: seeds=1 and e.g. top=3 and repeats=4"
            )
        self._check_fields()
        ranges = ("uniform", "loguniform")
        if self.search == "optuna" and not any(
            axis.kind in ranges and not axis.when for axis in self.axes.values()
        ):
            raise ConfigError(
                "search=optuna: no axis is uniform or loguniform in all trials, so that it would "
                "choose settings again; use search=random or grid, which try each setting once"
            )
        if self.scheduler == "pbt":
            self._check_population()
        self._check_conditions()
        if self.search == "grid":
            for key, axis in self.axes.items():
                if axis.kind != "choice":
                    raise ValueError(
                        f"axes.{key}: search=grid needs the values of {axis.kind}="
                        f"{list(axis.values)}; give them as choice, or set search=random"
                    )
        self._check_values()
        return self

    def _check_fields(self) -> None:
        """Known fields that the sweep may change, of a base that is valid."""
        if not self.axes:
            raise ConfigError("axes: none given; write e.g. {cp.weight: {choice: [0.1, 1, 10]}}")
        for key in self.set:
            if key in GIVEN_BY_SWEEP:
                raise ConfigError(f"set.{key}: every trial has its own; leave it out")
            if key in self.axes:
                raise ConfigError(f"set.{key}: is an axis too; leave out one of them")
            self._check_no_section(f"set.{key}", key)
        _ = self.base
        for where in ("axes", "baseline"):
            for key in getattr(self, where):
                self._check_known(f"{where}.{key}", key)
                if key in GIVEN_BY_SWEEP:
                    raise ConfigError(f"{where}.{key}: every trial has its own; leave it out")
                if key.startswith(self.root.NOT_LEARNED):
                    raise ConfigError(
                        f"{where}.{key}: changes how a run is carried out or judged, not what it "
                        "learns; trials cannot be compared by it: leave it out, or give it in set"
                    )
        self._try(self.baseline, "baseline")

    def _check_population(self) -> None:
        """What population-based training needs: axes that a run can change on its way."""
        if self.search == "optuna" or self.seeds > 1:
            raise ConfigError(
                f"scheduler=pbt with search={self.search} and seeds={self.seeds}: a population "
                "starts from a grid or random settings, one run of each; repeat the best schedule "
                "in the end with top and repeats"
            )
        for key, axis in self.axes.items():
            if not key.startswith(self.root.CHANGEABLE):
                raise ConfigError(
                    f"axes.{key}: cannot change on the way of a run, as scheduler=pbt needs; use "
                    f"{', '.join(self.root.CHANGEABLE)}"
                )
            if axis.when:
                raise ConfigError(f"axes.{key}: scheduler=pbt has no conditions; leave out `when`")
            if axis.kind == "choice" and len(axis.values) < 2:
                raise ConfigError(f"axes.{key}: scheduler=pbt needs two or more choices")

    def _check_known(self, where: str, key: str) -> None:
        root, known = self.root, [name for name, _, _ in describe(self.root)]
        if key in known:
            return
        self._check_no_section(where, key)
        whole = [name for name in known if key.startswith(f"{name}.")]
        if whole:
            raise ConfigError(f"{where}: is a part of {whole[0]}; use that as a whole")
        values: Any = 0
        for part in reversed(key.split(".")):
            values = {part: values}
        try:
            build_config(root, values)
        except ConfigError as error:
            reason = str(error).removeprefix(f"{key}: ")
            raise ConfigError(f"{where}: {reason}") from None

    def _check_no_section(self, where: str, key: str) -> None:
        own = [name for name, _, _ in describe(self.root) if name.startswith(f"{key}.")]
        if own:
            raise ConfigError(f"{where}: is a section; name its fields one by one, e.g. {own[0]}")

    def _check_conditions(self) -> None:
        for key, axis in self.axes.items():
            for other, allowed in axis.when.items():
                where = f"axes.{key}: when {other}"
                self._check_known(where, other)
                if other in self.axes and self.axes[other].kind in ("uniform", "loguniform"):
                    raise ConfigError(
                        f"{where}: that is {self.axes[other].kind} and never exactly a value; "
                        "a condition is on a choice, an int or a fixed field"
                    )
                for value in allowed:
                    reason = _wrong_type(self.root, other, value)
                    if reason is not None:
                        raise ConfigError(f"{where}={value!r}: {reason}")
        _ = self.order

    def _check_values(self) -> None:
        """Every axis has a trial, and its choices or extremes are valid in the rest of the base."""
        for key, axis in self.axes.items():
            # What the axis depends on at all values that let it be, and what depends on it or on
            # these at one value each, without which a choice may not be valid.
            values = {k: a.probes[:1] for k, a in self.axes.items() if a.when}
            values |= self._values_needed(key) | {key: axis.probes}
            settings = [s for s in self.combinations(values) if key in s]
            if not settings:
                conditions = " and ".join(
                    f"{other} is {' or '.join(map(text_of, allowed))}"
                    for other, allowed in axis.when.items()
                )
                raise ConfigError(
                    f"axes.{key}: only when {conditions}, which is so in no trial; change it, or "
                    f"leave the axis out (sweep.axes.{key}=null)"
                )
            for setting in settings:
                others = {k: v for k, v in setting.items() if k != key}
                beside = f" (with {_listed(others)})" if others else ""
                self._try(setting, f"axes.{key}={text_of(setting[key])}{beside}")

    def _values_needed(self, key: str) -> dict[str, list[Any]]:
        """Values of the axes that an axis depends on, among which are all that let it be."""
        needed: dict[str, list[Any]] = {}
        for other, allowed in self.axes[key].when.items():
            if other in self.axes:
                needed |= self._values_needed(other)
                needed[other] = [value for value in allowed if self.axes[other].takes(value)]
        return needed

    def _try(self, fields: Mapping[str, Any], where: str) -> None:
        try:
            overlay(self.base, fields)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def sweep_names(folder: Path) -> list[str]:
    """Names of the sweeps in a folder."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def load_sweep(name: str, folder: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Sweep (one of `sweep_names(folder)`, or a YAML file) with overrides.

    `sweep.trials=4` changes a field of the sweep and `sweep.axes.cp.weight={choice: [1, 2]}` an
    axis, which null takes away; any other `section.field=value` is for all trials, also instead of
    an axis. A recipe that the file names as a file is relative to its folder. Raises ConfigError,
    one line, for an unknown sweep, unknown fields, and values that do not fit.
    """
    file = Path(name) if Path(name).suffix in {".yaml", ".yml"} else folder / f"{name}.yaml"
    values = _read(name, file, folder)
    recipe = values.get("recipe")
    if isinstance(recipe, str) and Path(recipe).suffix in {".yaml", ".yml"}:
        values["recipe"] = str(file.parent / recipe)
    values.setdefault("name", file.stem)
    for override in overrides:
        _apply(values, override)
    return build_config(SweepConfig, values)


def overlay(config: C, fields: Mapping[str, Any]) -> C:
    """The same configuration with other values of some of its fields, `section.field` and value.

    Raises ConfigError for values that do not fit; the fields have to be known.
    """
    values = config.model_dump()
    for key, value in fields.items():
        *sections, field = key.split(".")
        node = values
        for section in sections:
            node = node[section]
        node[field] = value
    return build_config(type(config), values)


def as_overrides(fields: Mapping[str, Any]) -> list[str]:
    """`section.field=value` as `load_config` takes them."""
    return [
        f"{key}={yaml.safe_dump([value], default_flow_style=True, width=math.inf).strip()[1:-1]}"
        for key, value in fields.items()
    ]


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={text_of(value)}" for key, value in fields.items())


def _read(name: str, file: Path, folder: Path) -> dict[str, Any]:
    if not file.is_file():
        if file.parent != folder:
            raise ConfigError(f"sweep {name}: no such file")
        known = sweep_names(folder)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        use = f"use one of {', '.join(known)}, or a .yaml file" if known else "use a .yaml file"
        raise ConfigError(f"unknown sweep '{name}'; {hint}{use}")
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"sweep {name}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"sweep {name}: must be a mapping of fields, not {values!r}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"'{override}' is not an override; write section.field=value for all trials, or "
            "sweep.field=value"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: '{text}' is not a YAML value") from None
    if key.startswith("sweep."):
        key = key.removeprefix("sweep.")
        name, _, entry = key.partition(".")
        if entry and name in _MAPPINGS:
            _put(values, name, entry, value)
        else:
            values[key] = value
    else:
        _put(values, "set", key, value)
        if isinstance(values.get("axes"), dict):
            values["axes"] = {k: v for k, v in values["axes"].items() if k != key}


def _put(values: dict[str, Any], name: str, entry: str, value: Any) -> None:
    """An entry of `set`, `axes` or `baseline`; null takes an axis away."""
    entries = values.get(name) or {}
    if not isinstance(entries, dict):
        raise ConfigError(f"{name}={entries!r}: must be a mapping of fields")
    values[name] = {k: v for k, v in entries.items() if k != entry}
    if name != "axes" or value is not None:
        values[name][entry] = value


def _wrong_type(root: type[Section], key: str, value: Any) -> str | None:
    """Why a field can never have a value, whatever the others have; None if it can."""
    section = root
    *sections, name = key.split(".")
    for part in sections:
        section = type(section.model_fields[part].default)
    field = section.model_fields[name]
    kind: Any = Annotated[field.annotation, field]
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        return f"{message[0].lower()}{message[1:]}"
    return None
