import math

import torch

from cdm_ray.networks.layers import ConvThenDown
from tests.networks.architectures import build, loud, noise


def test_residual_encoder_goes_on_from_its_own_sums():
    """Each level adds the image of the one before, convolved and halved, to what it downsamples."""
    network, met = loud(build("ncsnpp", resolution=16, channel_mult=(1, 2, 3))), []
    names = ["8x8_down", "8x8_aux_residual", "8x8_block0", "4x4_aux_residual"]
    for name in names:
        network.model.enc[name].register_forward_hook(
            lambda _, given, result: met.append((given[0], result))
        )
    x = noise(2, 1, 16, 16)
    network.model(x, torch.ones(2), None, None, None)
    (_, down), (image, residual), (summed, _), (next_image, _) = met
    assert torch.equal(image, x)
    torch.testing.assert_close(summed, (down + residual) * math.sqrt(0.5))
    assert torch.equal(next_image, summed)


def test_only_the_residual_encoder_convolves_the_image_again():
    count = {
        name: sum(isinstance(m, ConvThenDown) for m in build(name).modules())
        for name in ("ddpmpp", "ncsnpp")
    }
    assert count == {"ddpmpp": 0, "ncsnpp": 1}
