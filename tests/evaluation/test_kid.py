import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from cdm_ray.evaluation.kid import kernel_distance


def features(seed, count, dim=6, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, dim)) + shift).float()


def unbiased_mmd(x, y):
    """Binkowski et al. 2018, eq. 4, pair by pair."""
    kernel = lambda a, b: (a @ b / len(a) + 1) ** 3  # noqa: E731
    x, y = x.double().numpy(), y.double().numpy()
    within = [
        np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])
        for z in (x, y)
    ]
    return sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_with_one_subset_of_everything_it_is_the_unbiased_estimate():
    # The biased one, with i = j in the sums, is larger by 2 % of k(x, x) here: 0.2.
    x, y = features(0, 20), features(1, 20, shift=0.5)
    found = kernel_distance(x, y, subset=20, subsets=1, device="cpu")
    assert found.mean == pytest.approx(unbiased_mmd(x, y), rel=1e-10)
    assert found.std == 0


def test_agrees_with_torchmetrics_on_the_same_features():
    x, y = features(0, 40), features(1, 40, shift=0.5)
    with pytest.warns(UserWarning, match="save all extracted features"):
        theirs = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=3, subset_size=40)
    theirs.update(x, real=True)
    theirs.update(y, real=False)
    mean, _ = theirs.compute()
    found = kernel_distance(x, y, subset=40, subsets=3, device="cpu")
    assert found.mean == pytest.approx(mean.item(), rel=1e-4)  # theirs is in float32


def test_sets_of_the_same_distribution_have_distance_zero_within_the_error():
    found = kernel_distance(
        features(2, 2000), features(3, 2000), subset=100, subsets=50, device="cpu"
    )
    # The biased estimate would be at about 0.2.
    assert abs(found.mean) < 4 * found.std / np.sqrt(20)  # 20 of the 50 subsets do not overlap
    assert found.std < 0.1


def test_mean_and_spread_are_over_subsets_of_both_sets():
    x, y = features(4, 300), features(5, 200, shift=0.4)
    whole = unbiased_mmd(x, y)
    found = kernel_distance(x, y, subset=50, subsets=200, device="cpu")
    assert found.mean == pytest.approx(whole, abs=4 * found.std / np.sqrt(200) + 0.02)
    smaller = kernel_distance(x, y, subset=25, subsets=200, device="cpu")
    # Spread of a difference that is not 0: as 1 / sqrt(subset).
    assert smaller.std / found.std == pytest.approx(np.sqrt(2), rel=0.35)


def test_repeated_it_gives_the_same_numbers_and_leaves_the_global_generator():
    x, y = features(6, 50), features(7, 50)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = kernel_distance(x, y, subset=20, subsets=5, device="cpu")
    assert torch.equal(torch.rand(1), expected)
    assert kernel_distance(x, y, subset=20, subsets=5, device="cpu") == first


@pytest.mark.parametrize("subset", [1, 31])
def test_subsets_that_cannot_be_are_refused(subset):
    with pytest.raises(ValueError, match=f"subsets of {subset} .* at least 2 and at most 30"):
        kernel_distance(features(0, 30), features(1, 40), subset=subset, subsets=2, device="cpu")
