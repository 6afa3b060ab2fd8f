"""Which weight of the Consistency Property helps? Trials of image runs through Ray Tune."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cdm_ray.sweep.command import run_sweep_job

if __name__ == "__main__":
    sys.exit(run_sweep_job(__doc__, Path(__file__).parent, "cp-weight-digits"))
