"""Record files to MLflow, each record once.

A process that dies between sending a record and noting so leaves it to be sent again, with the
same time stamp and file name: MLflow keeps one of the two.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdm_ray.errors import error_line
from cdm_ray.tracking.server import RunHandle

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger(__name__)

MAX_METRICS = 1000
"""MLflow's limit for one request."""

Entry = dict[str, Any]
"""One record: `time` in ms, and one of `metrics`, `tag`, `artifact` and `status`."""


def record_files(spool: Path) -> list[Path]:
    """The spool's record files, oldest first."""
    return sorted(spool.glob("*.jsonl"))


def last_steps(paths: Sequence[Path]) -> dict[tuple[str, str], int]:
    """Largest recorded step of every ("metric", name) and ("image", key)."""
    last: dict[tuple[str, str], int] = {}
    for path in paths:
        for _, entry in _entries(path, 0):
            curves = [("metric", name) for name in entry.get("metrics", ())]
            if "image" in entry:
                curves.append(("image", entry["image"]))
            for curve in curves:
                last[curve] = max(last.get(curve, -1), entry["step"])
    return last


def _entries(path: Path, offset: int) -> Iterator[tuple[int, Entry]]:
    """(offset behind it, record) from `offset` on.

    A line without its end is not yet written, or torn by a crash: it does not count.
    """
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"damaged": f"{path} before byte {offset}"}
            yield offset, entry


def deliver(client: MlflowClient, handle: RunHandle) -> None:
    """Send everything that is recorded and not yet sent; raises when the server takes no more."""
    for path in record_files(handle.spool):
        marker = path.with_suffix(".sent")
        offset = int(marker.read_text()) if marker.exists() else 0
        if path.stat().st_size <= offset:
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what the server knows, the spool must know after a crash
        for end, entries in _requests(path, offset):
            _send(client, handle, entries)
            _note_sent(marker, end)
            for entry in entries:
                if "artifact" in entry:  # another tracker may have sent and removed it too
                    shutil.rmtree((handle.spool / entry["artifact"]).parent, ignore_errors=True)


def _note_sent(marker: Path, offset: int) -> None:
    temporary = marker.with_suffix(f".{uuid.uuid4().hex[:8]}")
    with temporary.open("w") as file:
        file.write(str(offset))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(marker)


def _requests(path: Path, offset: int) -> Iterator[tuple[int, list[Entry]]]:
    """(offset behind them, records that go in one request): many with metrics, or one other."""
    batch: list[Entry] = []
    points = 0
    for end, entry in _entries(path, offset):
        size = len(entry.get("metrics", ()))
        if batch and (not size or points + size > MAX_METRICS):
            yield offset, batch
            batch, points = [], 0
        if size:
            batch.append(entry)
            points += size
        else:
            yield end, [entry]
        offset = end
    if batch:
        yield offset, batch


def _send(client: MlflowClient, handle: RunHandle, entries: Sequence[Entry]) -> None:
    """One request; a record that the server refuses for what it is, is logged and left out."""
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    first, run_id = entries[0], handle.run_id
    try:
        if "metrics" in first:
            points = [
                Metric(key, value, entry["time"], entry["step"])
                for entry in entries
                for key, value in entry["metrics"].items()
            ]
            _send_points(client, run_id, points)
        elif "tag" in first:
            key, value = first["tag"]
            client.set_tag(run_id, key, value, synchronous=True)
        elif "artifact" in first:
            _send_artifact(client, handle, first)
        elif "damaged" in first:
            log.error("%s: not a record; left out", first["damaged"])
        elif first["status"] == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        else:
            client.set_terminated(run_id, first["status"], end_time=first["time"])
    except MlflowException as error:
        if not _is_refusal(client, run_id, error):
            raise
        log.error("MLflow refuses %s: %s", json.dumps(first), error_line(error))


def _send_points(client: MlflowClient, run_id: str, points: list[Metric]) -> None:
    """One request, or the two halves if a point of it is refused, so that the others arrive."""
    from mlflow.exceptions import MlflowException

    try:
        client.log_batch(run_id, metrics=points, synchronous=True)
    except MlflowException as error:
        if not _is_refusal(client, run_id, error):
            raise
        if len(points) == 1:
            log.error("MLflow refuses %s: %s", dict(points[0]), error_line(error))
            return
        middle = len(points) // 2
        _send_points(client, run_id, points[:middle])
        _send_points(client, run_id, points[middle:])


def _send_artifact(client: MlflowClient, handle: RunHandle, entry: Entry) -> None:
    path = handle.spool / entry["artifact"]
    if not path.is_file():
        log.error("%s: removed before it was sent to MLflow; left out", path)
        return
    client.log_artifact(handle.run_id, str(path), entry["folder"])


def _is_refusal(client: MlflowClient, run_id: str, error: Exception) -> bool:
    """Whether the record is at fault; a run deleted in the UI may be restored there."""
    if getattr(error, "error_code", None) != "INVALID_PARAMETER_VALUE":
        return False
    return client.get_run(run_id).info.lifecycle_stage == "active"
