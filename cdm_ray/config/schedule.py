"""What changes on the way of a run."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from cdm_ray.config.base import PositiveCount, Section


class Change(Section):
    """An entry of `schedule`: {after: 20M, set: {cp.weight: 3}}."""

    after: PositiveCount
    """How much of the run lies before it, counted as the run's length is: images or iterations."""
    set: Annotated[dict[str, Any], Field(min_length=1)]
    """section.field and value of what is different from then on."""

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, written: Any) -> Any:
        complete = isinstance(written, dict) and written.keys() == {"after", "set"}
        if complete or isinstance(written, Change):
            return written
        raise ValueError(
            f"{written!r} is no change; write e.g. {{after: 50k, set: {{optimizer.lr: 1e-4}}}}"
        )
