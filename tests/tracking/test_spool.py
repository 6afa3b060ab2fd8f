import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cdm_ray.tracking import Tracker, finish_run, spool
from cdm_ray.tracking.delivery import record_files
from cdm_ray.tracking.server import connect

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens


def history(client, handle, key):
    return [(p.step, p.value) for p in client.get_metric_history(handle.run_id, key)]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_no_call_waits_for_the_server(open_here, tmp_path, monkeypatch):
    handle = open_here()
    (tmp_path / "a.txt").write_text("a")
    asked, answer, callers = threading.Event(), threading.Event(), []

    def hang(uri):
        callers.append(threading.current_thread())
        asked.set()
        answer.wait(20)  # a caller that waits fails the last assertion instead of hanging
        raise ConnectionError("gone")

    monkeypatch.setattr(spool, "connect", hang)
    tracker = Tracker(handle)
    asked.wait()  # from here on the sender hangs in its request
    tracker.log_metrics({"loss": 1.0}, step=1)
    tracker.log_artifact(tmp_path / "a.txt", "run")
    tracker.set_tag("k", "v")
    assert not answer.is_set()
    lines = [json.loads(line) for line in record_files(handle.spool)[-1].read_text().splitlines()]
    assert [next(k for k in ("metrics", "artifact", "tag") if k in line) for line in lines] == [
        "metrics",
        "artifact",
        "tag",
    ]
    assert not tracker.close(timeout=0.2)  # bounded, although the request still hangs
    assert threading.current_thread() not in callers
    answer.set()


def test_what_is_left_at_close_is_sent_by_the_next_tracker_in_order(client, open_here):
    handle = open_here()
    for start in (0, 3):
        away = Tracker(replace(handle, uri=NOBODY))
        for step in range(start, start + 3):
            away.log_metrics({"loss": float(step)}, step)
        assert not away.close(timeout=0.1)
    away = Tracker(replace(handle, uri=NOBODY))
    away.set_status("FAILED")
    away.set_status("RUNNING")
    assert not away.close(timeout=0.1)
    assert history(client, handle, "loss") == []
    assert Tracker(handle).close(timeout=30)
    assert history(client, handle, "loss") == [(step, float(step)) for step in range(6)]
    assert client.get_run(handle.run_id).info.status == "RUNNING"


def test_a_killed_process_loses_nothing_that_it_recorded(client, open_here, tmp_path):
    handle = open_here()
    script = (
        "import sys, time; from pathlib import Path\n"
        "from cdm_ray.tracking import RunHandle, Tracker\n"
        "tracker = Tracker(RunHandle(sys.argv[1], sys.argv[2], Path(sys.argv[3])))\n"
        "Path('figure.svg').write_text('<svg/>')\n"
        "tracker.log_figure(Path('figure.svg'))\n"
        "for step in range(50): tracker.log_metrics({'loss': step / 2}, step)\n"
        "print('logged', flush=True); time.sleep(100)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, NOBODY, handle.run_id, str(handle.spool)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    assert process.stdout.readline() == b"logged\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert finish_run(handle, "FAILED")
    assert history(client, handle, "loss") == [(step, step / 2) for step in range(50)]
    assert [f.path for f in client.list_artifacts(handle.run_id, "figures")] == [
        "figures/figure.svg"
    ]


def test_a_record_torn_by_a_crash_is_recorded_anew(client, open_here):
    handle = open_here()
    first = Tracker(replace(handle, uri=NOBODY))
    first.log_metrics({"loss": 1.0}, step=1)
    first.log_metrics({"loss": 2.0}, step=2)
    assert not first.close(timeout=0.1)
    path = record_files(handle.spool)[-1]
    path.write_bytes(path.read_bytes()[:-9])
    second = Tracker(handle)
    for step in (1, 2, 3):
        second.log_metrics({"loss": float(step)}, step)
    assert second.close(timeout=30)
    assert history(client, handle, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_record_that_is_being_written_waits_for_its_end(client, open_here):
    handle = open_here()
    other = Tracker(replace(handle, uri=NOBODY))
    other.log_metrics({"loss": 1.0}, step=1)
    other.log_metrics({"loss": 2.0}, step=2)
    assert not other.close(timeout=0.1)
    path = record_files(handle.spool)[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert Tracker(handle).close(timeout=30)
    assert history(client, handle, "loss") == [(1, 1.0)]
    path.write_bytes(whole)
    assert Tracker(handle).close(timeout=30)
    assert history(client, handle, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_damaged_record_is_reported_once_and_those_around_it_arrive(client, open_here, caplog):
    handle = open_here()
    first = Tracker(replace(handle, uri=NOBODY))
    for step in (1, 2, 3):
        first.log_metrics({"loss": float(step)}, step)
    assert not first.close(timeout=0.1)
    path = record_files(handle.spool)[-1]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00" * 20 + b"\xff\n" + lines[2])
    assert Tracker(handle).close(timeout=30)
    assert Tracker(handle).close(timeout=30)
    assert history(client, handle, "loss") == [(1, 1.0), (3, 3.0)]
    assert caplog.text.count("not a record") == 1


def test_records_sent_twice_are_there_once(client, open_here, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    handle = open_here()
    tracker = Tracker(handle)
    for step in range(5):
        tracker.log_metrics({"loss": step / 3, "nan": math.nan, "inf": math.inf}, step)
    tracker.log_artifact(tmp_path / "a.txt", "run")
    assert tracker.close(timeout=30)
    for marker in handle.spool.glob("*.sent"):  # as if killed between sending and noting it
        content = tmp_path / "a.txt"
        marker.unlink()
        for line in marker.with_suffix(".jsonl").read_text().splitlines():
            if artifact := json.loads(line).get("artifact"):
                copy = handle.spool / artifact
                copy.parent.mkdir()
                copy.write_bytes(content.read_bytes())
    again = Tracker(handle)
    again.log_metrics({"loss": 5 / 3}, 5)
    assert again.close(timeout=30)
    assert history(client, handle, "loss") == [(step, step / 3) for step in range(6)]
    assert [step for step, _ in history(client, handle, "nan")] == list(range(5))
    assert [step for step, _ in history(client, handle, "inf")] == list(range(5))
    assert [f.path for f in client.list_artifacts(handle.run_id, "run")] == ["run/a.txt"]


def test_values_that_are_not_finite_are_kept_as_far_as_mlflow_can(client, open_here):
    handle = open_here()
    tracker = Tracker(handle)
    tracker.log_metrics({"nan": math.nan, "up": math.inf, "down": -math.inf, "fine": 1.0}, step=0)
    tracker.log_metrics({"fine": 2.0}, step=1)
    assert tracker.close(timeout=30)
    ((_, nan),) = history(client, handle, "nan")
    assert math.isnan(nan)
    largest = sys.float_info.max
    assert history(client, handle, "up") == [(0, largest)]
    assert history(client, handle, "down") == [(0, -largest)]
    assert history(client, handle, "fine") == [(0, 1.0), (1, 2.0)]


def test_a_refused_name_is_reported_and_holds_nothing_up(client, open_here, caplog):
    handle = open_here()
    tracker = Tracker(handle)
    tracker.log_metrics({"a": 1.0, "bad?name": 2.0, "b": 3.0}, step=1)
    tracker.log_metrics({"a": 4.0}, step=2)
    assert tracker.close(timeout=30)
    assert history(client, handle, "a") == [(1, 1.0), (2, 4.0)]
    assert history(client, handle, "b") == [(1, 3.0)]
    assert "MLflow refuses" in caplog.text
    assert "bad?name" in caplog.text
    with pytest.raises(ValueError, match="image key 'a:b'"):
        Tracker(handle).log_image(Path("x.png"), "a:b", step=1)


def test_records_of_a_run_deleted_in_the_ui_wait_until_it_is_restored(client, open_here, caplog):
    handle = open_here()
    client.delete_run(handle.run_id)
    tracker = Tracker(handle)
    tracker.log_metrics({"loss": 1.0}, step=1)
    assert not tracker.close(timeout=1.0)
    assert "refuses" not in caplog.text
    client.restore_run(handle.run_id)
    assert Tracker(handle).close(timeout=30)
    assert history(client, handle, "loss") == [(1, 1.0)]


def test_more_points_than_one_request_holds_all_arrive(client, open_here):
    handle = open_here()
    tracker = Tracker(replace(handle, uri=NOBODY))
    tracker.log_metrics({f"many/{k}": float(k) for k in range(1500)}, step=1)
    for step in range(1, 702):
        tracker.log_metrics({"x": float(step), "y": 0.0}, step)
    assert not tracker.close(timeout=0.1)
    assert Tracker(handle).close(timeout=60)
    metrics = client.get_run(handle.run_id).data.metrics
    assert {metrics[f"many/{k}"] for k in range(1500)} == set(map(float, range(1500)))
    assert [step for step, _ in history(client, handle, "x")] == list(range(1, 702))


def test_an_outage_is_reported_once_and_loses_and_doubles_nothing(
    client, server, open_here, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(spool, "SEND_EVERY_SECONDS", 0.1)
    monkeypatch.setattr(spool, "LAST_RETRY_SECONDS", 1.0)
    (tmp_path / "drift.svg").write_text("<svg/>")
    handle = open_here(f"tracking.uri={server.uri}", "tracking.experiment=on a server")
    tracker = Tracker(handle)
    tracker.log_metrics({"loss": 0.0, "bad": math.nan, "worse": math.inf}, step=0)
    wait_for(lambda: history(client, handle, "loss"))
    server.kill()
    for step in range(1, 40):
        tracker.log_metrics({"loss": float(step)}, step)
    tracker.log_figure(tmp_path / "drift.svg")
    wait_for(lambda: "takes no records" in caplog.text)
    tracker.log_metrics({"loss": 40.0}, step=40)
    server.start()
    wait_for(lambda: "takes records again" in caplog.text)
    tracker.log_metrics({"loss": 41.0}, step=41)
    assert tracker.close(timeout=30)
    assert finish_run(handle, "FINISHED")

    assert history(client, handle, "loss") == [(step, float(step)) for step in range(42)]
    assert math.isnan(history(client, handle, "bad")[0][1])
    assert history(client, handle, "worse") == [(0, sys.float_info.max)]
    assert client.get_run(handle.run_id).info.status == "FINISHED"
    figures = connect(server.uri).list_artifacts(handle.run_id, "figures")
    assert [figure.path for figure in figures] == ["figures/drift.svg"]
    assert caplog.text.count("takes no records") == 1
    assert caplog.text.count("takes records again") == 1
