"""Evaluation of a checkpoint: where its data, its caches and its results lie, and what it costs."""

from __future__ import annotations

from cdm_ray.checkpoint import EMA, Checkpoint
from cdm_ray.config import ImageConfig
from cdm_ray.data.manifest import check_matches
from cdm_ray.data.prepare import ensure_prepared
from cdm_ray.evaluation.evaluate import evaluate
from cdm_ray.evaluation.features import FEATURE_DIMS
from cdm_ray.evaluation.generate import KINDS, num_evaluations
from cdm_ray.evaluation.plan import plan
from cdm_ray.evaluation.results import EvaluationResult
from cdm_ray.evaluation.tasks import MapTasks
from cdm_ray.storage import AnyPath

EVALUATIONS = "evaluation"
"""Folder of the evaluations inside a run's folder."""


def evaluation_folder(run_folder: AnyPath, checkpoint_name: str) -> AnyPath:
    """Where the evaluations of a checkpoint lie."""
    return run_folder / EVALUATIONS / checkpoint_name


def evaluate_checkpoint(
    config: ImageConfig, checkpoint: Checkpoint, map_tasks: MapTasks
) -> EvaluationResult:
    """Evaluate the averaged weights of a checkpoint.

    Results go to `evaluation_folder`, and features of the data set to `reference/` beside the run,
    where its training looks for them too. Raises ConfigError when data, extractor, reference and
    weights do not fit together.
    """
    config = config.resolved()
    manifest = ensure_prepared(config.data, map_tasks)
    check_matches(manifest, config)
    return evaluate(
        config,
        checkpoint.tensors(EMA),
        manifest,
        cache_folder=checkpoint.run_folder.parent / "reference",
        out_folder=evaluation_folder(checkpoint.run_folder, checkpoint.name),
        map_tasks=map_tasks,
    )


def print_plan(config: ImageConfig, checkpoint: Checkpoint) -> None:
    """What `evaluate_checkpoint` would do, if nothing of it is finished."""
    evaluation, seeds = config.eval, config.eval.first_seeds
    dim = FEATURE_DIMS[evaluation.extractor]
    images = evaluation.images * len(seeds)
    evaluations = {kind: images * num_evaluations(config.sampler, kind) for kind in KINDS}
    each = ", ".join(f"{num_evaluations(config.sampler, kind)} ({kind})" for kind in KINDS)
    ranges = ", ".join(f"{first:,}-{first + evaluation.images - 1:,}" for first in seeds)
    print(f"checkpoint  {checkpoint.folder}, averaged weights")
    print(f"images      {images:,} by each of {' and '.join(KINDS)}, from the seeds {ranges}")
    print(f"cost        {sum(evaluations.values()):,} network evaluations, per image {each}")
    print(f"tasks       {len(plan(config, evaluation.drift_images))}, finished ones survive a kill")
    print(
        f"features    {4 * dim * images * len(KINDS):,} bytes on disk until the numbers are there"
    )
    print(f"results     {evaluation_folder(checkpoint.run_folder, checkpoint.name)}")
