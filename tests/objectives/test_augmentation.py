import itertools
import math

import numpy as np
import pytest
import torch

from cdm_ray.objectives.augmentation import (
    SYM6,
    Draws,
    augment,
    draw,
    flip,
    inverse_transformation,
    warp,
)
from cdm_ray.randomness import BlockRng


def lanes(*indices):
    return BlockRng.for_lanes(5, 3, indices, "cpu")


def noise(n, channels, height, width):
    return BlockRng.for_lanes(0, 0, [0], "cpu").uniform(n, channels, height, width) * 2 - 1


def draws(**fields):
    """One image that nothing is done to but for `fields`."""
    nothing = {"zoom": 0.0, "rotation": 0.0, "stretch": 0.0, "axis": 0.0, "translation": [0.0, 0.0]}
    values = {name: torch.tensor([value]) for name, value in (nothing | fields).items()}
    return Draws(torch.tensor([False]), torch.tensor([False]), **values)


def warped(images, **fields):
    return warp(images, *inverse_transformation(draws(**fields), *images.shape[2:]))


def forward(label, height, width):
    """Where content goes, read from a label with complex numbers x - iy (counter-clockwise angles
    are positive): pixels from the middle -> pixels from the middle, y downwards."""
    mirrored, upside_down, zoom, cos_minus_1, sin, along_x, along_y, right, down = label
    stretch = math.copysign(math.hypot(along_x, along_y), along_x)
    axis = (along_x + 1j * along_y) / stretch if stretch else 1.0

    def move(x, y):
        z = (-x if mirrored else x) - 1j * (-y if upside_down else y)
        z = z * 2 ** (0.2 * zoom) * (cos_minus_1 + 1 + 1j * sin)
        z = z * np.conj(axis)
        z = axis * (z.real * 2 ** (0.2 * stretch) + 1j * z.imag * 2 ** (-0.2 * stretch))
        return z.real + right * width / 8, -z.imag + down * height / 8

    return move


def forward_matrix(label, height, width):
    move = forward(label, height, width)
    shift = np.array(move(0, 0))
    return np.stack([np.array(move(*unit)) - shift for unit in ((1, 0), (0, 1))], 1), shift


MEAN, COVARIANCE = np.array([3.0, -2.0]), np.array([[12.0, 4.0], [4.0, 8.0]])


def blob(x, y):
    """Gaussian bump with an inclined axis, off the middle; x, y in pixels from the middle."""
    q = np.stack([x, y], -1) - MEAN
    return np.exp(-0.5 * np.einsum("...i,ij,...j", q, np.linalg.inv(COVARIANCE), q))


def positions(height, width):
    """x, y [height, width] of the pixels, from the middle."""
    return np.meshgrid(np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2)


def blob_image(height, width):
    return torch.tensor(blob(*positions(height, width))[None, None], dtype=torch.float32)


def mirrored_into(position, size):
    """Reflection at the centres of the border pixels, as often as it takes."""
    last = size - 1
    return np.abs((position + last / 2 + last) % (2 * last) - last) - last / 2


def test_the_filter_is_orthogonal_to_its_even_shifts_and_has_six_vanishing_moments():
    h, n = np.array(SYM6), np.arange(12)
    assert abs(h.sum() - math.sqrt(2)) < 1e-12
    for shift in range(6):
        assert abs(h[: 12 - 2 * shift] @ h[2 * shift :] - (shift == 0)) < 1e-11
    for power in range(6):
        assert abs(np.sum((-1.0) ** n * h * (n - 5.5) ** power)) < 1e-9
    assert abs(np.sum((-1.0) ** n * h * (n - 5.5) ** 6)) > 1


def test_of_all_filters_with_these_properties_it_is_the_least_asymmetric():
    # Daubechies' construction: |H|^2 = 2 (cos^2)^6 P(sin^2), one root of each reciprocal pair
    roots = np.roots([math.comb(5 + k, k) for k in range(6)][::-1])
    pairs = []
    for y in roots[roots.imag > -1e-9]:
        pair = np.roots([1, 4 * y - 2, 1])
        pairs.append([[z.real] if abs(y.imag) < 1e-9 else [z, z.conj()] for z in pair])
    filters = []
    for choice in itertools.product(*pairs):
        h = np.poly([-1] * 6 + sum(choice, [])).real
        filters.append(h * math.sqrt(2) / h.sum())
    omega = np.linspace(0.01, 0.9 * math.pi, 200)

    def phase_nonlinearity(h):
        phase = np.unwrap(np.angle(np.exp(-1j * np.outer(omega, np.arange(12))) @ h))
        return np.abs(phase - omega * (phase @ omega) / (omega @ omega)).max()

    best = min(filters, key=phase_nonlinearity)
    error = min(np.abs(best - SYM6).max(), np.abs(best[::-1] - SYM6).max())
    assert error < 1e-10  # the constants have about 12 digits


def test_probability_zero_returns_the_images_and_draws_nothing():
    images, rng = noise(4, 3, 8, 8), lanes(0, 1)
    out, labels = augment(images, 0.0, rng)
    assert out is images
    assert torch.equal(labels, torch.zeros(4, 9))
    assert torch.equal(rng.normal(4), lanes(0, 1).normal(4))


def test_flips_are_bit_exact():
    images, yes, no = noise(1, 3, 8, 9), torch.tensor([True]), torch.tensor([False])
    assert torch.equal(flip(images, no, no), images)
    assert torch.equal(flip(images, yes, no), torch.flip(images, [3]))
    assert torch.equal(flip(images, no, yes), torch.flip(images, [2]))
    assert torch.equal(flip(images, yes, yes), torch.flip(images, [2, 3]))


def test_images_that_are_not_warped_keep_their_pixels_in_a_batch_where_others_are():
    images = noise(64, 3, 16, 16)
    out, labels = augment(images, 0.15, lanes(0, 1))
    still = (labels[:, 2:] == 0).all(1)
    assert 0 < still.sum() < 64
    expected = flip(images, labels[:, 0] == 1, labels[:, 1] == 1)
    assert torch.equal(out[still], expected[still])
    changed = (out != expected).flatten(1).float().mean(1)
    assert (changed[~still] > 0.9).all()


@pytest.mark.parametrize("size", [1, 8, 32, 64])
def test_a_full_turn_is_the_identity_even_on_noise(size):
    images = noise(1, 3, size, size)
    turned = warped(images, rotation=2 * math.pi)  # 2e-7 off the identity in float32, so warped
    # positions are rounded to about 1e-5 fine pixels, and noise changes by up to 2 between two
    torch.testing.assert_close(turned, images, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 33), (32, 48), (64, 64)])
def test_half_a_turn_is_both_flips(height, width):
    image = blob_image(height, width)
    turned = warped(image, rotation=math.pi)
    # the filter's delay varies by 0.05 pixels over the blob's frequencies; a geometry that is off
    # by half a pixel gives more than 0.1
    torch.testing.assert_close(turned, image.flip(2, 3), atol=0.012, rtol=0)


def test_a_quarter_turn_is_counter_clockwise():
    image = blob_image(32, 32)
    turned = warped(image, rotation=math.pi / 2)
    torch.testing.assert_close(turned, torch.rot90(image, 1, (2, 3)), atol=0.012, rtol=0)


@pytest.mark.parametrize(("right", "down"), [(4, 0), (0, 4), (-4, 8), (31, -31)])
def test_whole_pixels_of_translation_are_exact_and_mirror_at_the_borders(right, down):
    images = noise(1, 3, 32, 32)
    moved = warped(images, translation=[right / 4, down / 4])  # a standard deviation is 4 pixels
    padded = torch.nn.functional.pad(images, (31, 31, 31, 31), mode="reflect")
    expected = padded[:, :, 31 - down : 63 - down, 31 - right : 63 - right]
    torch.testing.assert_close(moved, expected, atol=3e-5, rtol=0)  # rounding of positions


def test_magnifying_by_two_and_back_restores_the_middle():
    image = blob_image(64, 64)
    large = warped(image, zoom=5.0)
    back = warped(large, zoom=-5.0)
    middle = (..., slice(17, 47), slice(17, 47))  # 2 pixels off the part that is not mirrored
    torch.testing.assert_close(back[middle], image[middle], atol=0.01, rtol=0)
    assert large.sum().item() == pytest.approx(4 * image.sum().item(), rel=0.01)


@pytest.mark.parametrize(
    "fields",
    [
        {"zoom": 1.0},
        {"zoom": -1.0},
        {"rotation": 0.7},
        {"stretch": 1.5},
        {"stretch": 1.5, "axis": 0.6},
        {"stretch": -1.5, "axis": -1.2},
        {"translation": [0.7, -0.4]},
        {"zoom": 0.5, "translation": [0.7, -0.4]},
        {"rotation": 2.0, "stretch": 1.5, "axis": 0.6},
        {"zoom": 0.5, "rotation": -1.0, "stretch": 1.0, "axis": 0.9, "translation": [-0.3, 0.5]},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_mean_and_covariance_of_a_blob_move_as_the_matrix_says(fields):
    height, width = 56, 64
    image = warped(blob_image(height, width), **fields)[0, 0].double().numpy()
    matrix, shift = forward_matrix(draws(**fields).labels()[0].tolist(), height, width)
    x, y = positions(height, width)
    points = np.stack([x.ravel(), y.ravel()])
    mean, covariance = matrix @ MEAN + shift, matrix @ COVARIANCE @ matrix.T
    found = points @ image.ravel() / image.sum()
    found_covariance = np.cov(points, aweights=np.abs(image.ravel()), bias=True)
    np.testing.assert_allclose(found, mean, atol=0.05)
    # bilinear reading widens by up to 1/16 pixel^2 per axis
    np.testing.assert_allclose(found_covariance, covariance, atol=0.1 + 0.01 * covariance.max())
    assert image.sum() == pytest.approx(blob(x, y).sum() * np.linalg.det(matrix), rel=0.01)


def test_the_labels_tell_what_was_done():
    height, width, n = 48, 64, 200
    out, labels = augment(blob_image(height, width).repeat(n, 1, 1, 1), 0.8, lanes(0))
    x, y = positions(height, width)
    for image, label in zip(out[:, 0].numpy(), labels.double().numpy(), strict=True):
        matrix, shift = forward_matrix(label, height, width)
        source = np.linalg.inv(matrix) @ (np.stack([x.ravel(), y.ravel()]) - shift[:, None])
        expected = blob(mirrored_into(source[0], width), mirrored_into(source[1], height))
        assert np.abs(image.ravel() - expected).max() < 0.03


@pytest.mark.parametrize("size", [8, 32, 64])
def test_constant_images_stay_constant_up_to_their_corners(size):
    values = torch.tensor([-1.0, 0.3, 1.0])
    images = values[None, :, None, None].expand(64, 3, size, size)
    out, _ = augment(images, 1.0, lanes(0))
    torch.testing.assert_close(out, images, atol=1e-5, rtol=0)


def test_each_transformation_is_as_frequent_as_stated_and_independent_of_the_others():
    n, p = 40_000, 0.15
    made = draw(n, p, lanes(0, 1))
    happened = {
        "mirrored": made.mirrored,
        "upside_down": made.upside_down,
        "zoom": made.zoom != 0,
        "rotation": made.rotation != 0,
        "stretch": made.stretch != 0,
        "translation": (made.translation != 0).all(1),
    }
    expected = dict.fromkeys(happened, p) | {"mirrored": 0.5, "upside_down": p / 2}

    def check(rows, probability):
        four_sigma = 4 * math.sqrt(probability * (1 - probability) / n)
        assert abs(rows.float().mean() - probability) < four_sigma

    for name, rows in happened.items():
        check(rows, expected[name])
    for first, second in itertools.combinations(happened, 2):
        check(happened[first] & happened[second], expected[first] * expected[second])
    labels = made.labels()
    for name, columns in {"zoom": [2], "rotation": [3, 4], "stretch": [5, 6]}.items():
        assert (labels[~happened[name]][:, columns] == 0).all()
    assert ((made.translation != 0).any(1) == happened["translation"]).all()


def test_sizes_of_the_transformations_are_distributed_as_stated():
    n = 40_000
    made = draw(n, 1.0, lanes(0))
    for normal in (made.zoom, made.stretch, *made.translation.unbind(1)):
        assert abs(normal.mean()) < 4 / math.sqrt(n)
        assert abs(normal.var() - 1) < 4 * math.sqrt(2 / n)
    for angle, half_range in ((made.rotation, math.pi), (made.axis, math.pi / 2)):
        share = (angle / half_range + 1) / 2
        counts = torch.histc(share, bins=20, min=0, max=1)
        assert counts.sum() == n
        assert ((counts - n / 20).abs() < 4 * math.sqrt(n / 20 * 0.95)).all()
    numbers = torch.stack([made.zoom, made.rotation, made.stretch, made.axis, *made.translation.T])
    correlation = torch.corrcoef(numbers) - torch.eye(6)
    assert correlation.abs().max() < 4 / math.sqrt(n)


def test_an_image_does_not_depend_on_how_lanes_are_batched():
    images = noise(12, 3, 32, 32)
    together, labels = augment(images, 0.5, lanes(0, 1, 2, 3))
    parts = [augment(images[:3], 0.5, lanes(0)), augment(images[3:], 0.5, lanes(1, 2, 3))]
    assert torch.equal(together, torch.cat([part[0] for part in parts]))
    assert torch.equal(labels, torch.cat([part[1] for part in parts]))
    assert len(labels.unique(dim=0)) == 12


@pytest.mark.parametrize("size", [8, 32, 64])
def test_all_channels_of_an_image_are_treated_alike(size):
    images = noise(8, 3, size, size)
    out, labels = augment(images, 0.5, lanes(0, 1))
    assert out.shape == images.shape
    assert out.dtype == labels.dtype == torch.float32
    for channel in range(3):
        alone, _ = augment(images[:, channel : channel + 1], 0.5, lanes(0, 1))
        assert torch.equal(alone, out[:, channel : channel + 1])


class ShapesOnly:
    """Draws without values, which nothing on the host can read."""

    def uniform(self, *shape):
        return torch.empty(shape, device="meta")

    normal = uniform


def test_no_value_is_read_back_by_the_host():
    images, labels = augment(torch.empty(4, 3, 32, 32, device="meta"), 0.15, ShapesOnly())
    assert images.shape == (4, 3, 32, 32)
    assert labels.shape == (4, 9)
