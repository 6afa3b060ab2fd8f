import pytest
import torch
from torch.nn import functional as F

from cdm_ray.networks.layers import Conv, ConvThenDown, Resample, group_norm
from tests.networks.architectures import noise

RESAMPLINGS = [("down", (1, 1)), ("up", (1, 1)), ("down", (1, 3, 3, 1)), ("up", (1, 3, 3, 1))]


def resampled(x, direction, taps):
    """x filtered with the outer product of `taps`, channel by channel."""
    kernel = torch.tensor(taps, dtype=torch.float32) / sum(taps)
    kernel = kernel.outer(kernel)[None, None].expand(x.shape[1], 1, -1, -1)
    padding = (len(taps) - 1) // 2
    if direction == "down":
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=x.shape[1])
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=x.shape[1])


@pytest.mark.parametrize(("direction", "taps"), RESAMPLINGS)
def test_resampling_is_a_separable_filter_of_unit_gain(direction, taps):
    layer = Resample(direction, taps)
    torch.testing.assert_close(
        layer(noise(1, 2, 8, 8)), resampled(noise(1, 2, 8, 8), direction, taps)
    )
    inside = layer(torch.ones(1, 2, 8, 8))[..., 1:-1, 1:-1]
    torch.testing.assert_close(inside, torch.ones_like(inside))


@pytest.mark.parametrize(("direction", "taps"), RESAMPLINGS)
def test_convolution_comes_after_resampling(direction, taps):
    layer, x = Conv(2, 3, 3, direction=direction, taps=taps), noise(1, 2, 8, 8)
    expected = F.conv2d(resampled(x, direction, taps), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected)


def test_residual_encoder_convolves_the_padded_image_before_halving_it():
    layer, x = ConvThenDown(2, 3, (1, 3, 3, 1)), noise(1, 2, 8, 8)
    convolved = F.conv2d(F.pad(x, (2, 2, 2, 2)), layer.weight, layer.bias)
    # The filter needs no padding: the convolution already reaches one pixel beyond the image.
    kernel = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = kernel.outer(kernel).expand(3, 1, -1, -1)
    expected = F.conv2d(convolved, kernel, stride=2, groups=3)
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).shape == (1, 3, 4, 4)
    in_the_other_order = F.conv2d(
        resampled(x, "down", (1, 3, 3, 1)), layer.weight, layer.bias, padding=1
    )
    assert not torch.allclose(layer(x), in_the_other_order, atol=0.01)


def test_every_width_has_groups_of_at_least_four_channels():
    for channels in range(4, 1200, 4):
        groups, published = group_norm(channels, 1e-5).num_groups, min(32, channels // 4)
        assert groups <= published
        assert channels % groups == 0
        assert groups == published or channels % published
