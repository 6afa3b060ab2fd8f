"""Write samples of a checkpoint's averaged weights: images as PNG files, or a bridge's paths."""

import sys
from functools import partial

from cdm_ray import cluster
from cdm_ray.checkpoint import Checkpoint
from cdm_ray.cli import CheckpointMains, run_checkpoint_job
from cdm_ray.config import BridgeConfig, ImageConfig
from cdm_ray.evaluation import sample_images, sample_paths

EXAMPLES = """
python jobs/sample.py runs/digits-1a2b3c4d eval.images=64
python jobs/sample.py runs/digits-1a2b3c4d eval.images=64 sampler.kind=sde sampler.sde_solver=churn
python jobs/sample.py runs/ffhq-64-5e6f7a8b sampler.ode_solver=dpmpp_3m sampler.ode_steps=10
python jobs/sample.py runs/ffhq-64-5e6f7a8b/checkpoints/step-00781250 --dry-run
python jobs/sample.py runs/double-well-3-9c0d1e2f eval.paths=10k eval.format=parquet
Running the same command again continues images, and writes the same paths; another sampler, or
paths with other settings, go into a folder of their own.
"""


def images(config: ImageConfig, checkpoint: Checkpoint, dry_run: bool) -> None:
    if dry_run:
        sample_images.print_plan(config, checkpoint)
        return
    with cluster.connected(config.ray):
        resources = cluster.task_resources(config.ray)
        map_tasks = partial(cluster.map_tasks, resources=resources)
        samples = sample_images.sample_images(config, checkpoint, map_tasks)
    print(f"images  {samples.folder} ({samples.made:,} of {len(samples.seeds):,} made now)")
    print(f"grid    {samples.grid}")


def paths(config: BridgeConfig, checkpoint: Checkpoint, dry_run: bool) -> None:
    if dry_run:
        sample_paths.print_plan(config, checkpoint)
        return
    # In this process: it takes seconds, less than a cluster's start.
    sample_paths.print_samples(sample_paths.sample_paths(config, checkpoint))


if __name__ == "__main__":
    mains: CheckpointMains = {ImageConfig: images, BridgeConfig: paths}
    sys.exit(run_checkpoint_job(mains, description=__doc__, examples=EXAMPLES))
