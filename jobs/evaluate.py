"""Evaluate the averaged weights of a checkpoint: FID, KID, precision, recall, drift, samples."""

import sys
from functools import partial

from cdm_ray import cluster
from cdm_ray.checkpoint import Checkpoint
from cdm_ray.cli import run_checkpoint_job
from cdm_ray.config import ImageConfig
from cdm_ray.evaluation.launch import evaluate_checkpoint, print_plan
from cdm_ray.evaluation.results import print_evaluation

EXAMPLES = """
python jobs/evaluate.py runs/ffhq-64-1a2b3c4d eval.images=50k eval.first_seeds=[0,50000,100000]
python jobs/evaluate.py runs/ffhq-64-1a2b3c4d/checkpoints/step-00781250 --dry-run
python jobs/evaluate.py runs/cifar10-cond-5e6f7a8b eval.reference=cifar10-32x32.npz
Running the same command again after a kill continues, and ends with the same numbers.
"""


def main(config: ImageConfig, checkpoint: Checkpoint, dry_run: bool) -> None:
    if dry_run:
        print_plan(config, checkpoint)
        return
    with cluster.connected(config.ray):
        resources = cluster.task_resources(config.ray)
        map_tasks = partial(cluster.map_tasks, resources=resources)
        result = evaluate_checkpoint(config, checkpoint, map_tasks)
    print_evaluation(result)


if __name__ == "__main__":
    sys.exit(run_checkpoint_job({ImageConfig: main}, description=__doc__, examples=EXAMPLES))
