"""Typed run configuration: pydantic models, YAML recipes, `section.field=value` overrides."""

from cdm_ray.config.axes import Axis
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
    read_config,
    recipe_names,
    to_yaml,
)
from cdm_ray.config.schedule import Change
from cdm_ray.config.sweeps import SweepConfig, load_sweep, sweep_names

__all__ = [
    "AugmentConfig",
    "Axis",
    "BridgeConfig",
    "CPConfig",
    "Change",
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
    "SweepConfig",
    "TrackingConfig",
    "TrainConfig",
    "build_config",
    "describe",
    "flatten",
    "is_of",
    "load_config",
    "load_sweep",
    "read_config",
    "recipe_names",
    "sweep_names",
    "to_yaml",
]
