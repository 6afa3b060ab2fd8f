"""Export the averaged weights of a checkpoint: safetensors with a model card."""

import sys

from cdm_ray.checkpoint import Checkpoint
from cdm_ray.cli import run_checkpoint_job
from cdm_ray.config import ImageConfig
from cdm_ray.export import export, export_folder

EXAMPLES = """
python jobs/export.py runs/ffhq-64-1a2b3c4d                            its newest checkpoint
python jobs/export.py runs/ffhq-64-1a2b3c4d/checkpoints/step-00781250
The export is written into the folder `export` of the run.
"""


def main(config: ImageConfig, checkpoint: Checkpoint, dry_run: bool) -> None:
    print(f"checkpoint  {checkpoint.folder}, averaged weights")
    print(f"export      {export_folder(checkpoint) if dry_run else export(config, checkpoint)}")


if __name__ == "__main__":
    sys.exit(run_checkpoint_job({ImageConfig: main}, description=__doc__, examples=EXAMPLES))
