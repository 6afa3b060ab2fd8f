"""Learn the control of a diffusion bridge by its consistency, and evaluate it."""

import sys

from cdm_ray import cluster
from cdm_ray.bridge_report import print_plan, print_results
from cdm_ray.cli import run_job
from cdm_ray.config import BridgeConfig
from cdm_ray.training.bridge_run import run_bridge

EXAMPLES = """
python jobs/train_bridge.py                                     the double well, a rare event
python jobs/train_bridge.py double-well-5 train.iterations=5k   with changes
python jobs/train_bridge.py mueller-brown --dry-run             configuration, resources and cost
python jobs/train_bridge.py mine.yaml process.drift=my_model:drift    a drift of your own
ray job submit --working-dir . -- python jobs/train_bridge.py cell
Running the same command again continues the run.
"""


def main(config: BridgeConfig, dry_run: bool) -> None:
    if dry_run:
        print_plan(config)
        return
    with cluster.connected(config.ray):
        folder = run_bridge(config)
    print_results(folder)


if __name__ == "__main__":
    sys.exit(
        run_job(
            BridgeConfig,
            main,
            description=__doc__,
            examples=EXAMPLES,
            default_recipe="double-well-3",
        )
    )
