"""The tracker: records go onto disk at once, and to the server when it answers.

A spool is a folder of record files, one for every process that recorded, numbered in order, each
with its own `.sent` file: how many of its bytes have arrived. Records are JSON lines and stay, as
the memory of what was recorded; copies of artifacts go once they have arrived.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING

from PIL import Image

from cdm_ray.errors import error_line, redact
from cdm_ray.storage import AnyPath, local_file
from cdm_ray.tracking.delivery import MAX_METRICS, Entry, deliver, last_steps, record_files
from cdm_ray.tracking.server import RunHandle, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

SEND_EVERY_SECONDS = 2.0
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 1.0, 60.0
THUMBNAIL_PIXELS = 256


class Tracker:
    """Records into a run; no call waits for the server.

    A thread sends what this process and those before it have recorded. Points and images at or
    before the last recorded step of their key are left out: training that resumes repeats the
    steps since its checkpoint.
    """

    def __init__(self, handle: RunHandle) -> None:
        self._handle = handle
        self._files = handle.spool / "files"
        self._files.mkdir(parents=True, exist_ok=True)
        earlier = record_files(handle.spool)
        self._last_steps = last_steps(earlier)
        number = int(earlier[-1].name.partition("-")[0]) + 1 if earlier else 0
        self._path = handle.spool / f"{number:06d}-{uuid.uuid4().hex[:8]}.jsonl"
        self._file = self._path.open("xb")
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._all_sent = False
        self._thread = threading.Thread(target=self._send_all, name="tracking", daemon=True)
        self._thread.start()

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        """Points of curves. MLflow keeps NaN, and ±inf as the largest float64."""
        with self._lock:
            points = [(k, float(v)) for k, v in values.items() if self._is_new(("metric", k), step)]
            self._append(
                {"metrics": dict(points[start : start + MAX_METRICS]), "step": step}
                for start in range(0, len(points), MAX_METRICS)
            )

    def log_artifact(self, path: AnyPath, folder: str) -> None:
        """A copy of the file, in a folder of the run's artifacts."""
        copy = self._copy(path, path.name)
        with self._lock:
            self._append([{"artifact": copy, "folder": folder}])

    def log_figure(self, path: AnyPath, folder: str = "figures") -> None:
        """A copy of the figure's file, where people look for figures."""
        self.log_artifact(path, folder)

    def log_image(self, path: AnyPath, key: str, step: int) -> None:
        """A PNG that MLflow shows under its key with a slider over the steps.

        Raises ValueError for a key with characters that MLflow refuses.
        """
        if not re.fullmatch(r"[\w\-./ ]+", key, re.ASCII):
            raise ValueError(f"image key '{key}': use letters, digits, '_', '-', '.', '/' and ' '")
        with self._lock:
            if not self._is_new(("image", key), step):
                return
            # The names that MlflowClient.log_image gives; made here, a repeat has the same ones.
            stamp = f"{time.time_ns() // 10**6}+{uuid.uuid4()}"
            name = f"{key.replace('/', '~')}+step+{step}+timestamp+{stamp}"
            image = self._copy(path, f"{name}.png")
            thumbnail = self._copy(path, f"{name}+compressed.webp", THUMBNAIL_PIXELS)
            self._append(
                [
                    {"artifact": image, "folder": "images", "image": key, "step": step},
                    {"artifact": thumbnail, "folder": "images"},
                    {"tag": ["mlflow.loggedImages", "True"]},
                ]
            )

    def set_tag(self, key: str, value: str) -> None:
        """A tag of the run, in place of an earlier one of the same key."""
        with self._lock:
            self._append([{"tag": [key, redact(value)]}])

    def set_status(self, status: str) -> None:
        """RUNNING, FINISHED, FAILED or KILLED, in order with everything else recorded."""
        with self._lock:
            self._append([{"status": status}])

    def close(self, timeout: float) -> bool:
        """Try for `timeout` seconds to send the rest; returns whether everything has arrived.

        What has not is sent by the next Tracker of the run.
        """
        with self._lock:
            self._file.close()
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._thread.join(timeout)
        return self._all_sent

    def _is_new(self, curve: tuple[str, str], step: int) -> bool:
        if step <= self._last_steps.get(curve, -1):
            return False
        self._last_steps[curve] = step
        return True

    def _append(self, entries: Iterable[Entry]) -> None:
        now = time.time_ns() // 10**6
        lines = [json.dumps({"time": now} | entry) + "\n" for entry in entries]
        self._file.write("".join(lines).encode())
        self._file.flush()

    def _copy(self, path: AnyPath, name: str, thumbnail_pixels: int | None = None) -> str:
        """Put a copy into the spool; returns its path inside the spool."""
        folder = self._files / uuid.uuid4().hex
        folder.mkdir()
        with local_file(path) as file:
            if thumbnail_pixels is None:
                shutil.copyfile(file, folder / name)
            else:
                with Image.open(file) as image:
                    image.thumbnail((thumbnail_pixels, thumbnail_pixels))
                    image.save(folder / name)
        return str((folder / name).relative_to(self._handle.spool))

    def _send_all(self) -> None:
        """Body of the thread: deliver, wait, again; with longer waits during an outage, which is
        one from the second failure on."""
        server, failures = redact(self._handle.uri), 0
        client: MlflowClient | None = None
        while True:
            closing = self._closing.is_set()
            try:
                client = client or connect(self._handle.uri)
                deliver(client, self._handle)
            except Exception as error:  # each kind of server fails in its own ways; none is final
                failures += 1
                if failures == 2:
                    log.warning(
                        "MLflow at %s takes no records (%s); they are kept in %s and sent later",
                        server,
                        error_line(error),
                        self._handle.spool,
                    )
                self._wait(min(FIRST_RETRY_SECONDS * 2 ** (failures - 1), LAST_RETRY_SECONDS))
                if time.monotonic() >= self._deadline:
                    return
            else:
                if failures >= 2:
                    log.warning("MLflow at %s takes records again", server)
                failures = 0
                if closing:
                    self._all_sent = True
                    return
                self._closing.wait(SEND_EVERY_SECONDS)

    def _wait(self, seconds: float) -> None:
        """Until close() is called; once it was, for a short while up to its deadline."""
        if self._closing.is_set():
            left = self._deadline - time.monotonic()
            time.sleep(max(0.0, min(FIRST_RETRY_SECONDS, left)))
        else:
            self._closing.wait(seconds)
