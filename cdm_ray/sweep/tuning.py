"""The part of a sweep that Ray Tune does: which trials run when, and which of them end early."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from cdm_ray import cluster
from cdm_ray.config import SweepConfig
from cdm_ray.storage import AnyPath
from cdm_ray.sweep.live import LiveTable
from cdm_ray.sweep.population import Population, member_name, run_member
from cdm_ray.sweep.settings import setting_key
from cdm_ray.sweep.space import Setting, to_optuna
from cdm_ray.sweep.trials import GIVEN, RUNG, Course, TrialPlan, given_of, run_name, run_trial

Pair = tuple[Setting, int]
"""A setting and a seed."""


class Ended(NamedTuple):
    """A trial that Tune has ended."""

    course: Course
    setting: Setting
    """What it was to begin with; a member of a population has another one in the end."""
    seed: int
    error: str | None


TRIAL_RESOURCES = {"CPU": 0.0, "memory": 2.0**30}
"""Of the process of a trial, which starts its workers and waits: no CPU, 1 GiB."""


def tune_pairs(
    plan: TrialPlan, folder: AnyPath, at_once: int, pairs: Sequence[Pair], *, prune: bool
) -> list[Ended]:
    """Run these trials, or what a stopped sweep left of them; returns how they ended."""
    halving = prune and plan.sweep.scheduler == "asha"
    options = {
        "scheduler": SuccessiveHalving(plan) if halving else FIFOScheduler(),
        "max_concurrent_trials": at_once,
        "metric": plan.sweep.metric,
        "mode": plan.sweep.mode,
    }
    trials = _fit(plan, folder, run_trial, {GIVEN: tune.grid_search(list(pairs))}, options)
    return [_ended(plan, trial, run_name(*given_of(trial.config))) for trial in trials]


def tune_population(plan: TrialPlan, folder: AnyPath, pairs: Sequence[Pair]) -> list[Ended]:
    """Run a population that starts from these settings; returns how its members ended.

    Members whose workers find no room wait for that: Tune would count a member that it has paused
    at a rung as one that runs.
    """
    options = {"scheduler": Population(plan.sweep)}
    trials = _fit(plan, folder, run_member, {GIVEN: tune.grid_search(list(pairs))}, options)
    return [_ended(plan, trial, member_name(trial.trial_id)) for trial in trials]


def tune_search(plan: TrialPlan, folder: AnyPath, at_once: int) -> list[Ended]:
    """Run trials whose settings Optuna chooses; returns how they ended."""
    halving = plan.sweep.scheduler == "asha"
    options = {
        "scheduler": SuccessiveHalving(plan) if halving else FIFOScheduler(),
        "max_concurrent_trials": at_once,
        "num_samples": plan.sweep.trials,
        "search_alg": optuna_search(plan.sweep),  # which knows the metric
    }
    trials = _fit(plan, folder, run_trial, None, options)
    return [_ended(plan, trial, run_name(*given_of(trial.config))) for trial in trials]


def optuna_search(sweep: SweepConfig) -> Searcher:
    """Optuna's tree-structured Parzen estimator (TPE) on the sweep's space."""
    from optuna.samplers import TPESampler
    from ray.tune.search.optuna import OptunaSearch

    few = max(1, sweep.trials // 4)  # random ones, before the sampler has something to go by
    return OptunaSearch(
        space=to_optuna(sweep),
        metric=sweep.metric,
        mode=sweep.mode,
        sampler=TPESampler(seed=sweep.seed, n_startup_trials=few),
    )


def _fit(
    plan: TrialPlan,
    folder: AnyPath,
    work: Callable[..., None],
    space: dict[str, Any] | None,
    options: dict[str, Any],
) -> list[Any]:
    """Tune's trials after they have ended."""
    sweep, api = plan.sweep, cast(Any, tune)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # prints a table of its own otherwise, verbose or not
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # which would return as if all were done
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # warns of every slow start on a laptop
    trainable = tune.with_resources(partial(work, plan=plan), TRIAL_RESOURCES)
    place, files = cluster.ray_storage(folder)
    parent, _ = cluster.ray_storage(folder.parent)
    if api.Tuner.can_restore(place, storage_filesystem=files):
        tuner = api.Tuner.restore(
            place,
            trainable=trainable,
            storage_filesystem=files,
            param_space=space,
            resume_unfinished=True,
            restart_errored=True,
        )
    else:
        tuner = api.Tuner(
            trainable,
            param_space=space,
            tune_config=api.TuneConfig(
                trial_dirname_creator=lambda trial: trial.trial_id, **options
            ),
            run_config=api.RunConfig(
                name=folder.name,
                storage_path=parent,
                storage_filesystem=files,
                failure_config=api.FailureConfig(max_failures=sweep.base.ray.max_failures),
                verbose=0,
                callbacks=[LiveTable(sweep.metric, sweep.mode, sweep.rungs)],
            ),
        )
    tuner.fit()
    # Its results have no configuration where a trial never reported.
    trials = api.ExperimentAnalysis(place, storage_filesystem=files).trials
    return sorted(trials, key=lambda trial: trial.trial_id)


def _ended(plan: TrialPlan, trial: Any, name: str) -> Ended:
    setting, seed = given_of(trial.config)
    course = Course.load(plan.course_file(name))
    return Ended(course, setting, seed, _told(trial.get_pickled_error()))


def _told(error: Exception | None) -> str | None:
    """In one line, what made a trial fail for good."""
    if error is None:
        return None
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


class SuccessiveHalving(ASHAScheduler):
    """ASHA (Li et al. 2020) among the rivals of the baseline, which is what the best of them is
    compared with and runs to its end; it knows what was reported before the sweep was stopped and
    continued."""

    def __init__(self, plan: TrialPlan) -> None:
        rungs = plan.sweep.rungs
        first = max(1, min(rungs - 1, round(plan.sweep.grace * rungs)))
        super().__init__(time_attr=RUNG, max_t=rungs, grace_period=first, reduction_factor=2)
        self._plan = plan

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        name = run_name(*given_of(trial.config))
        for rung, value in Course.load(self._plan.course_file(name)).reports:
            self._decide(tune_controller, trial, {RUNG: rung, self._plan.sweep.metric: value})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._decide(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if self._is_baseline(trial):
            self.on_trial_remove(tune_controller, trial)
        else:
            super().on_trial_complete(tune_controller, trial, result)

    def _decide(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if self._is_baseline(trial):
            return TrialScheduler.CONTINUE
        decision = super().on_trial_result(tune_controller, trial, result)
        whole = result[RUNG] >= self._plan.sweep.rungs  # ends by itself, in order
        return TrialScheduler.CONTINUE if whole else decision

    def _is_baseline(self, trial: Any) -> bool:
        setting: Mapping[str, Any] = given_of(trial.config)[0]
        return setting_key(setting) == setting_key(self._plan.sweep.baseline)
