"""Write images of a checkpoint's averaged weights as PNG files, and a grid of the first ones."""

import sys
from functools import partial

from cdm_ray import cluster
from cdm_ray.checkpoint import Checkpoint
from cdm_ray.cli import run_checkpoint_job
from cdm_ray.config import ImageConfig
from cdm_ray.evaluation.sample_images import print_plan, sample_images

EXAMPLES = """
python jobs/sample.py runs/digits-1a2b3c4d eval.images=64
python jobs/sample.py runs/digits-1a2b3c4d eval.images=64 sampler.kind=sde sampler.sde_solver=churn
python jobs/sample.py runs/ffhq-64-5e6f7a8b sampler.ode_solver=dpmpp_3m sampler.ode_steps=10
python jobs/sample.py runs/ffhq-64-5e6f7a8b/checkpoints/step-00781250 --dry-run
Running the same command again continues; another sampler writes into a folder of its own.
"""


def main(config: ImageConfig, checkpoint: Checkpoint, dry_run: bool) -> None:
    if dry_run:
        print_plan(config, checkpoint)
        return
    with cluster.connected(config.ray):
        resources = cluster.task_resources(config.ray)
        samples = sample_images(config, checkpoint, partial(cluster.map_tasks, resources=resources))
    print(f"images  {samples.folder} ({samples.made:,} of {len(samples.seeds):,} made now)")
    print(f"grid    {samples.grid}")


if __name__ == "__main__":
    sys.exit(run_checkpoint_job({ImageConfig: main}, description=__doc__, examples=EXAMPLES))
