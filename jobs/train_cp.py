"""Train an image diffusion model with the Consistency Property, and evaluate it."""

import sys

from cdm_ray import cluster
from cdm_ray.cli import run_job
from cdm_ray.config import ImageConfig
from cdm_ray.report import print_plan, print_results
from cdm_ray.training.image_run import run_images

EXAMPLES = """
python jobs/train_cp.py                                       the digits recipe
python jobs/train_cp.py digits train.images=200k cp.weight=3  with changes
python jobs/train_cp.py digits --dry-run                      configuration, resources and cost
python jobs/train_cp.py my-recipe.yaml ray.workers=8          a recipe of your own
ray job submit --working-dir . -- python jobs/train_cp.py digits
Running the same command again continues the run.
"""


def main(config: ImageConfig, dry_run: bool) -> None:
    if dry_run:
        print_plan(config)
        return
    with cluster.connected(config.ray):
        folder = run_images(config)
    print_results([folder])


if __name__ == "__main__":
    sys.exit(
        run_job(ImageConfig, main, description=__doc__, examples=EXAMPLES, default_recipe="digits")
    )
