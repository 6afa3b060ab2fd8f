"""The command line of every job: `job.py [RECIPE] [section.field=value ...] [--dry-run]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from cdm_ray.config import Section, describe, load_config, recipe_names
from cdm_ray.errors import ConfigError, RunFailed

C = TypeVar("C", bound=Section)


def run_job(
    root: type[C],
    main: Callable[[C, bool], None],
    *,
    description: str,
    examples: str,
    default_recipe: str | None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse the command line, load the configuration and call `main(config, dry_run)`.

    Returns the exit code: 0; 2 after a user's mistake and 1 after a failed run, which are one line
    on stderr.
    """
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=description,
        epilog=_epilog(root, examples),
    )
    parser.add_argument(
        "recipe_and_overrides",
        nargs="*",
        metavar="RECIPE | section.field=value",
        help=f"a recipe ({', '.join(recipe_names())}) or a YAML file (default: "
        f"{default_recipe or 'the defaults below'}), then any fields to change",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be done and start nothing"
    )
    options = parser.parse_intermixed_args(arguments)
    recipe, overrides = _split(options.recipe_and_overrides, default_recipe)
    try:
        main(load_config(root, recipe, overrides), options.dry_run)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


def _split(words: Sequence[str], default_recipe: str | None) -> tuple[str | None, list[str]]:
    """The recipe, if the first word is none of the overrides, and the overrides."""
    if words and "=" not in words[0]:
        return words[0], list(words[1:])
    return default_recipe, list(words)


def _epilog(root: type[Section], examples: str) -> str:
    lines = ["examples:"]
    lines += [f"  {line}" for line in examples.strip().splitlines()]
    lines += ["", "fields (section.field = default):"]
    for key, default, text in describe(root):
        lines += [f"  {key} = {default}", f"      {text}"]
    return "\n".join(lines)
