"""Fixtures for the data tests."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from data_sets import SIDE, write_data_set

from cdm_ray.config import DataConfig
from cdm_ray.data.manifest import Manifest


@pytest.fixture
def data_set(tmp_path: Path) -> Callable[..., tuple[DataConfig, Manifest]]:
    """data_set(sizes, lanes, **settings) -> (DataConfig, Manifest) of shards on disk."""

    def make(sizes, lanes, *, num_classes=10, damaged=None, **settings):
        folder = tmp_path / "packed"
        manifest = write_data_set(folder, sizes, num_classes=num_classes, damaged=damaged)
        values = {"resolution": SIDE, "channels": 1, "lanes": lanes, **settings}
        return DataConfig(path=str(folder), **values), manifest

    return make


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def http_server(tmp_path: Path) -> Iterator[str]:
    """URL of a real HTTP server on 127.0.0.1 that serves tmp_path."""
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()
