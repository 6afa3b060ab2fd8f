"""Files of paths and URLs: read whole, also after a connection that failed, and written whole."""

from __future__ import annotations

import http.server
import re
import sys
import threading
from pathlib import Path

import pytest

from cdm_ray import storage
from cdm_ray.config import ImageConfig, load_config
from cdm_ray.errors import ConfigError
from cdm_ray.storage import (
    check_writable,
    list_folder,
    local_file,
    matching,
    path_of,
    publish,
    remove_folder,
    staging,
    whole_file,
    write_whole,
)


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


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path, memory):
    """A folder that is not there yet."""
    return path_of(str(tmp_path / "a" / "b") if request.param == "local" else f"{memory}/a/b")


def test_a_file_is_seen_whole_or_not_at_all(folder):
    path = folder / "figure.png"
    with whole_file(path) as file:
        assert file.suffix == ".png"  # by which matplotlib chooses the format
        file.write_bytes(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"

    def write_half():
        with whole_file(path) as file:
            file.write_bytes(b"hal")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_half()
    assert path.read_bytes() == b"first"
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert list_folder(folder) == [path]  # and nothing else
    with local_file(path) as file:
        assert isinstance(file, Path)
        assert (file.name, file.read_bytes()) == ("figure.png", b"second")


def test_a_folder_is_listed_searched_and_removed(folder):
    assert list_folder(folder) == matching(folder, "*/x") == []
    remove_folder(folder)  # is no error
    for name in ("2", "1"):
        write_whole(folder / name / "x", b"")
    assert {path.name for path in list_folder(folder)} == {"1", "2"}
    assert matching(folder, "*/x") == [folder / "1" / "x", folder / "2" / "x"]
    remove_folder(folder)
    assert not folder.exists()


def test_a_folder_is_published_in_the_place_of_another(folder):
    write_whole(folder / "old", b"")
    if isinstance(folder, Path):  # elsewhere, the writer removes it first
        write_whole(staging(folder) / "new", b"")
        assert {path.name for path in list_folder(folder)} == {"old"}
        publish(folder)
        assert {path.name for path in list_folder(folder)} == {"new"}
        assert not staging(folder).exists()
    else:
        assert staging(folder) == folder
        publish(folder)
        assert {path.name for path in list_folder(folder)} == {"old"}


def test_storage_is_tried_out_and_left_as_it_was(folder):
    check_writable(folder, "run.storage")
    assert list_folder(folder) == []


def test_storage_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run.storage=.*/file: cannot be written to"):
        check_writable(tmp_path / "file", "run.storage")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://x", "nosuch://x: cannot be opened (Unsupported filesystem: 'nosuch'); use a"),
        ("gs://bucket/runs", "gs://bucket/runs: the package for this protocol is missing"),
        ("sftp://me:hunter2@host/runs", "sftp://***@host/runs: the package for this protocol is"),
        ("s3://me:hunter2@bucket/runs", "s3://***@bucket/runs: object stores take no credentials"),
    ],
)
def test_a_url_that_nothing_here_can_open_is_refused(url, message, monkeypatch):
    for package in ("gcsfs", "paramiko"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as error:
        path_of(url)
    assert str(error.value).startswith(message)
    config = load_config(ImageConfig, "digits", [f"run.storage={url}"]).resolved()
    assert config.run.storage == url
    with pytest.raises(ConfigError, match=f"^run.storage={re.escape(message)}"):
        _ = config.run_folder


def test_a_store_that_refuses_to_delete_without_saying_so_is_found_out(memory, monkeypatch):
    folder = path_of(memory)
    monkeypatch.setattr(type(folder), "unlink", lambda path: None)
    with pytest.raises(ConfigError, match="files can be written but not removed"):
        check_writable(folder, "run.storage")


def test_listings_of_an_object_store_are_not_remembered():
    """Other processes write there."""
    assert path_of("s3://bucket/runs").storage_options == {"use_listings_cache": False}
