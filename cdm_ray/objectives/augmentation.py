"""Augmentation of training images as in EDM (Karras et al. 2022, appendix F.2, table 6).

The network is told what was done to each image, so that the transformations do not leak into its
samples, which are drawn for labels that say "nothing" (zeros).

Everything is batched and on the images' device; the host reads no value back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from cdm_ray.randomness import BlockRng

NUM_LABELS = 9
SCALE_STD = 0.2
"""Standard deviation of log2 of the zoom, and of log2 of the stretch."""
TRANSLATION_STD = 0.125
"""As a share of the image's width and height."""

SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
"""Low-pass filter of the least asymmetric orthogonal wavelet with six vanishing moments (Daubechies
1992, table 6.3); it sums to sqrt(2)."""
DELAY = sum(n * tap for n, tap in enumerate(SYM6)) / sum(SYM6)
"""Delay of the filter at low frequencies, in its own samples: 5.098. With the 5.5 of a symmetric
filter, an image turned by 180 degrees would be off by 0.4 pixels."""


@torch.no_grad()
def augment(images: Tensor, p: float, rng: BlockRng) -> tuple[Tensor, Tensor]:
    """Randomly transformed images [n, C, H, W], and labels [n, 9] that say what was done.

    images [n, C, H, W]: float32, on the device of `rng`. p = 0 returns the images themselves and
    draws nothing. Otherwise half of the images are mirrored, and each of the other transformations
    is applied with probability p, independently of the rest; the one that turns images upside down
    does so in half of these cases. Images that are not warped keep their pixels bit for bit, flips
    aside.
    """
    if p == 0:
        return images, images.new_zeros(len(images), NUM_LABELS)
    draws = draw(len(images), p, rng)
    flipped = flip(images, draws.mirrored, draws.upside_down)
    height, width = images.shape[2:]
    return warp(flipped, *inverse_transformation(draws, height, width)), draws.labels()


@dataclass(frozen=True)
class Draws:
    """What is done to n images, in this order; zeros are nothing.

    Angles are in radians, counter-clockwise as the image is seen.
    """

    mirrored: Tensor
    """[n] bool: left and right exchanged."""
    upside_down: Tensor
    """[n] bool: top and bottom exchanged."""
    zoom: Tensor
    """[n], normal: magnified by 2^(0.2 zoom)."""
    rotation: Tensor
    """[n], uniform over the full circle."""
    stretch: Tensor
    """[n], normal: magnified by 2^(0.2 stretch) along the axis, and by the inverse across it."""
    axis: Tensor
    """[n], angle of the axis, uniform over the half circle [-pi/2, pi/2)."""
    translation: Tensor
    """[n, 2], normal: moved by 0.125 of the width to the right and of the height downwards."""

    def labels(self) -> Tensor:
        """[n, 9] float32: mirrored, upside down, zoom, cos(rotation) - 1, sin(rotation),
        stretch cos(axis), stretch sin(axis), translation to the right, translation downwards.

        Zoom, stretch and translation enter as the standard normal numbers of the fields. The half
        circle holds every axis once; over the full one, (s, axis) and (-s, axis + pi) would be
        different transformations with one label.
        """
        columns = (
            self.mirrored.float(),
            self.upside_down.float(),
            self.zoom,
            self.rotation.cos() - 1,
            self.rotation.sin(),
            self.stretch * self.axis.cos(),
            self.stretch * self.axis.sin(),
            *self.translation.unbind(1),
        )
        return torch.stack(columns, dim=1)


def draw(count: int, p: float, rng: BlockRng) -> Draws:
    """Transformations of `count` images for p > 0."""
    uniform, normal = rng.uniform(count, 8), rng.normal(count, 4)
    zoomed, rotated, stretched, translated = (uniform[:, :4] < p).unbind(1)
    return Draws(
        mirrored=uniform[:, 4] < 0.5,
        upside_down=uniform[:, 5] < 0.5 * p,
        zoom=normal[:, 0] * zoomed,
        rotation=(2 * uniform[:, 6] - 1) * math.pi * rotated,
        stretch=normal[:, 1] * stretched,
        axis=(uniform[:, 7] - 0.5) * math.pi * stretched,
        translation=normal[:, 2:] * translated[:, None],
    )


def flip(images: Tensor, mirrored: Tensor, upside_down: Tensor) -> Tensor:
    """images [n, C, H, W] with left and right, top and bottom exchanged where told, [n] bool."""
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return torch.where(upside_down[:, None, None, None], images.flip(2), images)


def inverse_transformation(draws: Draws, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where the content of the warped images comes from: linear [n, 2, 2] and offset [n, 2].

    What is at q comes from linear q + offset, in pixels from the middle of the image, x to the
    right and y downwards. Exactly the identity for images with zero draws; flips are no part of it.
    """
    zoom, stretch = torch.exp2(SCALE_STD * draws.zoom), torch.exp2(SCALE_STD * draws.stretch)
    shrink = torch.stack([1 / stretch, stretch], dim=1).diag_embed()
    unstretch = _product(_product(_rotation(draws.axis), shrink), _rotation(-draws.axis))
    linear = _product(_rotation(-draws.rotation), unstretch) / zoom[:, None, None]
    right, down = (TRANSLATION_STD * draws.translation).unbind(1)
    moved = torch.stack([right * width, down * height], dim=1)
    return linear, -(linear * moved[:, None, :]).sum(2)


def _rotation(angle: Tensor) -> Tensor:
    """[n] -> [n, 2, 2]; counter-clockwise as seen, with y downwards."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, sin, -sin, cos], dim=1).unflatten(1, (2, 2))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Products of matrices [n, 2, 2]; in TF32, which matmul may use, pixels would be misplaced."""
    return (a[:, :, :, None] * b[:, None, :, :]).sum(2)


def warp(images: Tensor, linear: Tensor, offset: Tensor) -> Tensor:
    """images [n, C, H, W] such that what is at q was at linear q + offset.

    linear [n, 2, 2], offset [n, 2]: as `inverse_transformation` gives them. Beyond its borders an
    image goes on as its mirror image, without end. It is upsampled with sym6, read bilinearly, and
    downsampled with the same filter; since the filter is orthogonal to its even shifts, the two
    undo each other up to rounding. Images with exactly the identity come back bit for bit.
    """
    height, width = images.shape[2:]
    fine = _upsample(_upsample(images).mT).mT
    x = _warped_positions(width, images.device)[None, None, :]
    y = _warped_positions(height, images.device)[None, :, None]
    a, b = linear[..., None, None], offset[..., None, None]
    source_x = a[:, 0, 0] * x + a[:, 0, 1] * y + b[:, 0]
    source_y = a[:, 1, 0] * x + a[:, 1, 1] * y + b[:, 1]
    grid = [_grid_coordinate(source_x, width), _grid_coordinate(source_y, height)]
    # border: a coordinate may leave the period by rounding
    read = grid_sample(fine, torch.stack(grid, dim=-1), padding_mode="border", align_corners=False)
    warped = _downsample(_downsample(read).mT).mT
    identity = torch.eye(2, device=linear.device)
    moved = (linear != identity).any(2).any(1) | (offset != 0).any(1)
    return torch.where(moved[:, None, None, None], warped, images)


def _period(size: int) -> int:
    """Pixels after which a row that goes on as its mirror image repeats: 2 size - 2, as the pixels
    at both ends are not doubled.

    One period holds all that a warp can reach. So there is no margin to choose, and none that
    depends on the draws, which would tie an image to the others of its batch and the host to them.
    """
    return max(2 * size - 2, 1)


def _upsample(rows: Tensor) -> Tensor:
    """rows [..., size] -> [..., 2 period + 2]: twice the resolution, sample m at pixel
    (m - DELAY) / 2, over one period and the two samples that close it."""
    period = _period(rows.shape[-1])
    reach = len(SYM6) // 2
    index = torch.arange(1 - reach, period + 1, device=rows.device).remainder(period)
    extended = rows[..., torch.minimum(index, period - index)]
    # with a zero put in after every pixel, even samples use the even taps only, odd ones the odd
    phases = [
        _correlate(extended, [math.sqrt(2) * tap for tap in SYM6[phase::2][::-1]], period + 1)
        for phase in (0, 1)
    ]
    return torch.stack(phases, dim=-1).flatten(-2)


def _downsample(rows: Tensor) -> Tensor:
    """rows [..., 2 size + 10], sample m at pixel (m - DELAY) / 2 -> [..., size]."""
    size = (rows.shape[-1] - len(SYM6)) // 2 + 1
    return _correlate(rows, [tap / math.sqrt(2) for tap in SYM6], size, stride=2)


def _correlate(rows: Tensor, taps: Sequence[float], count: int, stride: int = 1) -> Tensor:
    """sum_n taps[n] rows[..., stride i + n] for i < count.

    Tap by tap: a convolution or matrix product may round an image differently in another batch.
    """
    span = stride * (count - 1) + 1
    total = taps[0] * rows[..., :span:stride]
    for start, tap in enumerate(taps[1:], 1):
        total += tap * rows[..., start : start + span : stride]
    return total


def _warped_positions(size: int, device: torch.device) -> Tensor:
    """Pixels from the middle, of the samples that `_downsample` turns into `size` pixels."""
    samples = torch.arange(2 * size + len(SYM6) - 2, device=device)
    return (samples - DELAY) / 2 - (size - 1) / 2


def _grid_coordinate(position: Tensor, size: int) -> Tensor:
    """Position in pixels from the middle -> coordinate of grid_sample in what `_upsample` makes."""
    period = _period(size)
    sample = (2 * position + (size - 1) + DELAY).remainder(2 * period)
    # -1 and 1 are the outer edges of the first and the last sample
    return (2 * sample + 1) / (2 * period + 2) - 1
