"""A sweep: trials through Ray Tune, then the summary of what they found."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from cdm_ray import cluster
from cdm_ray.config import ImageConfig, JobConfig, RayConfig, SweepConfig, flatten
from cdm_ray.data.prepare import ensure_prepared
from cdm_ray.errors import ConfigError, RunFailed
from cdm_ray.report import pace_before
from cdm_ray.storage import AnyPath, check_writable, matching, path_of
from cdm_ray.sweep.metrics import check_metric
from cdm_ray.sweep.record import record_sweep
from cdm_ray.sweep.space import settings
from cdm_ray.sweep.summary import Status, TrialResult, summarise
from cdm_ray.sweep.trials import COURSE_FILE, Course, TrialPlan
from cdm_ray.sweep.tuning import Ended, Pair, tune_pairs, tune_population, tune_search
from cdm_ray.tracking import EndStatus, end_run_of, finish_run, open_run

TRIALS = "trials"
"""Folder of the trials' run folders, in that of the sweep."""


def sweep_folder(sweep: SweepConfig) -> AnyPath:
    """Where a sweep lies: the same configuration, the same folder."""
    identity = json.dumps(sweep.model_dump(mode="json") | {"name": ""}, sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return sweep.base.storage / f"{sweep.name}-{digest[:8]}"


def run_sweep(sweep: SweepConfig) -> AnyPath:
    """Run all trials, or go on with those that are missing, and write what they found.

    Returns the sweep's folder. Ray must be initialised. Raises ConfigError for a user's mistake,
    resources that the cluster does not have among them, and RunFailed if no trial finished.
    """
    check_metric(sweep)
    base, folder = sweep.base.resolved(), sweep_folder(sweep)
    at_once = trials_at_once(base)
    if isinstance(base, ImageConfig):
        ensure_prepared(base.data, cluster.map_tasks)
    check_writable(base.storage, "run.storage")
    parent = open_run(sweep, storage=base.storage, run_name=folder.name, run_folder=folder)
    plan = TrialPlan(sweep, str(folder / TRIALS), _places(sweep.base, base), parent)
    status: EndStatus = "FAILED"
    try:
        results = _search(plan, folder, at_once)
        if sweep.top:
            results += _repeat_best(plan, folder, at_once, results)
        summary = summarise(results, metric=sweep.metric, mode=sweep.mode, baseline=sweep.baseline)
        record_sweep(sweep, summary, folder, parent)
        if summary.best is None:
            raise RunFailed(f"{folder}: {summary.verdict}; {_first_failure(results)}")
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        for file in matching(folder / TRIALS, f"*/{COURSE_FILE}"):
            course = Course.load(file)
            if not course.has_ended(sweep.rungs):
                end_run_of(folder / TRIALS / course.run, parent, "KILLED")
        raise
    finally:
        finish_run(parent, status)
    return folder


def trials_at_once(config: JobConfig) -> int:
    """How many trials have room in the cluster; raises ConfigError if not one has."""
    needed, room = config.ray.workers, cluster.room_for_workers(config.ray)
    if room < needed:
        raise ConfigError(
            f"ray.workers={needed}: a trial needs {needed} workers with {_each(config.ray)}, the "
            f"cluster has room for {room} ({cluster.room_told()}); use fewer or smaller workers"
        )
    return room // needed


def planned(sweep: SweepConfig) -> list[Pair]:
    """The trials of a grid or random search, the baseline's first."""
    return [(setting, seed) for setting in settings(sweep) for seed in range(sweep.seeds)]


def _each(ray: RayConfig) -> str:
    gpus = f" and {ray.gpus_per_worker:g} GPU" if cluster.uses_gpu(ray) else ""
    return f"{ray.cpus_per_worker:g} CPU{gpus} each"


def _search(plan: TrialPlan, folder: AnyPath, at_once: int) -> list[TrialResult]:
    tuned, sweep = folder / "tune", plan.sweep
    if sweep.search == "optuna":
        trials = tune_search(plan, tuned, at_once)
    elif sweep.scheduler == "pbt":
        baseline, *members = planned(sweep)
        alone = folder / "tune-baseline"
        trials = tune_pairs(plan, alone, at_once, [baseline], prune=False)
        trials += tune_population(plan, tuned, members)
    else:
        trials = tune_pairs(plan, tuned, at_once, planned(sweep), prune=True)
    return [_result(plan, trial) for trial in trials]


def _repeat_best(
    plan: TrialPlan, folder: AnyPath, at_once: int, found: list[TrialResult]
) -> list[TrialResult]:
    """The best settings and the baseline with further seeds, to the end of each run."""
    sweep = plan.sweep
    summary = summarise(found, metric=sweep.metric, mode=sweep.mode, baseline=sweep.baseline)
    ranked = [row.setting for row in summary.rows if row.rank is not None and not row.is_baseline]
    chosen = [dict(sweep.baseline), *map(dict, ranked[: sweep.top])]
    pairs = [(s, sweep.seeds + extra) for s in chosen for extra in range(sweep.repeats)]
    trials = tune_pairs(plan, folder / "tune-repeats", at_once, pairs, prune=False)
    return [_result(plan, trial) for trial in trials]


def _result(plan: TrialPlan, ended: Ended) -> TrialResult:
    sweep, course = plan.sweep, ended.course
    failure = course.failure or ended.error
    run_folder = path_of(plan.storage) / course.run
    status: Status = "pruned"
    if course.is_finished(sweep.rungs):
        status, failure = "finished", None
    elif failure is not None:
        status = "failed"
    else:
        end_run_of(run_folder, plan.parent, "KILLED")
    devices = cluster.devices(sweep.base.ray)
    _, training = pace_before(run_folder)
    return TrialResult(
        setting=course.setting or ended.setting,
        seed=ended.seed,
        status=status,
        metric=course.metrics.get(sweep.metric),
        metrics=course.metrics,
        steps=course.step,
        device_seconds=None if training is None else training * devices,
        held_seconds=course.seconds * devices,
        run=course.run,
        failure=failure,
    )


def _first_failure(results: list[TrialResult]) -> str:
    return next((t.failure for t in results if t.failure is not None), "all were pruned")


def _places(given: JobConfig, resolved: JobConfig) -> dict[str, Any]:
    """Fields whose local paths became absolute, but for the trials' own storage and name."""
    before, after = flatten(given), flatten(resolved)
    own = ("run.storage", "run.name")
    return {k: v for k, v in after.items() if v != before[k] and k not in own}
