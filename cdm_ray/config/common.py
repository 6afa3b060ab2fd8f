"""Sections that every kind of run has."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from cdm_ray.config.base import Count, NonNegative, Positive, PositiveCount, Section


class RunConfig(Section):
    name: str | None = None
    """Name of the run and of its folder; by default the recipe and a digest of the configuration,
    so that the same command continues the same run."""
    storage: str = "runs"
    """Folder that holds the run folders and the default MLflow database; shared by all nodes."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random: weights, data order, noise."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"'{name}' is no folder name; use letters, digits, '.', '_' and '-'")
        return name


class TrainConfig(Section):
    images: PositiveCount = 200_000_000
    """Training images until the end, repeats counted."""
    batch: PositiveCount = 256
    """Global batch over all workers."""
    micro_batch: PositiveCount | None = None
    """Most images that a worker puts through the network at once; None: its whole share."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on GPUs, fp32 on CPUs. Master weights are fp32 always."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards: nothing, optimizer state, + gradients, + weights."""
    log_every: Annotated[int, Field(ge=1)] = 50
    """Steps between two records of loss, speed and gradient norm."""
    max_nonfinite_in_row: Annotated[int, Field(ge=1)] = 50
    """Steps with non-finite gradients are skipped and counted; this many in a row stop the run."""


class OptimizerConfig(Section):
    lr: Positive = 1e-3
    """Adam learning rate after the ramp."""
    rampup_images: Count = 10_000_000
    """The learning rate grows linearly from 0 over this many images."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Adam moment decays."""
    eps: Positive = 1e-8
    """Adam denominator offset."""
    clip_norm: Positive | None = None
    """Largest global gradient norm; None: no clipping, as in EDM."""


class EMAConfig(Section):
    halflife_images: PositiveCount = 500_000
    """Half-life of the weight average in images."""
    rampup_ratio: NonNegative = 0.05
    """The half-life is at most this share of the images seen so far."""


class CheckpointConfig(Section):
    every_images: PositiveCount = 1_000_000
    """Training images between two checkpoints; one more is written at the end."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints that are kept."""


class RayConfig(Section):
    workers: Annotated[int, Field(ge=1)] = 2
    """Training workers."""
    address: str | None = None
    """Ray cluster to join; None: that of RAY_ADDRESS, else a local one that ends with the job."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU per worker; auto: if the cluster has any."""
    cpus_per_worker: Positive = 1
    """CPUs reserved for each worker."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts from the newest checkpoint after a worker or node is lost."""


class TrackingConfig(Section):
    uri: str | None = None
    """MLflow tracking server; None: MLFLOW_TRACKING_URI, else sqlite in `run.storage`."""
    experiment: str = "cdm_ray"
    """MLflow experiment."""
