"""An axis of a sweep: a field, the values that it is given, and when it matters."""

from __future__ import annotations

import difflib
import json
import math
from typing import Any, Literal

from pydantic import model_serializer, model_validator

from cdm_ray.config.base import Section, parse_count

KINDS = ("choice", "uniform", "loguniform", "int")


class Axis(Section):
    """A field that is varied: {choice: [...]}, {uniform: [low, high]}, {loguniform: [low, high]} or
    {int: [low, high]}, bounds included; with `when: {field: value or values}` only in the trials
    whose other axis or field has one of these values."""

    kind: Literal["choice", "uniform", "loguniform", "int"]
    """How the values are distributed."""
    values: tuple[Any, ...]
    """The choices, or the lower and the upper bound."""
    when: dict[str, tuple[Any, ...]] = {}
    """What else has to be the case: field and values, of which it has one."""

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, written: Any) -> Any:
        if isinstance(written, Axis):
            return written
        if not isinstance(written, dict):
            raise ValueError(f"{written!r} is no axis; write e.g. {{choice: [0.1, 1, 10]}}")
        known = (*KINDS, "when")
        for key in written:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
                raise ValueError(f"unknown key {key}; {hint}")
        given = [kind for kind in KINDS if kind in written]
        if len(given) != 1:
            raise ValueError(f"has {' and '.join(given) or 'none'} of {', '.join(KINDS)}; give one")
        kind = given[0]
        values = _choices(written[kind]) if kind == "choice" else _bounds(kind, written[kind])
        return {"kind": kind, "values": values, "when": _conditions(written.get("when", {}))}

    @model_serializer
    def _to_file(self) -> dict[str, Any]:
        when = {key: list(allowed) for key, allowed in self.when.items()}
        return {self.kind: list(self.values)} | ({"when": when} if when else {})

    def takes(self, value: Any) -> bool:
        """Whether it can have exactly this value; one of a continuous range is never met."""
        if self.kind == "choice":
            return value in self.values
        low, high = self.values
        return (
            self.kind == "int"
            and _is_finite(value)
            and low <= value <= high
            and value == int(value)
        )

    @property
    def probes(self) -> list[Any]:
        """Values that tell whether all are valid: the choices, or the bounds and one between."""
        if self.kind == "choice":
            return list(self.values)
        low, high = self.values
        if self.kind == "int":
            return list(dict.fromkeys([low, high, low + 1]))
        share = (math.sqrt(5) - 1) / 2  # not whole, for fields that are
        if self.kind == "loguniform":
            return [low, high, low * (high / low) ** share]
        return [low, high, low + (high - low) * share]


def as_number(value: Any) -> Any:
    """YAML takes 1e-3 and 50k for text, configurations for numbers; anything else is left."""
    if not isinstance(value, str):
        return value
    for read in (parse_count, float):
        try:
            return read(value)
        except ValueError:
            continue
    return value


def text_of(value: Any) -> str:
    """A value as short text: numbers without needless digits, the rest as in YAML."""
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(text_of, value))}]"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _choices(given: Any) -> list[Any]:
    if not isinstance(given, list) or not given:
        raise ValueError(f"choice={given!r} must be a list of values")
    values = [as_number(value) for value in given]
    texts = [text_of(value) for value in values]
    for text in texts:
        if texts.count(text) > 1:
            raise ValueError(f"choice={given} has {text} twice")
    return values


def _bounds(kind: str, given: Any) -> list[Any]:
    values = [as_number(value) for value in given] if isinstance(given, list) else []
    if len(values) != 2 or not all(_is_finite(value) for value in values):
        raise ValueError(f"{kind}={given!r} must be two numbers, [low, high]")
    low, high = values
    if low >= high:
        raise ValueError(f"{kind}={given}: the first number must be less than the second")
    if kind == "int":
        if low != int(low) or high != int(high):
            raise ValueError(f"int={given} must be whole numbers; or use uniform")
        return [int(low), int(high)]
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"loguniform={given} must be above 0; or use uniform")
    return [float(low), float(high)]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _conditions(given: Any) -> dict[str, list[Any]]:
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ValueError(f"when={given!r} must be a mapping, {{field: value or list of values}}")
    return {
        key: [as_number(value) for value in (allowed if isinstance(allowed, list) else [allowed])]
        for key, allowed in given.items()
    }
