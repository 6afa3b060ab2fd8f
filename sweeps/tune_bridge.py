"""Which controls of a bridge work best? Trials of bridges through Ray Tune."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cdm_ray.sweep.command import run_sweep_job

if __name__ == "__main__":
    sys.exit(run_sweep_job(__doc__, Path(__file__).parent, "bridge-controls"))
