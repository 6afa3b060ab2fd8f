"""The two errors that end a program with one line."""

from __future__ import annotations


class ConfigError(ValueError):
    """A mistake of the user's: one line that names the key or file and what would be right."""


class RunFailed(RuntimeError):
    """A run that cannot go on through no mistake of the command's, and that a restart from the
    checkpoint would only bring to the same end; one line that says why and what to do."""
