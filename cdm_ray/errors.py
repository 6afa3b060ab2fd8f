"""The two errors that end a program with one line, and what such a line may tell."""

from __future__ import annotations

import re

_USER_INFO = re.compile(r"://[^/\s?#]*@")
_SECRET_VALUE = re.compile(
    r"([?&;][\w.-]*(?:token|key|secret|signature|sig|passw(?:or)?d|pwd|credential)[\w.-]*=)[^&;\s'\"]+",
    re.IGNORECASE,
)


class ConfigError(ValueError):
    """A mistake of the user's: one line that names the key or file and what would be right."""


class RunFailed(RuntimeError):
    """A run that cannot go on through no mistake of the command's, and that a restart from the
    checkpoint would only bring to the same end; one line that says why and what to do."""


def redact(text: str) -> str:
    """The text with user names, passwords and keys in URLs replaced by ***."""
    return _SECRET_VALUE.sub(r"\1***", _USER_INFO.sub("://***@", text))


def one_line(error: Exception) -> str:
    """The error's message, or its class when it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def error_line(error: Exception) -> str:
    """Message of an error in one line that may be shown: no credentials, at most 300 characters."""
    line = redact(one_line(error))
    return line if len(line) <= 300 else f"{line[:297]}..."
