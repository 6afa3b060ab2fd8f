"""The MLflow run of a training run: opened or continued, described, and ended truthfully."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cdm_ray.config import JobConfig, SweepConfig, flatten
from cdm_ray.errors import ConfigError, error_line, redact
from cdm_ray.storage import AnyPath, write_whole
from cdm_ray.tracking.server import (
    RunHandle,
    connect,
    is_database,
    resolve_uri,
    sqlite_file,
)
from cdm_ray.tracking.spool import Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

EndStatus = Literal["FINISHED", "FAILED", "KILLED"]

RUN_FILE = "mlflow_run.json"
PACKAGES = ("torch", "ray", "deepspeed", "webdataset", "mlflow")
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Opens the UI on runs and their charts; without it, on the pages for language-model traces."""
MAX_VALUE_LENGTH = 6000
"""MLflow's limit for a parameter's value."""
MAX_PER_REQUEST = 100
"""MLflow's limit for the parameters, and for the tags, of one request."""
RESUME_SECONDS, FINISH_SECONDS = 10.0, 60.0


def open_run(
    config: JobConfig | SweepConfig,
    *,
    storage: AnyPath,
    run_name: str,
    run_folder: AnyPath,
    parent: str | None = None,
) -> RunHandle:
    """Start the MLflow run of a run folder, or continue the one that it remembers; as a child of
    the run `parent`, if one is given.

    Parameters are the fields of the configuration as `section.field`, tags the git revision and
    the versions; what differs when a run is continued becomes a tag `resumed.NAME`. Raises
    ConfigError when no run can be opened; a remembered run needs no server to be continued.
    """
    uri = resolve_uri(config.tracking, storage)
    remembered = _remembered(run_folder)
    try:
        client = _database(uri)
        run = _continued(client, remembered)
        if run is None:
            remembered = None
            experiment = _experiment(client, uri, config.tracking.experiment, storage)
            tags = {} if parent is None else {"mlflow.parentRunId": parent}
            run = client.create_run(experiment, run_name=run_name, tags=tags)
            _remember(run_folder, uri, run.info.run_id)
        _describe(client, run, config)
        run_id = run.info.run_id
    except ConfigError:
        raise
    except Exception as error:  # MLflow's, a database driver's, or a missing driver's own class
        if remembered is None or remembered["server"] != redact(uri):
            raise ConfigError(
                f"tracking.uri={redact(uri)}: cannot open a run there ({error_line(error)}); "
                "start that server, or leave out tracking.uri and MLFLOW_TRACKING_URI to record "
                "into run.storage"
            ) from error
        run_id = remembered["run_id"]
        log.warning(
            "MLflow at %s does not answer (%s); run %s goes on and its records are sent later",
            redact(uri),
            error_line(error),
            run_id,
        )
    handle = RunHandle(uri, run_id, _spool(run_folder, run_id))
    if remembered is not None:
        tracker = Tracker(handle)
        tracker.set_status("RUNNING")
        tracker.close(RESUME_SECONDS)
    return handle


def finish_run(handle: RunHandle, status: EndStatus) -> bool:
    """Send what is left, then the status; returns whether everything has arrived."""
    tracker = Tracker(handle)
    tracker.set_status(status)
    arrived = tracker.close(FINISH_SECONDS)
    if not arrived:
        log.warning(
            "run %s is %s, but MLflow at %s does not know yet; %s keeps its records, and running "
            "the same command again sends them",
            handle.run_id,
            status,
            redact(handle.uri),
            handle.spool,
        )
    return arrived


def end_run_of(run_folder: AnyPath, like: RunHandle, status: EndStatus) -> None:
    """End the MLflow run of a run folder that was stopped from outside, at the server of `like`;
    nothing if the folder has none."""
    if (remembered := _remembered(run_folder)) is not None:
        run_id = remembered["run_id"]
        finish_run(RunHandle(like.uri, run_id, _spool(run_folder, run_id)), status)


def ui_command(handle: RunHandle) -> str:
    """The command that opens the MLflow UI on the run's database, on this machine only; for a
    server, which has its own UI, its address."""
    if not is_database(handle.uri):
        return redact(handle.uri)
    beside = Path(sys.executable).with_name("mlflow")
    mlflow = shutil.which("mlflow")
    if mlflow is not None and Path(mlflow) == beside:
        executable = "mlflow"
    elif beside.is_relative_to(Path.cwd()):
        executable = str(beside.relative_to(Path.cwd()))
    else:
        executable = str(beside)
    store = shlex.quote(redact(handle.uri))
    return f"{shlex.quote(executable)} ui --backend-store-uri {store} --host 127.0.0.1 --port 5000"


def _spool(run_folder: AnyPath, run_id: str) -> Path:
    """Records are appended to files, which object stores cannot do."""
    if isinstance(run_folder, Path):
        return run_folder.absolute() / "spool" / run_id
    return Path(tempfile.gettempdir(), f"cdm_ray-{os.getuid()}", "spool", run_id)


def _remembered(run_folder: AnyPath) -> dict[str, str] | None:
    path = run_folder / RUN_FILE
    return json.loads(path.read_text()) if path.exists() else None


def _remember(run_folder: AnyPath, uri: str, run_id: str) -> None:
    content = json.dumps({"run_id": run_id, "server": redact(uri)})
    write_whole(run_folder / RUN_FILE, content.encode())


def _database(uri: str) -> MlflowClient:
    """A client whose database exists: two processes that create its tables at once both fail."""
    with _alone(sqlite_file(uri)):
        if (database := sqlite_file(uri)) is not None:
            with closing(sqlite3.connect(database)) as connection:
                connection.execute("PRAGMA schema_version")  # MLflow retries a wrong file for long
        client = connect(uri)
        client.search_experiments(max_results=1)
    return client


@contextmanager
def _alone(database: Path | None) -> Iterator[None]:
    """One process at a time, if the database is a file."""
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f".{database.name}.lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def _experiment(client: MlflowClient, uri: str, name: str, storage: AnyPath) -> str:
    """Id of the experiment, which is created if there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = _artifact_location(uri, name, storage)
        try:
            return client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
            assert found is not None, "it was created a moment ago"
    if found.lifecycle_stage != "active":
        raise ConfigError(
            f"tracking.experiment={name}: deleted at {redact(uri)}; choose another name, or "
            f"restore it with `mlflow experiments restore --experiment-id {found.experiment_id}`"
        )
    return found.experiment_id


def _artifact_location(uri: str, experiment: str, storage: AnyPath) -> str | None:
    """Where a new experiment keeps its files. A server knows that by itself; without one, MLflow
    would take the working folder."""
    if not is_database(uri):
        return None
    folder, database = storage, sqlite_file(uri)
    if not isinstance(folder, Path) and database is not None:
        folder = database.parent  # MLflow takes few kinds of URLs, each with a package of its own
    if not isinstance(folder, Path):
        raise ConfigError(
            f"tracking.experiment={experiment}: {redact(uri)} has none of this name, and where its "
            f"files belong does not follow from run.storage={redact(str(storage))}; use an `mlflow "
            "server`, or create the experiment with `mlflow experiments create "
            f"--experiment-name {experiment} --artifact-location LOCATION`"
        )
    return (folder.absolute() / "mlartifacts").as_uri()


def _continued(client: MlflowClient, remembered: dict[str, str] | None) -> Run | None:
    """The remembered run, None if there is none or the server has it no more."""
    from mlflow.exceptions import MlflowException

    if remembered is None:
        return None
    try:
        run = client.get_run(remembered["run_id"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        run = None
    if run is None or run.info.lifecycle_stage != "active":
        log.warning(
            "run %s of MLflow at %s is no longer there; starting a new one",
            remembered["run_id"],
            remembered["server"],
        )
        return None
    return run


def _describe(client: MlflowClient, run: Run, config: JobConfig | SweepConfig) -> None:
    """Log parameters and tags; of a continued run, only what is new."""
    from mlflow.entities import Param, RunTag

    params = {key: _text(value) for key, value in flatten(config).items()}
    tags = _environment()
    known = run.data.params | run.data.tags
    changed = {
        f"resumed.{key}": value
        for key, value in (params | tags).items()
        if key in known and known.get(f"resumed.{key}", known[key]) != value
    }
    new_params = [Param(k, v) for k, v in params.items() if k not in known]
    new_tags = [RunTag(k, v) for k, v in tags.items() if k not in known]
    new_tags += [RunTag(k, v) for k, v in changed.items()]
    for start in range(0, max(len(new_params), len(new_tags)), MAX_PER_REQUEST):
        part = slice(start, start + MAX_PER_REQUEST)
        client.log_batch(
            run.info.run_id, params=new_params[part], tags=new_tags[part], synchronous=True
        )


def _text(value: object) -> str:
    """As it is written in an override, without credentials, cut to what MLflow takes."""
    text = value if isinstance(value, str) else json.dumps(value)
    return redact(text)[:MAX_VALUE_LENGTH]


def _environment() -> dict[str, str]:
    """Tags: versions, platform, and the git revision where the package is in a checkout."""
    tags = {f"version.{name}": metadata.version(name) for name in PACKAGES}
    tags |= {"version.python": platform.python_version(), "platform": platform.platform()}
    return tags | _revision()


def _revision() -> dict[str, str]:
    source = Path(__file__)
    if shutil.which("git") is None or _git("ls-files", "--error-unmatch", source.name) is None:
        return {}
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "mlflow.source.git.commit": _git("rev-parse", "HEAD") or "",
        "git.dirty": "true" if changes else "false",
    }


def _git(*arguments: str) -> str | None:
    """Output of a git command in this package's folder, None if it fails."""
    done = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else None
