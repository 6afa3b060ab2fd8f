"""Learning rates and decays of the average from step to step."""

import pytest

from cdm_ray.config import BridgeConfig, ImageConfig, load_config
from cdm_ray.training.rates import bridge_rates, image_rates


def images(*overrides):
    return load_config(ImageConfig, "digits", ["train.batch=8", "cp.weight=0", *overrides])


def test_learning_rate_of_images_ramps_then_stays():
    config = images("optimizer.lr=2", "optimizer.rampup_images=100")
    assert [image_rates(config, seen).lr for seen in (0, 50, 100, 1000)] == [0, 1, 2, 2]


def test_average_of_images_has_the_stated_half_life():
    config = images("ema.halflife_images=1000", "ema.rampup_ratio=0.05")

    def decay(seen, images):
        return image_rates(config, seen).ema_beta ** (images / 8)

    assert image_rates(config, 0).ema_beta == 0
    # after the ramp, 1000 images halve the weight of the past
    assert decay(10**6, 1000) == pytest.approx(0.5)
    # during it, the half-life is 5 % of what was seen
    assert decay(2000, 100) == pytest.approx(0.5)
    without = images("ema.halflife_images=8", "ema.rampup_ratio=0")
    assert image_rates(without, 0).ema_beta == pytest.approx(0.5)


def test_learning_rate_of_bridges_falls_like_half_a_cosine_or_stays():
    config = load_config(
        BridgeConfig, None, ["optimizer.lr=2", "train.iterations=50", "train.inner_steps=2"]
    )
    falling = [bridge_rates(config, step).lr for step in (0, 25, 50, 75, 100)]
    assert falling == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0])
    constant = load_config(BridgeConfig, None, ["optimizer.lr=2", "optimizer.schedule=constant"])
    assert bridge_rates(constant, 10**6).lr == 2


def test_average_of_bridges_starts_short_and_reaches_its_decay():
    config = load_config(BridgeConfig, None, ["ema.decay=0.99"])
    assert bridge_rates(config, 0).ema_beta == 0
    assert bridge_rates(config, 9).ema_beta == 0.5
    assert bridge_rates(config, 10**4).ema_beta == 0.99
