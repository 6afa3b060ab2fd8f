"""What is measured: the settings of the FFHQ 64x64 recipe as plain dicts, and the sizes of a run.

A bare machine has no pydantic, so the sections of the configuration are namespaces made from these
dicts; a test holds them against the real classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from cdm_ray.networks import build_network

NETWORK: dict[str, Any] = {
    "architecture": "ddpmpp",
    "init": None,
    "model_channels": 128,
    "channel_mult": (1, 2, 2, 2),
    "num_blocks": 4,
    "attn_resolutions": (16,),
    "dropout": 0.0,
    "class_conditional": False,
    "sigma_data": 0.5,
    "activation_checkpointing": False,
}
DSM: dict[str, Any] = {"p_mean": -1.2, "p_std": 1.2, "input_perturbation": 0.0}
CP_WEIGHT = 1000.0
"""Changes no cost; so large that the errors beside a CP row are those of consistency, which the
denoising loss would hide."""
RECOMMENDED: dict[str, Any] = {
    "weight": CP_WEIGHT,
    "warmup_images": 0,
    "window": 0.25,
    "window_kind": "relative",
    "rollout_steps": 1,
    "step_kind": "ancestral",
    "fraction": 0.25,
    "estimator": "product",
    "gradient": "low",
    "sigma_weight": "none",
    "reuse_d0": True,
    "dropout": False,
    "rollout_weights": "live",
    "sigma_min": 0.002,
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dsm": RECOMMENDED | {"weight": 0.0},
    "cp recommended": RECOMMENDED,
    "cp released": RECOMMENDED
    | {
        "window": 0.05,
        "window_kind": "absolute",
        "rollout_steps": 5,
        "step_kind": "euler_maruyama",
        "fraction": 1.0,
        "gradient": "both",
        "reuse_d0": False,
        "dropout": True,
    },
}
"""Sections `cp` by the names that the table uses; `released` is the setting of the paper's code."""
PUBLISHED_DROPOUT = 0.05
"""Of the FFHQ recipe, in rows of their own."""
PUBLISHED_AUGMENT = 0.15
AUGMENT_DIM = 9
SIGMA_RANGE = (0.002, 80.0)
RHO = 7.0


def section(values: dict[str, Any]) -> Any:
    """Attributes like those of a section of the configuration."""
    return SimpleNamespace(**values)


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    resolution: int
    network: dict[str, Any]
    batches: tuple[int, ...]
    """Per-GPU batches of the denoising step, the most important first."""
    cp_batch: int
    lane_batch: int
    """Images of a lane in a step: a draw takes one kernel per lane."""
    sample_batch: int
    sample_steps: int
    matmul: int
    copy_bytes: int
    steps: int
    """Timed steps of a row, or as many as fit into `seconds`, but at least five."""
    seconds: float
    warmup: int
    compiler: str
    """Backend of torch.compile."""
    channels: int = 3
    lr: float = 2e-4
    ema_decay: float = 0.5 ** (256 / 500_000)


FULL = Sizes(
    resolution=64,
    network=NETWORK,
    batches=(256, 32, 128, 64),
    cp_batch=128,
    lane_batch=16,
    sample_batch=64,
    sample_steps=40,
    matmul=8192,
    copy_bytes=4 << 30,
    steps=30,
    seconds=8.0,
    warmup=5,
    compiler="inductor",
)
QUICK = Sizes(
    resolution=8,
    network=NETWORK
    | {"model_channels": 16, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()},
    batches=(8, 4),
    cp_batch=4,
    lane_batch=4,
    sample_batch=4,
    sample_steps=3,
    matmul=128,
    copy_bytes=1 << 20,
    steps=5,
    seconds=1.0,
    warmup=1,
    compiler="aot_eager",  # traces as for a card; compiling the kernels would take minutes
)


def new_network(sizes: Sizes, **changes: Any) -> torch.nn.Module:
    """`sizes.network` with fields changed; its weights from torch's global generator."""
    return build_network(
        section(sizes.network | changes),
        resolution=sizes.resolution,
        channels=sizes.channels,
        label_dim=0,
        augment_dim=AUGMENT_DIM,
    )
