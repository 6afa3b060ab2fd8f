"""Print the table of the finished runs of a recipe."""

import sys

from cdm_ray.cli import run_job
from cdm_ray.config import ImageConfig
from cdm_ray.report import finished_runs, print_results

EXAMPLES = """
python jobs/report.py digits
python jobs/report.py ffhq-64 run.storage=/mnt/shared/runs
"""


def main(config: ImageConfig, dry_run: bool) -> None:
    folders = finished_runs(config.storage, config.recipe)
    if dry_run:
        print("\n".join(str(folder) for folder in folders))
    else:
        print_results(folders)


if __name__ == "__main__":
    sys.exit(
        run_job(ImageConfig, main, description=__doc__, examples=EXAMPLES, default_recipe="digits")
    )
