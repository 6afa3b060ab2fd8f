"""What every configuration is made of: strict sections, and counts such as `50k`."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_COUNT_UNITS = {"": 1, "k": 10**3, "M": 10**6}


def parse_count(value: Any) -> Any:
    """`50k` -> 50000, `200M` -> 200000000, `1.5k` -> 1500; anything else is left to pydantic."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a count; write a number such as 50000, 50k or 200M")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kM]?)\s*", value)
        if match is None:
            raise ValueError(f"'{value}' is not a count; write a number such as 50000, 50k or 200M")
        number = float(match[1]) * _COUNT_UNITS[match[2]]
        if number != int(number):
            raise ValueError(f"'{value}' is not a whole number")
        return int(number)
    return value


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=0)]
PositiveCount = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]


def check_power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"{value} is not a power of two; use 1, 2, 4, 8, 16, ...")
    return value


PowerOfTwo = Annotated[int, Field(ge=1), AfterValidator(check_power_of_two)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: unknown keys refused, immutable, docstrings are help texts."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )
