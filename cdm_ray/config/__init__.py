"""Typed run configuration: pydantic models, YAML recipes, `section.field=value` overrides."""

from cdm_ray.config.base import Section
from cdm_ray.config.bridges import BridgeConfig
from cdm_ray.config.common import (
    CheckpointConfig,
    JobConfig,
    OptimizerConfig,
    RayConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from cdm_ray.config.images import (
    AugmentConfig,
    CPConfig,
    DataConfig,
    DSMConfig,
    EMAConfig,
    EvalConfig,
    ImageConfig,
    NetworkConfig,
    SamplerConfig,
)
from cdm_ray.config.loading import (
    build_config,
    describe,
    flatten,
    is_of,
    load_config,
    recipe_names,
    to_yaml,
)

__all__ = [
    "AugmentConfig",
    "BridgeConfig",
    "CPConfig",
    "CheckpointConfig",
    "DSMConfig",
    "DataConfig",
    "EMAConfig",
    "EvalConfig",
    "ImageConfig",
    "JobConfig",
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
    "is_of",
    "load_config",
    "recipe_names",
    "to_yaml",
]
