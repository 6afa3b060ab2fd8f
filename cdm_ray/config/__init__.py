"""Typed run configuration: pydantic models, YAML recipes, `section.field=value` overrides."""

from cdm_ray.config.base import Section
from cdm_ray.config.common import (
    CheckpointConfig,
    EMAConfig,
    OptimizerConfig,
    RayConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from cdm_ray.config.images import (
    NOT_LEARNED,
    AugmentConfig,
    CPConfig,
    DataConfig,
    DSMConfig,
    EvalConfig,
    ImageConfig,
    NetworkConfig,
    SamplerConfig,
)
from cdm_ray.config.loading import (
    build_config,
    describe,
    flatten,
    load_config,
    recipe_names,
    to_yaml,
)

__all__ = [
    "NOT_LEARNED",
    "AugmentConfig",
    "CPConfig",
    "CheckpointConfig",
    "DSMConfig",
    "DataConfig",
    "EMAConfig",
    "EvalConfig",
    "ImageConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "RayConfig",
    "RunConfig",
    "SamplerConfig",
    "Section",
    "TrackingConfig",
    "TrainConfig",
    "build_config",
    "describe",
    "flatten",
    "load_config",
    "recipe_names",
    "to_yaml",
]
