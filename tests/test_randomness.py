import pytest
import torch

from cdm_ray.randomness import BlockRng, generator


def test_draws_do_not_depend_on_how_blocks_are_grouped():
    whole = BlockRng.for_lanes(3, 7, [0, 1, 2, 3], "cpu")
    parts = [BlockRng.for_lanes(3, 7, lanes, "cpu") for lanes in ([0], [1, 2, 3])]
    for draw in ("normal", "uniform", "normal"):
        together = getattr(whole, draw)(8, 2, 3)
        apart = [getattr(rng, draw)(2 * rng.blocks, 2, 3) for rng in parts]
        assert torch.equal(together, torch.cat(apart))


def test_every_part_of_the_key_matters():
    draws = {
        tuple(BlockRng.for_lanes(*key, "cpu").normal(1).tolist())
        for key in [(0, 0, [0]), (1, 0, [0]), (0, 1, [0]), (0, 0, [1])]
    }
    assert len(draws) == 4
    assert not torch.equal(
        BlockRng.for_images([0], "cpu").normal(5), BlockRng.for_lanes(0, 0, [0], "cpu").normal(5)
    )


def test_draws_have_the_stated_distribution():
    rng = BlockRng([generator(0)])
    normal, uniform = rng.normal(100_000), rng.uniform(100_000)
    # 4 standard errors of the mean and of the variance at n = 100,000
    assert abs(normal.mean()) < 4 / 100_000**0.5
    assert abs(normal.var() - 1) < 4 * (2 / 100_000) ** 0.5
    assert 0 <= uniform.min() < 1e-3
    assert 1 - 1e-3 < uniform.max() < 1


def test_rows_have_to_split_evenly():
    with pytest.raises(ValueError, match="7 rows cannot be split over 2"):
        BlockRng.for_lanes(0, 0, [0, 1], "cpu").normal(7, 3)
    with pytest.raises(ValueError, match="at least one"):
        BlockRng([])
