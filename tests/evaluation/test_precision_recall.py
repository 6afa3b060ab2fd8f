import numpy as np
import pytest
import torch

from cdm_ray.evaluation import precision_recall as module
from cdm_ray.evaluation.precision_recall import precision_recall, squared_distances, squared_radii


def cloud(seed, count, dim=8, centre=0.0, scale=1.0):
    values = np.random.default_rng(seed).normal(size=(count, dim)) * scale + centre
    return torch.from_numpy(values).float()


def brute_force(real, fake, k):
    """Kynkaanniemi et al. 2019, eq. 1 and 2, one pair at a time."""
    real, fake = real.double().numpy(), fake.double().numpy()

    def radii(points):
        return [
            sorted(np.linalg.norm(p - q) for j, q in enumerate(points) if j != i)[k - 1]
            for i, p in enumerate(points)
        ]

    def covered(points, centres, reach):
        return np.mean(
            [
                any(np.linalg.norm(p - c) <= r for c, r in zip(centres, reach, strict=True))
                for p in points
            ]
        )

    return covered(fake, real, radii(real)), covered(real, fake, radii(fake))


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("rows", [7, 1000])
def test_equal_to_the_definition(monkeypatch, k, rows):
    monkeypatch.setattr(module, "_ROWS", rows)  # blocks that do and do not divide the sets
    real, fake = cloud(0, 60), cloud(1, 45, centre=0.6, scale=0.8)
    expected = brute_force(real, fake, k)
    assert 0.05 < expected[0] < 0.95
    assert 0.05 < expected[1] < 0.95
    assert expected[0] != expected[1]
    assert tuple(precision_recall(real, fake, neighbours=k)) == pytest.approx(expected, rel=1e-15)


def test_identical_sets_have_both():
    points = cloud(2, 100)
    assert precision_recall(points, points.flip(0)) == (1, 1)


def test_disjoint_sets_have_neither():
    assert precision_recall(cloud(3, 100), cloud(4, 100, centre=1e3)) == (0, 0)


def test_half_of_the_modes_is_all_precision_and_half_recall():
    # Two modes far apart, each a grid: the generated points lie in the middle of real ones.
    grid = torch.cartesian_prod(*[torch.arange(6.0)] * 2)
    real = torch.cat([grid, grid + 1000])
    assert precision_recall(real, grid + 0.25) == (1, 0.5)


def test_more_than_the_real_modes_is_half_precision_and_all_recall():
    grid = torch.cartesian_prod(*[torch.arange(6.0)] * 2)
    assert precision_recall(grid, torch.cat([grid + 0.25, grid - 1000])) == (0.5, 1)


def test_copies_of_a_point_are_inside_its_ball_of_radius_zero():
    # Feature vectors as long as Inception's, whose squared distances round to 1e-10 and not to 0.
    point = cloud(5, 1, dim=2048, centre=3.0)
    others = cloud(6, 4, dim=2048, centre=50.0)
    real = torch.cat([point] * 6 + [others])
    assert squared_radii(real.double(), 3)[:6].tolist() == [0] * 6
    assert precision_recall(real, torch.cat([point] * 5)) == (1, 0.6)


def test_distances_are_exact_to_rounding():
    a, b = cloud(7, 20).double(), cloud(8, 30).double()
    expected = (a[:, None] - b).square().sum(-1)
    torch.testing.assert_close(squared_distances(a, b), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("neighbours", "count"), [(3, 3), (0, 10)])
def test_neighbours_that_do_not_exist_are_refused(neighbours, count):
    with pytest.raises(ValueError, match=f"neighbour {neighbours} of {count}"):
        precision_recall(cloud(0, count), cloud(1, 20), neighbours=neighbours)
