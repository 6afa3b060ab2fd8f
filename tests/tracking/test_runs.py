import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from cdm_ray.config import ImageConfig, TrackingConfig, flatten, load_config
from cdm_ray.errors import ConfigError, redact
from cdm_ray.storage import path_of, write_whole
from cdm_ray.tracking import Tracker, finish_run, open_run, ui_command
from cdm_ray.tracking.runs import _artifact_location
from cdm_ray.tracking.server import resolve_uri

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens


def artifacts(client, run_id, folder):
    return [Path(item.path).name for item in client.list_artifacts(run_id, folder)]


def test_a_run_is_read_back_as_it_was_recorded(client, open_here, storage, tmp_path):
    Image.new("RGB", (400, 300), "red").save(tmp_path / "grid.png")
    (tmp_path / "drift.svg").write_text("<svg/>")
    (tmp_path / "config.yaml").write_text("seed: 0")
    handle = open_here("cp.weight=3", "run.seed=5")
    tracker = Tracker(pickle.loads(pickle.dumps(handle)))
    tracker.log_metrics({"loss/dsm": 0.5, "gradient_norm": 2.0}, step=10)
    tracker.log_metrics({"loss/dsm": 0.25}, step=20)
    tracker.log_image(tmp_path / "grid.png", "samples/ode", step=20)
    tracker.log_figure(tmp_path / "drift.svg")
    tracker.log_artifact(tmp_path / "config.yaml", "run")
    tracker.set_tag("checkpoint", "/runs/a/checkpoints/step-20")
    (tmp_path / "config.yaml").unlink()  # the tracker has its own copy
    assert tracker.close(timeout=30)
    assert finish_run(handle, "FINISHED")

    run = client.get_run(handle.run_id)
    config = load_config(ImageConfig, "digits", ["cp.weight=3", "run.seed=5"])
    assert run.info.run_name == "a run"
    assert run.info.status == "FINISHED"
    assert run.data.params.keys() == flatten(config).keys()
    assert run.data.params["cp.weight"] == "3.0"
    assert run.data.params["run.seed"] == "5"
    assert run.data.params["tracking.uri"] == "null"
    assert run.data.tags["checkpoint"] == "/runs/a/checkpoints/step-20"
    assert run.data.tags["version.torch"].startswith("2.")
    assert run.data.tags["version.python"] == ".".join(map(str, sys.version_info[:3]))
    history = client.get_metric_history(handle.run_id, "loss/dsm")
    assert [(point.step, point.value) for point in history] == [(10, 0.5), (20, 0.25)]

    assert run.info.artifact_uri.startswith(f"{(storage / 'mlartifacts').as_uri()}/")
    assert artifacts(client, handle.run_id, "figures") == ["drift.svg"]
    copy = client.download_artifacts(handle.run_id, "run/config.yaml", str(tmp_path))
    assert Path(copy).read_text() == "seed: 0"
    image, thumbnail = sorted(artifacts(client, handle.run_id, "images"), key=len)
    assert image.startswith("samples~ode+step+20+timestamp+")
    assert image.endswith(".png")
    assert thumbnail == image.replace(".png", "+compressed.webp")
    assert run.data.tags["mlflow.loggedImages"] == "True"
    assert list((handle.spool / "files").iterdir()) == []  # copies go once they have arrived


def test_git_revision_and_dirty_flag_are_those_of_the_checkout(client, open_here):
    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
        )

    tags = client.get_run(open_here().run_id).data.tags
    if git("ls-files", "--error-unmatch", "../../cdm_ray/tracking/runs.py").returncode:
        assert "git.dirty" not in tags
    else:
        assert tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD").stdout.strip()
        changes = git("status", "--porcelain", "--untracked-files=no", "../../cdm_ray").stdout
        assert tags["git.dirty"] == "true" or not changes


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_run_that_did_not_finish_says_so(client, open_here, status):
    handle = open_here()
    assert client.get_run(handle.run_id).info.status == "RUNNING"
    assert finish_run(handle, status)
    run = client.get_run(handle.run_id)
    assert run.info.status == status
    assert run.info.end_time >= run.info.start_time


def test_a_resumed_run_goes_on_under_its_id_without_doubled_points(client, open_here, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "grid.png")
    handle = open_here("train.images=1000")
    tracker = Tracker(handle)
    for step in range(1, 8):
        tracker.log_metrics({"loss": 1 / step}, step)
    tracker.log_image(tmp_path / "grid.png", "grid", step=6)
    tracker.close(timeout=30)
    finish_run(handle, "FAILED")

    again = open_here("train.images=2000")
    assert again == handle
    assert client.get_run(handle.run_id).info.status == "RUNNING"
    tracker = Tracker(again)
    for step in range(5, 11):  # back to the checkpoint of step 4
        tracker.log_metrics({"loss": 1 / step, "new": 0.0}, step)
    tracker.log_image(tmp_path / "grid.png", "grid", step=6)
    tracker.log_image(tmp_path / "grid.png", "grid", step=12)
    assert tracker.close(timeout=30)
    finish_run(again, "FINISHED")

    history = client.get_metric_history(handle.run_id, "loss")
    assert [(p.step, p.value) for p in history] == [(step, 1 / step) for step in range(1, 11)]
    assert [p.step for p in client.get_metric_history(handle.run_id, "new")] == list(range(5, 11))
    images = [name for name in artifacts(client, handle.run_id, "images") if name[-3:] == "png"]
    assert sorted(int(name.split("+")[2]) for name in images) == [6, 12]
    run = client.get_run(handle.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.images"] == "1000"  # MLflow keeps the first value
    assert run.data.tags["resumed.train.images"] == "2000"

    open_here("train.images=1000")
    assert client.get_run(handle.run_id).data.tags["resumed.train.images"] == "1000"


def test_a_run_deleted_on_the_server_is_replaced_and_that_is_logged(client, open_here, caplog):
    deleted = open_here()
    client.delete_run(deleted.run_id)
    handle = open_here()
    assert handle.run_id != deleted.run_id
    assert deleted.run_id in caplog.text
    assert "starting a new one" in caplog.text
    assert open_here() == handle


def test_a_deleted_experiment_is_refused_with_the_way_out(client, open_here):
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(ConfigError, match=r"tracking.experiment=gone: deleted.*mlflow experiments"):
        open_here("tracking.experiment=gone")


def test_without_an_answer_a_new_run_is_refused_and_a_remembered_one_goes_on(
    storage, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("cdm_ray.tracking.runs.RESUME_SECONDS", 0.1)
    config = load_config(ImageConfig, "digits", [f"tracking.uri={NOBODY}"])

    def open_it():
        return open_run(config, storage=storage, run_name="a", run_folder=tmp_path)

    with pytest.raises(ConfigError, match=rf"tracking.uri={NOBODY}: cannot open a run there"):
        open_it()
    (tmp_path / "mlflow_run.json").write_text(json.dumps({"run_id": "abc", "server": NOBODY}))
    handle = open_it()
    assert handle.run_id == "abc"
    assert "run abc goes on and its records are sent later" in caplog.text


def test_a_file_that_is_no_database_is_refused_at_once(storage, tmp_path):
    (tmp_path / "notes.db").write_text("no database " * 100)
    config = load_config(ImageConfig, "digits", [f"tracking.uri=sqlite:///{tmp_path}/notes.db"])
    with pytest.raises(ConfigError, match="file is not a database"):
        open_run(config, storage=storage, run_name="a", run_folder=tmp_path)


def test_credentials_and_the_environment_reach_neither_logs_nor_records(
    client, open_here, storage, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("SOME_API_TOKEN", "env-hunter2")
    handle = open_here(
        "data.path=https://me:hunter2@host/x?X-Amz-Signature=hunter2&v=1",
    )
    Tracker(handle).set_tag("checkpoint", "s3://me:hunter2@bucket/x")
    finish_run(handle, "FINISHED")
    run = client.get_run(handle.run_id)
    assert run.data.params["data.path"] == "https://***@host/x?X-Amz-Signature=***&v=1"
    assert "hunter2" not in str(run.to_dictionary())

    uri = "http://me:hunter2@127.0.0.1:9"
    config = load_config(ImageConfig, "digits", [f"tracking.uri={uri}"])
    with pytest.raises(ConfigError) as refusal:
        open_run(config, storage=storage, run_name="a", run_folder=tmp_path / "b")
    assert "hunter2" not in str(refusal.value)
    remote = type(handle)(uri, "abc", tmp_path / "spool")
    assert "hunter2" not in repr(remote) + ui_command(remote)
    tracker = Tracker(remote)
    tracker.log_metrics({"loss": 1.0}, step=1)
    assert not tracker.close(timeout=1.5)
    assert "takes no records" in caplog.text
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql+psycopg://u:p@ss@db:5432/x", "postgresql+psycopg://***@db:5432/x"),
        ("at http://token@host: refused", "at http://***@host: refused"),
        ("https://h/a?access_token=1&part=2", "https://h/a?access_token=***&part=2"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("a plain value: 3@4", "a plain value: 3@4"),
    ],
)
def test_redaction_takes_credentials_and_nothing_else(text, shown):
    assert redact(text) == shown


def test_a_run_at_a_url_needs_a_server_and_keeps_its_records_here(
    client, memory, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runs = path_of(f"{memory}/runs")

    def open_it(*overrides):
        config = load_config(ImageConfig, "digits", overrides)
        return open_run(config, storage=runs, run_name="a", run_folder=runs / "a")

    with pytest.raises(ConfigError, match=r"^run.storage=memory://.*set tracking.uri or MLFLOW_"):
        open_it()
    uri = f"tracking.uri={client.tracking_uri}"
    handle = open_it(uri, "tracking.experiment=far")
    assert handle.spool.is_relative_to(tmp_path)
    assert handle.run_id in handle.spool.parts
    database = Path(client.tracking_uri.removeprefix("sqlite:///"))
    experiment = client.get_experiment_by_name("far")
    assert experiment.artifact_location == (database.parent / "mlartifacts").as_uri()

    Image.new("L", (300, 300)).save(tmp_path / "grid.png")
    write_whole(runs / "a" / "grid.png", (tmp_path / "grid.png").read_bytes())
    tracker = Tracker(handle)
    tracker.log_figure(runs / "a" / "grid.png")
    tracker.log_image(runs / "a" / "grid.png", "samples", 1)
    assert tracker.close(30)
    names = [a.path for a in client.list_artifacts(handle.run_id, "figures")]
    assert names == ["figures/grid.png"]
    assert len(client.list_artifacts(handle.run_id, "images")) == 2
    assert open_it(uri, "tracking.experiment=far") == handle  # remembered at the URL


def test_files_of_a_new_experiment_have_to_belong_somewhere(memory):
    runs = path_of(memory)
    assert _artifact_location("http://tracking:5000", "far", runs) is None
    with pytest.raises(ConfigError, match=r"--artifact-location"):
        _artifact_location("postgresql://db/x", "far", runs)


@pytest.mark.parametrize(
    ("given", "variable", "resolved"),
    [
        (None, None, "sqlite:////runs/mlflow.db"),
        (None, "", "sqlite:////runs/mlflow.db"),
        (None, "http://tracking:5000", "http://tracking:5000"),
        ("http://mine:5000", "http://tracking:5000", "http://mine:5000"),
        ("sqlite:///here/m.db", None, f"sqlite:///{os.getcwd()}/here/m.db"),
        ("sqlite:////there/m.db", None, "sqlite:////there/m.db"),
        ("postgresql+psycopg://db/x", None, "postgresql+psycopg://db/x"),
    ],
)
def test_the_server_is_the_configured_one_then_the_variable_then_sqlite(
    given, variable, resolved, monkeypatch
):
    if variable is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    assert resolve_uri(TrackingConfig(uri=given), Path("/runs")) == resolved


@pytest.mark.parametrize("uri", ["./mlruns", "file:///mlruns", "sqlite://", "ftp://host"])
def test_what_is_no_tracking_server_is_refused_with_its_source(uri, monkeypatch):
    with pytest.raises(ConfigError, match=f"^tracking.uri={uri}: not a tracking server; use http"):
        resolve_uri(TrackingConfig(uri=uri), Path("/runs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=f"^MLFLOW_TRACKING_URI={uri}: not a tracking server"):
        resolve_uri(TrackingConfig(), Path("/runs"))


def test_long_values_are_cut_to_what_mlflow_takes(client, open_here):
    handle = open_here(f"data.source={'x' * 7000}")
    assert client.get_run(handle.run_id).data.params["data.source"] == "x" * 6000


def test_the_ui_command_names_the_database_and_stays_on_this_machine(open_here, storage):
    command = ui_command(open_here())
    assert command.endswith(
        f" ui --backend-store-uri 'sqlite:///{storage}/mlflow.db' --host 127.0.0.1 --port 5000"
    )
    executable = command.split()[0]
    assert executable == "mlflow" or Path(executable).is_file()


def test_processes_that_start_at_once_share_one_new_database(tmp_path):
    script = (
        "import sys; from pathlib import Path\n"
        "from cdm_ray.config import ImageConfig, load_config\n"
        "from cdm_ray.tracking import open_run\n"
        "config = load_config(ImageConfig, 'digits', [])\n"
        "storage, name = Path(sys.argv[1]), sys.argv[2]\n"
        "open_run(config, storage=storage, run_name=name, run_folder=storage / name)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), name],
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert len({(tmp_path / n / "mlflow_run.json").read_text() for n in "ab"}) == 2


def test_importing_the_module_loads_no_mlflow_and_sets_no_environment():
    script = (
        "import os, sys; before = dict(os.environ); import cdm_ray.tracking\n"
        "assert 'mlflow' not in sys.modules; assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_logging_here_is_quiet(open_here, caplog):
    with caplog.at_level(logging.WARNING, logger="cdm_ray"):
        finish_run(open_here(), "FINISHED")
    assert not [record for record in caplog.records if record.name.startswith("cdm_ray")]
