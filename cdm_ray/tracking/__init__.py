"""Everything MLflow: the run of a training run, and the way of its records there.

`runs` opens and ends a run (driver); `spool` takes records without waiting and delivers them
(rank 0 and driver); `server` connects.
"""

from cdm_ray.tracking.runs import EndStatus, end_run_of, finish_run, open_run, ui_command
from cdm_ray.tracking.server import RunHandle
from cdm_ray.tracking.spool import Tracker

__all__ = [
    "EndStatus",
    "RunHandle",
    "Tracker",
    "end_run_of",
    "finish_run",
    "open_run",
    "ui_command",
]
