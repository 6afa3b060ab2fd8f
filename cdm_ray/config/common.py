"""What the configurations of all kinds of runs share."""

from __future__ import annotations

import hashlib
import json
import re
from abc import abstractmethod
from functools import cached_property
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from cdm_ray.config.base import Positive, Section
from cdm_ray.config.loading import build_config, flatten, set_field
from cdm_ray.config.schedule import Change
from cdm_ray.errors import ConfigError
from cdm_ray.storage import AnyPath, absolute, path_of


class RunConfig(Section):
    name: str | None = None
    """Name of the run and of its folder; by default the recipe and a digest of the configuration,
    so that the same command continues the same run."""
    storage: str = "runs"
    """Folder that holds the run folders and the default MLflow database; shared by all nodes. Or a
    URL that fsspec knows, such as s3://BUCKET/runs, with the database elsewhere."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random: weights, data order, noise."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"'{name}' is no folder name; use letters, digits, '.', '_' and '-'")
        return name


class TrainConfig(Section):
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on GPUs, fp32 on CPUs. Master weights are fp32 always."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards: nothing, optimizer state, + gradients, + weights."""
    log_every: Annotated[int, Field(ge=1)] = 50
    """Steps between two records of loss, speed and gradient norm."""
    max_nonfinite_in_row: Annotated[int, Field(ge=1)] = 50
    """Steps with non-finite gradients are skipped and counted; this many in a row stop the run."""


class OptimizerConfig(Section):
    lr: Positive = 1e-3
    """Largest learning rate of Adam."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Adam moment decays."""
    eps: Positive = 1e-8
    """Adam denominator offset."""
    clip_norm: Positive | None = None
    """Largest global gradient norm; None: no clipping, as in EDM."""


class CheckpointConfig(Section):
    keep_last: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints that are kept."""


class RayConfig(Section):
    workers: Annotated[int, Field(ge=1)] = 2
    """Training workers."""
    address: str | None = None
    """Ray cluster to join; None: that of RAY_ADDRESS, else a local one that ends with the job."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU per worker; auto: if the cluster has any."""
    cpus_per_worker: Positive = 1
    """CPUs reserved for each worker."""
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = 1.0
    """GPU share of each worker, where it uses any; a part lets several runs of one worker share a
    GPU, as trials of a sweep may."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts from the newest checkpoint after a worker or node is lost."""

    @model_validator(mode="after")
    def _gpus(self) -> Self:
        if self.gpus_per_worker < 1 and self.workers > 1:
            raise ValueError(
                f"gpus_per_worker={self.gpus_per_worker:g} with workers={self.workers}: NCCL needs "
                "a GPU for each worker of a run; use workers=1, or gpus_per_worker=1"
            )
        return self


class TrackingConfig(Section):
    uri: str | None = None
    """MLflow tracking server; None: MLFLOW_TRACKING_URI, else sqlite in `run.storage`, if that is
    no URL."""
    experiment: str = "cdm_ray"
    """MLflow experiment."""


class JobConfig(Section):
    """Configuration of a training run, whatever it trains."""

    JOB: ClassVar[str]
    """The job that trains it."""
    RECIPES: ClassVar[str]
    """Folder of its recipes in `cdm_ray/recipes`, empty for that itself."""
    NOT_LEARNED: ClassVar[tuple[str, ...]]
    """Sections and fields that change how a run is carried out or judged, not what it learns: they
    are no part of its identity, and may differ when a run is continued."""
    LENGTH: ClassVar[str]
    """The field that says how long it trains."""
    CHANGEABLE: ClassVar[tuple[str, ...]]
    """Sections and fields that `schedule` may change."""

    recipe: str = "custom"
    """Name of the recipe that the run started from."""
    run: RunConfig = RunConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    ray: RayConfig = RayConfig()
    tracking: TrackingConfig = TrackingConfig()
    schedule: tuple[Change, ...] = ()
    """Fields that change on the way, e.g. [{after: 20M, set: {cp.weight: 3, optimizer.lr: 5e-4}}]:
    from the first step that begins after so many images (of bridges: iterations) until another
    entry changes them again. optimizer.lr and the fields of ema and of dsm and cp (of bridges:
    control) can; CP cannot be turned on or off."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    @abstractmethod
    def checkpoint_steps(self) -> int:
        """Optimizer steps between two checkpoints."""

    @property
    @abstractmethod
    def evaluation_steps(self) -> range:
        """Steps after which the averaged weights are evaluated while training goes on; the last
        step has its evaluation anyway."""

    @abstractmethod
    def first_step(self, count: int) -> int:
        """The first optimizer step that begins after so much of the run, counted as `LENGTH` is."""

    @abstractmethod
    def count_at(self, step: int) -> int:
        """How much of the run lies before an optimizer step, counted as `LENGTH` is."""

    @property
    @abstractmethod
    def length_field(self) -> str | None:
        """`LENGTH`, if a run may be continued to another length: not where its course depends on
        the length."""

    @cached_property
    def segments(self) -> dict[int, Self]:
        """The parts of the run between the changes of `schedule`: the first optimizer step of each,
        in order, and the configuration in effect, whose own schedule is empty.

        Raises ConfigError, which names the entry, for one that is not valid.
        """
        values = self.model_dump() | {"schedule": ()}
        parts = {0: build_config(type(self), values)}
        for index, change in enumerate(self.schedule):
            try:
                for key, value in change.set.items():
                    set_field(values, key, value)
                parts[self.first_step(change.after)] = build_config(type(self), values)
            except ConfigError as error:
                raise ConfigError(f"schedule.{index}: {error}") from None
        return parts

    def segment_at(self, step: int) -> int:
        """Which of `segments` an optimizer step is in."""
        return max(first for first in self.segments if first <= step)

    def at(self, step: int) -> Self:
        """The configuration in effect at an optimizer step, whose own schedule is empty."""
        return self.segments[self.segment_at(step)]

    def __copy__(self) -> Self:
        """Without what was derived from the fields: the copy may be given others."""
        copied = super().__copy__()
        copied.__dict__.pop("segments", None)
        return copied

    @property
    def run_name(self) -> str:
        """`run.name`, or the recipe and a digest of everything that changes the result."""
        if self.run.name is not None:
            return self.run.name
        identity = self.learned()
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return f"{self.recipe}-{digest[:8]}"

    @property
    def storage(self) -> AnyPath:
        """Folder of the run folders, absolute; raises ConfigError for a URL that cannot be used."""
        try:
            return path_of(self.run.storage).absolute()
        except ConfigError as error:
            raise ConfigError(f"run.storage={error}") from None

    @property
    def run_folder(self) -> AnyPath:
        """Folder of this run, absolute; raises ConfigError as `storage` does."""
        return self.storage / self.run_name

    def learned(self) -> dict[str, Any]:
        """`section.field` and value of everything that changes what the run learns."""
        return {k: v for k, v in flatten(self).items() if not k.startswith(self.NOT_LEARNED)}

    def changed_from(self, before: Self) -> dict[str, str]:
        """What has been learned otherwise: `section.field` and a text with both values."""
        was, now = before.learned(), self.learned()
        return {key: f"{key} was {was[key]}, is {now[key]}" for key in now if was[key] != now[key]}

    def resolved(self) -> Self:
        """The same with the run's name fixed and every local path absolute, so that a worker with
        another working directory reads it alike."""
        values = self.model_dump()
        values["run"] |= {"name": self.run_name, "storage": absolute(self.run.storage)}
        return type(self).model_validate(values)

    def _check_schedule(self) -> None:
        """After everything else is known to be valid; makes equal values of `schedule` the same."""
        if not self.schedule:
            return
        before = 0
        for index, change in enumerate(self.schedule):
            where = f"schedule.{index}: after={change.after}"
            first = self.first_step(change.after)
            if first <= before:
                raise ConfigError(
                    f"{where} is not at least a step later than the entry before; put the entries "
                    "in increasing order"
                )
            if first >= self.steps:
                raise ConfigError(
                    f"{where} is not before the last step of {self.LENGTH}="
                    f"{attrgetter(self.LENGTH)(self)}; leave the entry out, or train longer"
                )
            for key in change.set:
                if not key.startswith(self.CHANGEABLE):
                    raise ConfigError(
                        f"schedule.{index}: {key} cannot change on the way; use "
                        f"{', '.join(f'{k}*' if k.endswith('.') else k for k in self.CHANGEABLE)}"
                    )
            before = first
        checked = [flatten(part) for part in list(self.segments.values())[1:]]
        schedule = tuple(
            Change(after=change.after, set={key: fields[key] for key in change.set})
            for change, fields in zip(self.schedule, checked, strict=True)
        )
        object.__setattr__(self, "schedule", schedule)
