"""Files are fetched from paths and URLs; a connection that fails once is tried again."""

from __future__ import annotations

import http.server
import threading

import pytest

from cdm_ray import storage


@pytest.fixture
def flaky_server():
    """(URL, requests): answers 503 twice, then the content."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            fails = len(requests) <= 2
            self.send_response(404 if self.path == "/nothing" else 503 if fails else 200)
            self.send_header("Content-Length", "0" if fails else "5")
            self.end_headers()
            if not fails:
                self.wfile.write(b"hello")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/x", requests
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_failing_connection_is_tried_three_times(flaky_server, monkeypatch, caplog):
    monkeypatch.setattr(storage, "_RETRY_AFTER_SECONDS", (0.0, 0.0))
    url, requests = flaky_server
    assert storage.fetch(url) == b"hello"
    assert len(requests) == 3
    assert len(caplog.records) == 2


def test_a_server_that_stays_away_is_an_error(monkeypatch):
    monkeypatch.setattr(storage, "_RETRY_AFTER_SECONDS", (0.0, 0.0))
    with pytest.raises(OSError, match="127.0.0.1:1"):
        storage.fetch("http://127.0.0.1:1/x")


def test_a_missing_file_is_not_tried_again(flaky_server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited"))
    for path in (flaky_server[0].replace("/x", "/nothing"), "memory://nothing", "/nothing/there"):
        with pytest.raises(FileNotFoundError):
            storage.fetch(path)


def test_local_paths_become_absolute_and_urls_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("data/x") == str(tmp_path / "data/x")
    assert storage.absolute("file:///a/b") == "/a/b"
    assert storage.absolute("s3://bucket/x") == "s3://bucket/x"
