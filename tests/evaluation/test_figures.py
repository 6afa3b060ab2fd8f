import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cdm_ray.evaluation.figures import (
    BLUE,
    ORANGE,
    Curve,
    sample_grid,
    save_grid,
    save_sigma_figure,
)


def images(count, channels, size):
    values = np.random.default_rng(0).integers(0, 256, (count, channels, size, size))
    return torch.from_numpy(values.astype(np.uint8))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grid_shows_every_image_in_rows_enlarged_without_smoothing(channels, mode):
    shown = images(5, channels, 8)
    grid = sample_grid(shown)
    assert grid.mode == mode
    pixels = np.asarray(grid).reshape(*grid.size[::-1], channels)
    assert pixels.shape[:2] == (2 * 66 + 2, 3 * 66 + 2)
    for index, image in enumerate(shown):
        top, left = 2 + index // 3 * 66, 2 + index % 3 * 66
        tile = pixels[top : top + 64, left : left + 64]
        np.testing.assert_array_equal(tile[::8, ::8], image.permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(tile[7::8, 7::8], image.permute(1, 2, 0).numpy())


def test_large_images_are_not_enlarged():
    assert sample_grid(images(4, 3, 64)).size == (2 * 66 + 2, 2 * 66 + 2)
    assert sample_grid(images(1, 3, 100)).size == (104, 104)


def test_the_same_grid_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        save_grid(images(9, 1, 8), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_figure_is_a_readable_png_with_the_same_bytes_each_time_and_needs_no_pyplot(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    sigmas = np.geomspace(0.02, 20, 4)
    values = np.array([1e-3, 0.1, -1e-3, 0])
    curves = {
        "own": Curve(sigmas, values, np.full(4, 1e-3), BLUE),
        "data": Curve(sigmas, values / 2, np.full(4, 1e-3), ORANGE, dashed=True),
    }
    for name in ("a.png", "b.png"):
        save_sigma_figure(tmp_path / name, curves, title="t", y_label="y", zero_label="exact")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as figure:
        assert figure.size[0] > 600
