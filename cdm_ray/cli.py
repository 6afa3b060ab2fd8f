"""The command line of every job: `job.py WHAT [section.field=value ...] [--dry-run]`, where WHAT is
a recipe or a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from cdm_ray.checkpoint import CONFIG_FILE, Checkpoint, open_newest
from cdm_ray.config import (
    JobConfig,
    Section,
    describe,
    is_of,
    load_config,
    read_config,
    recipe_names,
)
from cdm_ray.errors import ConfigError, RunFailed, redact
from cdm_ray.storage import path_of

C = TypeVar("C", bound=Section)


def run_job(
    root: type[C],
    main: Callable[[C, bool], None],
    *,
    description: str | None,
    examples: str,
    default_recipe: str | None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse the command line, load the configuration and call `main(config, dry_run)`.

    Returns the exit code: 0; 2 after a user's mistake and 1 after a failed run, which are one line
    on stderr.
    """
    what = (
        f"a recipe ({', '.join(recipe_names(root))}) or a YAML file (default: "
        f"{default_recipe or 'the defaults below'})"
    )
    parser = _parser([root], "RECIPE", what, description, examples)
    options = parser.parse_intermixed_args(arguments)
    recipe, overrides = _split(options.words)
    return exit_code(
        lambda: main(load_config(root, recipe or default_recipe, overrides), options.dry_run)
    )


CheckpointMains = Mapping[type[JobConfig], Callable[[Any, Checkpoint, bool], None]]
"""main(config, checkpoint, dry_run) for each kind of run that a job takes."""


def run_checkpoint_job(
    mains: CheckpointMains,
    *,
    description: str | None,
    examples: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """As `run_job`, for `main(config, checkpoint, dry_run)`, one for each kind of run that the job
    takes: the first word is a checkpoint, or a run's folder for its newest one, and the
    configuration is the checkpoint's own with the overrides, which may not change what it learned.
    """
    what = "a checkpoint's folder, or a run's folder for its newest checkpoint"
    parser = _parser(list(mains), "CHECKPOINT", what, description, examples)
    options = parser.parse_intermixed_args(arguments)
    folder, overrides = _split(options.words)

    def call() -> None:
        if folder is None:
            raise ConfigError(f"no checkpoint given; the first word has to be {what}")
        checkpoint = open_newest(path_of(folder))
        root = _kind_of_run(checkpoint, list(mains))
        file = checkpoint.folder / CONFIG_FILE
        config = read_config(root, file, overrides)
        _check_unchanged(checkpoint, read_config(root, file), config)
        mains[root](config, checkpoint, options.dry_run)

    return exit_code(call)


def _kind_of_run(checkpoint: Checkpoint, roots: Sequence[type[JobConfig]]) -> type[JobConfig]:
    for root in roots:
        if is_of(root, checkpoint.folder / CONFIG_FILE):
            return root
    raise ConfigError(
        f"{checkpoint.folder}: not a checkpoint that this job takes; it is for those of "
        f"{' and '.join(root.JOB for root in roots)}"
    )


def _check_unchanged(checkpoint: Checkpoint, trained: JobConfig, config: JobConfig) -> None:
    if changed := config.changed_from(trained):
        raise ConfigError(
            f"{checkpoint.folder}: what was learned cannot be changed afterwards "
            f"({'; '.join(changed.values())}); leave that out"
        )


def exit_code(call: Callable[[], None]) -> int:
    """0, or the answer in one line and 2 after a user's mistake, 1 after a failure."""
    try:
        call()
    except ConfigError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 2
    except RunFailed as failure:
        print(f"error: {redact(str(failure))}", file=sys.stderr)
        return 1
    return 0


def _parser(
    roots: Sequence[type[Section]], subject: str, what: str, description: str | None, examples: str
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=description,
        epilog=_epilog(roots, examples),
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar=f"{subject} | section.field=value",
        help=f"{what}, then any fields to change",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be done and start nothing"
    )
    return parser


def _split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The subject, if the first word is none of the overrides, and the overrides."""
    if words and "=" not in words[0]:
        return words[0], list(words[1:])
    return None, list(words)


def _epilog(roots: Sequence[type[Section]], examples: str) -> str:
    lines = ["examples:"]
    lines += [f"  {line}" for line in examples.strip().splitlines()]
    for root in roots:
        of = f" of a run of {root.JOB}" if issubclass(root, JobConfig) and len(roots) > 1 else ""
        lines += ["", f"fields{of} (section.field = default):"]
        for key, default, text in describe(root):
            lines += [f"  {key} = {default}", f"      {text}"]
    return "\n".join(lines)
