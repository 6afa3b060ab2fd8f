"""A trial of a sweep: a real run of one setting with one seed, which reports at every rung."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ray import tune

from cdm_ray.config import BridgeConfig, ImageConfig, JobConfig, SweepConfig
from cdm_ray.config.sweeps import overlay
from cdm_ray.errors import ConfigError, RunFailed
from cdm_ray.storage import AnyPath, path_of, write_whole
from cdm_ray.sweep.settings import show_setting
from cdm_ray.sweep.space import Setting, trial_config, trial_name
from cdm_ray.tracking import RunHandle, end_run_of
from cdm_ray.training.surroundings import Surroundings

GIVEN, RUNG = "given", "rung"
NEXT = "next"
"""Parameter of a member of a population that goes on from the checkpoint of another one: its own
values of the axes."""
COURSE_FILE = "trial.json"
LONGEST_NAME = 100
RECORDS = 20
"""Records of a trial's losses and speed at least, so that its speed is known."""


@dataclass(frozen=True)
class TrialPlan:
    """All that a trial needs to know beside its setting and seed."""

    sweep: SweepConfig
    storage: str
    """Folder of the trials' run folders."""
    places: dict[str, Any]
    """Fields of all trials that say where things are, as absolute paths."""
    parent: RunHandle
    """The MLflow run of the sweep; trials are recorded where it is."""

    def config(self, setting: Mapping[str, Any], seed: int, name: str | None = None) -> JobConfig:
        """Configuration of a trial, with an evaluation and a checkpoint at every rung."""
        config = trial_config(self.sweep.root, self.sweep, setting, seed)
        name = name or run_name(setting, seed)
        own = {"run.storage": self.storage, "run.name": name}
        return overlay(config, self.places | own | _rungs(self.sweep, config))

    def course_file(self, name: str) -> AnyPath:
        """Where a trial of that name keeps what it has reported."""
        return path_of(self.storage) / name / COURSE_FILE


def given_of(parameters: Mapping[str, Any]) -> tuple[Setting, int]:
    """Setting and seed from what Tune gives a trial: a pair of both, or a setting alone."""
    if GIVEN in parameters:
        setting, seed = parameters[GIVEN]
        return setting, seed
    return dict(parameters), 0


def shown_of(parameters: Mapping[str, Any]) -> str:
    """What a trial tries now, and its seed, for people."""
    setting, seed = given_of(parameters)
    return f"{show_setting(parameters.get(NEXT) or setting)} (seed {seed})"


def run_trial(parameters: Mapping[str, Any], *, plan: TrialPlan) -> None:
    """What Ray Tune runs: the whole run of a setting, from where it was stopped before."""
    setting, seed = given_of(parameters)
    config = plan.config(setting, seed)
    course = Course.load(plan.course_file(config.run_name))
    course.start(setting, config.run_name)
    carry_out(plan, config, course, lambda _, metrics: tune.report(metrics))


def carry_out(
    plan: TrialPlan,
    config: JobConfig,
    course: Course,
    report: Callable[[int, dict[str, float]], None],
) -> None:
    """Train and evaluate as configured; `report(step, metrics)` to Tune at every rung.

    A run that ends with an error which it would only repeat is a result; any other exception is
    Tune's, which starts the trial again.
    """
    sweep, begun = plan.sweep, time.monotonic() - course.seconds

    def watch(step: int, metrics: dict[str, float]) -> None:
        rung = _rung(config, step, sweep.rungs)
        if rung <= course.rung < sweep.rungs:  # stopped before it took notice of its own report
            return
        course.add(rung, step, metrics, metrics[sweep.metric], time.monotonic() - begun)
        report(step, {RUNG: rung, sweep.metric: metrics[sweep.metric]})

    if course.is_finished(sweep.rungs):  # the sweep was stopped before it took notice
        end_run_of(config.run_folder, plan.parent, "FINISHED")
        report(course.step, {RUNG: course.rung, sweep.metric: course.metrics[sweep.metric]})
        return
    # Not as tracking.uri: a configuration is written down, and this may hold a password.
    os.environ["MLFLOW_TRACKING_URI"] = plan.parent.uri
    around = Surroundings(watch=watch, parent=plan.parent.run_id, shares_cluster=True)
    try:
        if isinstance(config, ImageConfig):
            from cdm_ray.training.image_run import run_images  # late: seconds of imports each

            run_images(config, around)
        elif isinstance(config, BridgeConfig):
            from cdm_ray.training.bridge_run import run_bridge

            run_bridge(config, around)
    except (RunFailed, ConfigError) as error:
        course.fail(str(error), time.monotonic() - begun)
        # Tune wants a value from every trial; NaN is never good.
        tune.report({RUNG: sweep.rungs, sweep.metric: math.nan})


@dataclass
class Course:
    """What a trial has reported, over all of its launches; kept in its file."""

    file: AnyPath
    setting: Setting = field(default_factory=dict)
    run: str = ""
    """Name of its run."""
    rung: int = 0
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the newest evaluation."""
    reports: list[tuple[int, float]] = field(default_factory=list)
    """Rung and deciding metric of each evaluation."""
    seconds: float = 0.0
    """From its start to the newest report, the time in which it was stopped left out."""
    failure: str | None = None

    @classmethod
    def load(cls, file: AnyPath) -> Self:
        """A new one if there is none."""
        return cls(file, **json.loads(file.read_text()) if file.is_file() else {})

    def start(self, setting: Setting, run: str) -> None:
        """What it trains with from here on; a failure before is given another chance."""
        self.setting, self.run, self.failure = setting, run, None
        self._save()

    def add(
        self, rung: int, step: int, metrics: dict[str, float], metric: float, seconds: float
    ) -> None:
        """The newest evaluation; it takes the place of one of the same rung or later ones."""
        self.rung, self.step, self.metrics, self.seconds = rung, step, metrics, seconds
        self.reports = [(r, v) for r, v in self.reports if r < rung] + [(rung, metric)]
        self._save()

    def fail(self, failure: str, seconds: float) -> None:
        self.failure, self.seconds = failure, seconds
        self._save()

    def is_finished(self, rungs: int) -> bool:
        return self.failure is None and self.rung == rungs

    def has_ended(self, rungs: int) -> bool:
        """Whether it ended by itself, well or not."""
        return self.failure is not None or self.rung == rungs

    def _save(self) -> None:
        content = {name: value for name, value in vars(self).items() if name != "file"}
        write_whole(self.file, json.dumps(content).encode())


def run_name(setting: Mapping[str, Any], seed: int) -> str:
    """Name of a trial's run and folder, such as cp.weight_0.3-seed0."""
    whole = trial_name(setting)
    plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in whole.replace(",", "-"))
    if len(plain) > LONGEST_NAME:
        plain = f"{plain[:LONGEST_NAME]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return f"{plain}-seed{seed}"


def _rungs(sweep: SweepConfig, config: JobConfig) -> dict[str, Any]:
    """Fields that make a run evaluate at every rung, as evenly as it can, write a checkpoint there
    or more often, and record its speed."""
    fields: dict[str, Any] = {
        "train.log_every": min(config.train.log_every, max(1, config.steps // RECORDS))
    }
    exactly = sweep.scheduler == "pbt"  # others go on from the checkpoints of the rungs
    if exactly:
        fields["checkpoint.keep_last"] = sweep.rungs + 1
    if isinstance(config, ImageConfig):
        images = math.ceil(config.steps / sweep.rungs) * config.train.batch
        often = images if exactly else min(images, config.checkpoint.every_images)
        return fields | {"checkpoint.every_images": often, "eval.every_kimg": images / 1000}
    assert isinstance(config, BridgeConfig)
    iterations = math.ceil(config.train.iterations / sweep.rungs)
    often = iterations if exactly else min(iterations, config.checkpoint.every_iterations)
    return fields | {
        "checkpoint.every_iterations": often,
        "eval.every_iterations": iterations,
    }


def _rung(config: JobConfig, step: int, rungs: int) -> int:
    """Which evaluation of the run that of a step is, from 1."""
    return rungs if step == config.steps else 1 + config.evaluation_steps.index(step)
