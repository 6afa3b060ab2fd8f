"""Train a recipe with denoising score matching alone and with the Consistency Property, and print
both in one table."""

import sys

from cdm_ray import cluster
from cdm_ray.cli import run_job
from cdm_ray.config import ImageConfig
from cdm_ray.errors import ConfigError
from cdm_ray.report import print_plan, print_results
from cdm_ray.training.image_run import run_images

EXAMPLES = """
python jobs/compare.py digits
python jobs/compare.py digits run.seed=1 cp.weight=3
Running the same command again continues where it stopped.
"""


def main(config: ImageConfig, dry_run: bool) -> None:
    if config.run.name is not None or config.cp.weight == 0:
        raise ConfigError("compare needs cp.weight above 0 and no run.name: it names both runs")
    both = [config.without_cp(), config]
    if dry_run:
        for one in both:
            print_plan(one)
        return
    with cluster.connected(config.ray):
        folders = [run_images(one) for one in both]
    print_results(folders)


if __name__ == "__main__":
    sys.exit(
        run_job(ImageConfig, main, description=__doc__, examples=EXAMPLES, default_recipe="digits")
    )
