"""Recipes, `section.field=value` overrides and the explanation of what is wrong with them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from cdm_ray.config.base import Section
from cdm_ray.errors import ConfigError
from cdm_ray.storage import AnyPath

C = TypeVar("C", bound=Section)


_PARTS = "parts"


def recipe_names(root: type[Section]) -> list[str]:
    """Names of the recipes for `root` that ship with the package."""
    return _names_in(_recipes(root))


def part_names() -> list[str]:
    """Names of what recipes that ship with the package share: no runs by themselves."""
    return [f"{_PARTS}/{name}" for name in _names_in(_package().joinpath(_PARTS))]


def load_config(root: type[C], recipe: str | None, overrides: Sequence[str] = ()) -> C:
    """Recipe (one of `recipe_names(root)`, a YAML file, or None for the defaults) with overrides.

    A recipe that `extends` another, or several from left to right, starts from their fields; they
    are named as recipes of the package, parts included, or as files relative to its own. Their
    sections are merged, and any other value replaces the one before.
    Raises ConfigError for an unknown recipe, recipes that extend each other, unknown keys, wrong
    types and values that do not fit together.
    """
    values: dict[str, Any] = {}
    if recipe is not None:
        values = _read_recipe(root, recipe, recipe_names(root))
        values.setdefault("recipe", Path(recipe).stem if _is_file(recipe) else recipe)
    for override in overrides:
        _apply_override(values, override)
    return build_config(root, values)


def read_config(root: type[C], file: AnyPath, overrides: Sequence[str] = ()) -> C:
    """A configuration that `to_yaml` wrote, with overrides; raises ConfigError as `load_config`."""
    values = _parse(str(file), file.read_text())
    for override in overrides:
        _apply_override(values, override)
    return build_config(root, values)


def is_of(root: type[Section], file: AnyPath) -> bool:
    """Whether a YAML file is a configuration of this kind, by the sections that it has."""
    return set(_parse(str(file), file.read_text())) <= set(root.model_fields)


def build_config(root: type[C], values: dict[str, Any]) -> C:
    """Validate nested values; the message of a ConfigError is one line per mistake."""
    try:
        return root.model_validate(values)
    except ValidationError as error:
        messages = [_explain(root, dict(entry)) for entry in error.errors()]
        raise ConfigError("; ".join(messages)) from None


def to_yaml(config: Section) -> str:
    """YAML text that `load_config` reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(config: Section) -> dict[str, Any]:
    """`section.field` -> plain value of every field."""
    flat: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{name}.{field}": inner for field, inner in value.items()}
        else:
            flat[name] = value
    return flat


def set_field(values: dict[str, Any], key: str, value: Any) -> None:
    """Put the value of `section.field` into nested values. Raises ConfigError if there is no
    section in its place."""
    *sections, field = key.split(".")
    node = values
    for depth, section in enumerate(sections):
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: {'.'.join(sections[: depth + 1])} has no fields")
    node[field] = value


def describe(root: type[Section], prefix: str = "") -> Iterable[tuple[str, str, str]]:
    """(key, default, help) of every field, for --help."""
    for name, field in root.model_fields.items():
        key = f"{prefix}{name}"
        if isinstance(field.default, Section):
            yield from describe(type(field.default), f"{key}.")
        else:
            default = json.dumps(field.default) if field.default is not None else "null"
            yield key, default, " ".join((field.description or "").split())


def _package() -> Traversable:
    return resources.files("cdm_ray.recipes")


def _recipes(root: type[Section]) -> Traversable:
    """Folder of the recipes of one kind of run."""
    folder = getattr(root, "RECIPES", "")
    return _package().joinpath(folder) if folder else _package()


def _names_in(folder: Traversable) -> list[str]:
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _is_file(recipe: str) -> bool:
    """Whether a recipe is given as a file and not as a name of the package's."""
    return Path(recipe).suffix in {".yaml", ".yml"}


def _read_recipe(
    root: type[Section], recipe: str, known: Sequence[str], extended_by: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Fields of a recipe over those of the recipes that it extends; names are among `known`."""
    values = _parse(recipe, _text(root, recipe, known, extended_by))
    merged: dict[str, Any] = {}
    for base in _bases(recipe, values.pop("extends", [])):
        chain = (*extended_by, recipe)
        if _identity(base) in map(_identity, chain):
            raise ConfigError(f"recipe {chain[0]}: extends itself: {' -> '.join((*chain, base))}")
        fields = _read_recipe(root, base, [*recipe_names(root), *part_names()], chain)
        fields.pop("recipe", None)  # a run is called after the recipe that was asked for
        merged = _merge(merged, fields)
    return _merge(merged, values)


def _text(
    root: type[Section], recipe: str, known: Sequence[str], extended_by: tuple[str, ...]
) -> str:
    by = f", which {extended_by[-1]} extends" if extended_by else ""
    if not _is_file(recipe):
        if recipe in known:
            folder = _package() if recipe.startswith(f"{_PARTS}/") else _recipes(root)
            return folder.joinpath(f"{recipe}.yaml").read_text()
        near = difflib.get_close_matches(recipe, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"unknown recipe '{recipe}'{by}; {hint}use one of {', '.join(known)}, or a .yaml file"
        )
    if not Path(recipe).is_file():
        raise ConfigError(f"recipe {recipe}{by}: no such file")
    return Path(recipe).read_text()


def _parse(recipe: str, text: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(
            f"recipe {recipe}: not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {recipe}: must be a mapping of sections, not {values!r}")
    return values


def _bases(recipe: str, extends: Any) -> list[str]:
    """The recipes that `extends` names; files relative to the folder of the recipe's file."""
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"recipe {recipe}: extends={extends!r} must be the name of a recipe or a list of names"
        )
    folder = Path(recipe).parent
    return [str(folder / name) if _is_file(name) else name for name in names]


def _identity(recipe: str) -> str:
    return str(Path(recipe).resolve()) if _is_file(recipe) else recipe


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Fields of both, sections merged, what is `above` where both have a field."""
    merged = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _merge(below[key], above[key])
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"'{override}' is not an override; write section.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: '{text}' is not a YAML value") from None
    set_field(values, key, value)


def _explain(root: type[Section], error: dict[str, Any]) -> str:
    """One line for one pydantic error: the key's full path, what is wrong, the nearest key."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest_key(root, location)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message if message.startswith(key) else f"{key}: {message}"
    field = root.model_fields.get(key)
    is_section = field is not None and isinstance(field.default, Section)
    if is_section and not isinstance(error["input"], dict):
        message = "is a section; set its fields, e.g. " + _example_field(root, key)
    return f"{key}={error['input']!r}: {message[0].lower()}{message[1:]}"


def _example_field(root: type[Section], section: str) -> str:
    default = root.model_fields[section].default
    if isinstance(default, Section):
        return f"{section}.{next(iter(type(default).model_fields))}=..."
    return f"{section}=..."


def _nearest_key(root: type[Section], location: list[str]) -> str:
    """The most similar key, looked for in the same section first, then everywhere."""
    known = [key for key, _, _ in describe(root)]
    same = [key for key in known if key.split(".")[:-1] == location[:-1]]
    sections = list(root.model_fields) if len(location) == 1 else []
    wanted = ".".join(location)
    near = (
        difflib.get_close_matches(wanted, same + sections, n=1, cutoff=0.7)
        or [key for key in known if key.split(".")[-1] == location[-1]]
        or difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    )
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(sections or same)}"
