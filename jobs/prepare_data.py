"""Pack images into WebDataset shards and a manifest, ready to be streamed by a training run."""

import sys

from cdm_ray import cluster
from cdm_ray.cli import run_job
from cdm_ray.data.prepare import PrepareConfig, pack, plan_packing

EXAMPLES = """
python jobs/prepare_data.py digits
python jobs/prepare_data.py data.source=photos data.path=data/photos data.resolution=64
python jobs/prepare_data.py cifar10-cond data.source=cifar-10-python.tar.gz
python jobs/prepare_data.py ffhq-64 data.source=ffhq-dataset/images1024x1024
python jobs/prepare_data.py afhqv2-64 data.source=afhq_v2 data.path=/shared/afhqv2 --dry-run
Running the same command again continues an interrupted packing and verifies a finished one.
"""


def main(config: PrepareConfig, dry_run: bool) -> None:
    """Print what will be packed, and pack it."""
    packing = plan_packing(config.data)
    print(packing.describe())
    if dry_run:
        return
    with cluster.connected(config.ray):
        manifest = pack(packing, cluster.map_tasks)
    print(
        f"packed     {manifest.num_samples} images in {len(manifest.shards)} shards, "
        f"fingerprint {manifest.fingerprint[:16]}"
    )


if __name__ == "__main__":
    sys.exit(
        run_job(PrepareConfig, main, description=__doc__, examples=EXAMPLES, default_recipe=None)
    )
