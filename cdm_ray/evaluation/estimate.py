"""A mean with its standard error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Mean over `count` independent values and its standard error, numbers or arrays."""

    mean: Array
    error: Array
    count: int

    @classmethod
    def of(cls, values: Array) -> Estimate:
        """Over the first axis."""
        error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
        return cls(values.mean(axis=0), error, len(values))

    def to_json(self, counted: str) -> dict[str, Any]:
        """Plain lists and numbers; `counted` names what the values belong to, "images" say."""
        return {
            "mean": self.mean.tolist(),
            "standard_error": self.error.tolist(),
            counted: self.count,
        }
