"""The command line of every job: `job.py WHAT [section.field=value ...] [--dry-run]`, where WHAT is
a recipe or a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cdm_ray.checkpoint import CONFIG_FILE, Checkpoint, open_newest
from cdm_ray.config import ImageConfig, Section, describe, load_config, recipe_names
from cdm_ray.errors import ConfigError, RunFailed

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
        f"a recipe ({', '.join(recipe_names())}) or a YAML file (default: "
        f"{default_recipe or 'the defaults below'})"
    )
    parser = _parser(root, "RECIPE", what, description, examples)
    options = parser.parse_intermixed_args(arguments)
    recipe, overrides = _split(options.words)
    return _exit_code(
        lambda: main(load_config(root, recipe or default_recipe, overrides), options.dry_run)
    )


def run_checkpoint_job(
    main: Callable[[ImageConfig, Checkpoint, bool], None],
    *,
    description: str | None,
    examples: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """As `run_job`, for `main(config, checkpoint, dry_run)`: the first word is a checkpoint, or a
    run's folder for its newest one, and the configuration is the checkpoint's own with the
    overrides."""
    what = "a checkpoint's folder, or a run's folder for its newest checkpoint"
    parser = _parser(ImageConfig, "CHECKPOINT", what, description, examples)
    options = parser.parse_intermixed_args(arguments)
    folder, overrides = _split(options.words)

    def call() -> None:
        if folder is None:
            raise ConfigError(f"no checkpoint given; the first word has to be {what}")
        checkpoint = open_newest(Path(folder))
        config = load_config(ImageConfig, str(checkpoint.folder / CONFIG_FILE), overrides)
        main(config, checkpoint, options.dry_run)

    return _exit_code(call)


def _exit_code(call: Callable[[], None]) -> int:
    try:
        call()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


def _parser(
    root: type[Section], subject: str, what: str, description: str | None, examples: str
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=description,
        epilog=_epilog(root, examples),
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


def _epilog(root: type[Section], examples: str) -> str:
    lines = ["examples:"]
    lines += [f"  {line}" for line in examples.strip().splitlines()]
    lines += ["", "fields (section.field = default):"]
    for key, default, text in describe(root):
        lines += [f"  {key} = {default}", f"      {text}"]
    return "\n".join(lines)
