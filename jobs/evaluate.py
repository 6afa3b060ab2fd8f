"""Evaluate a checkpoint's averaged weights: FID, KID, precision, recall, drift and samples of an
image run; KL where the truth is known, importance weights and figures of a bridge."""

import json
import sys
from functools import partial

from cdm_ray import cluster
from cdm_ray.bridge_report import print_metrics
from cdm_ray.checkpoint import EMA, Checkpoint
from cdm_ray.cli import CheckpointMains, run_checkpoint_job
from cdm_ray.config import BridgeConfig, ImageConfig
from cdm_ray.evaluation import launch
from cdm_ray.evaluation.bridge_evaluation import CACHE, evaluate_weights
from cdm_ray.evaluation.npz import short_digest
from cdm_ray.evaluation.results import RESULTS_NAME, print_evaluation

EXAMPLES = """
python jobs/evaluate.py runs/ffhq-64-1a2b3c4d eval.images=50k eval.first_seeds=[0,50000,100000]
python jobs/evaluate.py runs/ffhq-64-1a2b3c4d/checkpoints/step-00781250 --dry-run
python jobs/evaluate.py runs/cifar10-cond-5e6f7a8b eval.reference=cifar10-32x32.npz
python jobs/evaluate.py runs/double-well-3-9c0d1e2f eval.paths=10k eval.seed=1
Running the same command again after a kill continues, and ends with the same numbers.
"""


def images(config: ImageConfig, checkpoint: Checkpoint, dry_run: bool) -> None:
    if dry_run:
        launch.print_plan(config, checkpoint)
        return
    with cluster.connected(config.ray):
        resources = cluster.task_resources(config.ray)
        map_tasks = partial(cluster.map_tasks, resources=resources)
        result = launch.evaluate_checkpoint(config, checkpoint, map_tasks)
    print_evaluation(result)


def bridge(config: BridgeConfig, checkpoint: Checkpoint, dry_run: bool) -> None:
    asked = config.eval.model_dump(mode="json", include={"paths", "steps", "seed", "grid"})
    # A folder for each set of settings, in that of what training found out at this step.
    key = short_digest(json.dumps(asked, sort_keys=True))
    folder = launch.evaluation_folder(checkpoint.run_folder, checkpoint.name) / key
    print(f"checkpoint  {checkpoint.folder}, averaged weights")
    print(f"settings    {', '.join(f'eval.{name}={value}' for name, value in asked.items())}")
    print(f"results     {folder / RESULTS_NAME}", flush=True)
    if dry_run:
        return
    with cluster.connected(config.ray):
        found = evaluate_weights(
            config,
            checkpoint.tensors(EMA),
            str(checkpoint.folder),
            cache_folder=checkpoint.run_folder.parent / CACHE,
            out_folder=folder,
            map_tasks=cluster.map_tasks,
            paths=config.eval.paths,
            figures=True,
        )
    print_metrics(checkpoint.name, found.metrics)
    for name, path in found.figures.items():
        print(f"{name:10}  {path}")


if __name__ == "__main__":
    mains: CheckpointMains = {ImageConfig: images, BridgeConfig: bridge}
    sys.exit(run_checkpoint_job(mains, description=__doc__, examples=EXAMPLES))
