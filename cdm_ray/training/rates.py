"""Learning rate and decay of the weight average from step to step."""

from __future__ import annotations

import math
from typing import NamedTuple

from cdm_ray.config import BridgeConfig, ImageConfig


class Rates(NamedTuple):
    """What an optimizer step is made with."""

    lr: float
    ema_beta: float
    """The average keeps this share of itself."""


def image_rates(config: ImageConfig, images_seen: int) -> Rates:
    """Linear ramp of the learning rate over the first `optimizer.rampup_images`, then constant;
    decay 0.5^(batch / min(halflife, rampup_ratio images_seen)), which is 0 at the start, so that
    the average begins at the first trained weights (both EDM, appendix F.2). As
    `config.schedule` has it at this step."""
    batch = config.train.batch
    now = config.at(images_seen // batch)
    optimizer, ema = now.optimizer, now.ema
    lr = optimizer.lr * min(images_seen / max(optimizer.rampup_images, 1e-8), 1.0)
    halflife: float = ema.halflife_images
    if ema.rampup_ratio > 0:
        halflife = min(halflife, ema.rampup_ratio * images_seen)
    return Rates(lr, 0.5 ** (batch / max(halflife, 1e-8)))


def bridge_rates(config: BridgeConfig, step: int) -> Rates:
    """Constant learning rate, or half a cosine from `optimizer.lr` to 0 over the run; decay
    min(ema.decay, step / (step + 9)), so that the first average is that of few steps. As
    `config.schedule` has it at this step."""
    now = config.at(step)
    optimizer = now.optimizer
    lr = optimizer.lr
    if optimizer.schedule == "cosine":
        lr *= (1 + math.cos(math.pi * min(step / config.steps, 1.0))) / 2
    return Rates(lr, min(now.ema.decay, step / (step + 9)))
