"""Settings of trials: when two are the same, and how they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from numbers import Real
from typing import Any

Setting = Mapping[str, Any]
"""Field of the configuration, such as cp.weight, to its value."""


SCHEDULE = "schedule"
"""Field of the changes on the way, which a member of a population has beside its axes."""


def setting_key(setting: Setting) -> str:
    """Equal for equal settings, in any order; 1 equals 1.0, and not true."""
    plain = {name: float(v) if is_number(v) else v for name, v in setting.items()}
    return json.dumps(plain, sort_keys=True, default=str)


def value_key(value: Any) -> str:
    """Equal for equal values, as `setting_key` has them."""
    return setting_key({"": value})


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def show_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):  # a schedule
        return "; ".join(f"from {part['after']}: {show_setting(part['set'])}" for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_setting(setting: Setting) -> str:
    pairs = [f"{name}={show_value(value)}" for name, value in setting.items()]
    return ", ".join(pairs) or "the recipe as it is"
