"""What the workers of a test run instead of `train_worker`; Ray imports them by name."""

import json
import os
import signal
from pathlib import Path

from cdm_ray.training import bridge_worker
from cdm_ray.training import image_worker as worker_module
from cdm_ray.training.image_worker import train_worker

KEYS = "keys"


class RecordingStream(worker_module.LaneStream):
    """Writes the keys of every batch that training takes, one line for each step."""

    def __next__(self):
        batch = super().__next__()
        folder = Path(os.environ["CDM_TEST_FOLDER"]) / KEYS
        folder.mkdir(exist_ok=True)
        with (folder / f"{os.environ['RANK']}-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(batch.keys) + "\n")
        return batch


def recording_worker(options):
    folder = options["assignment"].config["run"]["storage"]
    os.environ["CDM_TEST_FOLDER"] = folder
    worker_module.LaneStream = RecordingStream
    return train_worker(options)


def killed_worker(options):
    """As train_worker, but rank 1 dies by SIGKILL once, in the middle of a step."""
    marker = Path(options["assignment"].config["run"]["storage"]) / "killed"
    original = worker_module.ImageObjective.__call__

    def objective(self, model, batch, rng, samples_seen):
        if samples_seen == 32 * 7 and os.environ["RANK"] == "1" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, model, batch, rng, samples_seen)

    worker_module.ImageObjective.__call__ = objective
    return train_worker(options)


def diverging_worker(options):
    """As train_worker, but every loss is NaN; counts how often it was started."""
    folder = Path(options["assignment"].config["run"]["storage"])
    (folder / f"start-{os.getpid()}").touch()
    original = worker_module.ImageObjective.__call__

    def objective(self, model, batch, rng, samples_seen):
        terms = original(self, model, batch, rng, samples_seen)
        return {n: type(t)(t.value * float("nan"), t.weight) for n, t in terms.items()}

    worker_module.ImageObjective.__call__ = objective
    return train_worker(options)


def killed_bridge_worker(options):
    """As bridge_worker.train_worker, but rank 1 dies by SIGKILL once, in the middle of a step, in
    the second half of an iteration."""
    marker = Path(options["assignment"].config["run"]["storage"]) / "killed"
    original = bridge_worker.BridgeRun.objective

    def objective(self, model, batch, rng, samples_seen):
        if samples_seen == 64 * 9 and os.environ["RANK"] == "1" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, model, batch, rng, samples_seen)

    bridge_worker.BridgeRun.objective = objective
    return bridge_worker.train_worker(options)
