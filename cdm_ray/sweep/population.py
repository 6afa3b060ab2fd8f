"""Population-based training (Jaderberg et al. 2017) through Ray Tune.

At every rung the worst quarter of the population goes on from checkpoints of the best quarter, with
other values of the axes. What a member has trained with in the end is therefore a schedule, which
is a field of the configuration (`schedule`) like any other: its result is an ordinary setting.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from cdm_ray.checkpoint import CHECKPOINTS, checkpoint_name
from cdm_ray.config import JobConfig, SweepConfig
from cdm_ray.storage import copy_folder, path_of
from cdm_ray.sweep.settings import setting_key
from cdm_ray.sweep.space import Setting, mutated
from cdm_ray.sweep.trials import GIVEN, NEXT, RUNG, Course, TrialPlan, carry_out
from cdm_ray.tracking import end_run_of

FORK_FILE = "fork.json"


@dataclass(frozen=True)
class Fork:
    """Where a member was at a rung: what a Tune checkpoint of it holds."""

    member: str
    setting: Setting
    """All that it was trained with, its schedule included."""
    next: Setting | None
    """The parameter NEXT that led to it."""
    count: int
    """How much of the run was done, counted as its length is."""
    checkpoint: str
    """Folder of the checkpoint of that step."""

    @classmethod
    def load(cls, checkpoint: tune.Checkpoint | None) -> Self | None:
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            return cls(**json.loads(Path(folder, FORK_FILE).read_text()))

    def report(self, metrics: dict[str, Any]) -> None:
        """Report to Tune with itself as the checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, FORK_FILE).write_text(json.dumps(asdict(self)))
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def member_name(trial_id: str) -> str:
    """Such as member-00002, in a sweep that is continued too."""
    return f"member-{trial_id.rpartition('_')[2]}"


def setting_of(parameters: Mapping[str, Any], fork: Fork | None, member: str) -> Setting:
    """What a member trains with from here on, given where its last checkpoint comes from."""
    following: Setting | None = parameters.get(NEXT)
    if fork is None:
        return dict(parameters[GIVEN][0])
    if following is None or (fork.member, fork.next) == (member, following):
        return fork.setting
    change = {"after": fork.count, "set": following}
    return fork.setting | {"schedule": [*fork.setting.get("schedule", []), change]}


def run_member(parameters: Mapping[str, Any], *, plan: TrialPlan) -> None:
    """What Ray Tune runs: a member, from its last checkpoint or from that of another one."""
    member = member_name(tune.get_context().get_trial_id())
    fork = Fork.load(tune.get_checkpoint())
    setting = setting_of(parameters, fork, member)
    digest = hashlib.sha256(setting_key(setting).encode()).hexdigest()[:8]
    config = plan.config(setting, parameters[GIVEN][1], f"{member}-{digest}")
    course = Course.load(plan.course_file(member))
    if course.run not in ("", config.run_name):  # it was behind, and is given up
        end_run_of(path_of(plan.storage) / course.run, plan.parent, "KILLED")
    course.start(setting, config.run_name)
    if fork is not None:
        _continue_from(fork, config)

    def report(step: int, metrics: dict[str, float]) -> None:
        checkpoint = config.run_folder / CHECKPOINTS / checkpoint_name(step)
        count = config.count_at(step)
        Fork(member, setting, parameters.get(NEXT), count, str(checkpoint)).report(metrics)

    carry_out(plan, config, course, report)


def _continue_from(fork: Fork, config: JobConfig) -> None:
    """Give a run the checkpoint that it goes on from, unless it has gone on already."""
    source = path_of(fork.checkpoint)
    target = config.run_folder / CHECKPOINTS / source.name
    if not target.is_dir():
        copy_folder(source, target)


class Population(PopulationBasedTraining):
    """Synchronous: a member waits for the others at each rung, so that the outcome does not depend
    on how many of them run at once."""

    def __init__(self, sweep: SweepConfig) -> None:
        super().__init__(
            time_attr=RUNG,
            metric=sweep.metric,
            mode=sweep.mode,
            perturbation_interval=1,
            custom_explore_fn=_Explore(sweep),
            log_config=False,
            synch=True,
        )
        self._rungs = sweep.rungs

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result[RUNG] >= self._rungs:  # ends by itself, in order
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)


class _Explore:
    """Parameters of the donor to those of the trial that goes on from its checkpoint."""

    def __init__(self, sweep: SweepConfig) -> None:
        self._sweep, self._rng = sweep, np.random.default_rng(sweep.seed)

    def __call__(self, parameters: dict[str, Any]) -> dict[str, Any]:
        now = parameters.get(NEXT) or parameters[GIVEN][0]
        return parameters | {NEXT: mutated(self._sweep, now, self._rng)}
