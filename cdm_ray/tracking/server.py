"""The tracking server: which one, how to connect, and what may be said about it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cdm_ray.config import TrackingConfig
from cdm_ray.errors import ConfigError, redact
from cdm_ray.storage import AnyPath

if TYPE_CHECKING:
    from mlflow import MlflowClient

SERVERS = ("http", "https", "databricks", "postgresql", "mysql", "mssql")
"""Schemes of what answers over a network; sqlite is a file."""

_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the tracker retries; MLflow would for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it prints the URL with its password
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing leaves the machine unasked
}


@dataclass(frozen=True)
class RunHandle:
    """An open MLflow run, as sent to the process that records into it."""

    uri: str = field(repr=False)  # may hold a password
    run_id: str
    spool: Path
    """Folder of the records of this run: on storage that every node sees, or where that is a URL,
    on the disk of the machine that records."""


def connect(uri: str) -> MlflowClient:
    """A client for the server or database.

    MLflow is imported here, so that processes without a tracker do not load it. Its settings in
    the environment are the user's where there are any.
    """
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def resolve_uri(tracking: TrackingConfig, storage: AnyPath) -> str:
    """`tracking.uri`, else MLFLOW_TRACKING_URI, else sqlite in `storage`; sqlite paths absolute.

    Raises ConfigError for what MLflow cannot write to, as sqlite at a URL.
    """
    source, uri = "tracking.uri", tracking.uri
    if not uri:
        source, uri = "MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        if not isinstance(storage, Path):
            raise ConfigError(
                f"run.storage={redact(str(storage))}: MLflow's default database cannot lie at a "
                "URL; set tracking.uri or MLFLOW_TRACKING_URI to http://HOST:PORT of an `mlflow "
                "server` or to sqlite:///FILE"
            )
        return f"sqlite:///{storage.absolute()}/mlflow.db"
    if (database := sqlite_file(uri)) is not None:
        return f"sqlite:///{database.absolute()}"
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme not in SERVERS:
        raise ConfigError(
            f"{source}={redact(uri)}: not a tracking server; use http://HOST:PORT of an "
            "`mlflow server`, sqlite:///FILE or another database URL"
        )
    return uri


def sqlite_file(uri: str) -> Path | None:
    """Path of the database file, None if the URI names no sqlite file."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)) if uri.startswith(prefix) else None


def is_database(uri: str) -> bool:
    """Whether MLflow reads and writes the database itself, without a server of its own."""
    return not uri.startswith(("http", "databricks"))
