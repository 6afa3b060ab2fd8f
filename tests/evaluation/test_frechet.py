import mpmath
import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from cdm_ray.evaluation.frechet import (
    FeatureStatistics,
    frechet_distance,
    merge_all,
    too_few_samples,
)


def gaussian(mean, covariance, count=10_000):
    """Statistics with exactly these moments."""
    mean, covariance = np.asarray(mean, float), np.asarray(covariance, float)
    return FeatureStatistics(count, mean, covariance * (count - 1))


def rotation(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def features(seed, count, dim):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, dim)))


def test_equal_to_the_closed_form_for_diagonal_gaussians():
    a = gaussian([1.0, -2.0, 0.5], np.diag([4.0, 1.0, 0.25]))
    b = gaussian([0.0, 1.0, 0.5], np.diag([1.0, 9.0, 0.25]))
    # |mu_a - mu_b|^2 + sum (sqrt(v_a) - sqrt(v_b))^2 = 10 + 1 + 4 + 0
    assert frechet_distance(a, b) == pytest.approx(15.0, rel=1e-13)


@pytest.mark.parametrize("angle", [0.3, 1.0, np.pi / 2])
def test_equal_to_the_closed_form_for_covariances_that_do_not_commute(angle):
    # For 2x2 matrices the trace term is sqrt(tr(S_a S_b) + 2 sqrt(det S_a det S_b)).
    # tr(S_a^{1/2} S_b^{1/2}) in its place, right only when they commute, fails here.
    cov_a = np.diag([4.0, 0.1])
    cov_b = rotation(angle) @ np.diag([3.0, 0.2]) @ rotation(angle).T
    cross = np.sqrt(np.trace(cov_a @ cov_b) + 2 * np.sqrt(4.0 * 0.1 * 3.0 * 0.2))
    expected = np.trace(cov_a + cov_b) - 2 * cross
    got = frechet_distance(gaussian([0, 0], cov_a), gaussian([0, 0], cov_b))
    assert got == pytest.approx(expected, rel=1e-12)


def test_identical_statistics_have_distance_zero_even_when_singular():
    statistics = FeatureStatistics.of(features(0, 50, 200))
    # Rounding of 1e-16 times a trace of 200; the roots of rounded eigenvalues give 1e-6.
    assert frechet_distance(statistics, statistics) < 1e-11


def rotated(values, seed):
    """Covariance with these eigenvalues in a random basis."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return basis @ np.diag(values) @ basis.T


def test_near_singular_covariances_that_commute_agree_with_the_closed_form():
    # Condition 1e12, the small eigenvalues of one where the large ones of the other are. They are
    # known to 1e-16 of the largest, their roots of 1e-6 therefore to 1e-10.
    values = np.logspace(0, -12, 13)
    cov_a, cov_b = rotated(values, 3), rotated(values[::-1], 3)
    expected = ((np.sqrt(values) - np.sqrt(values[::-1])) ** 2).sum()
    got = frechet_distance(gaussian(np.zeros(13), cov_a), gaussian(np.zeros(13), cov_b))
    assert got == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_near_singular_covariances_that_do_not_commute_agree_with_50_digits(seed):
    values = np.logspace(0, -12, 8)
    cov_a, cov_b = rotated(values, seed), rotated(values, seed + 100)
    with mpmath.workdps(50):
        product = mpmath.matrix(cov_a.tolist()) * mpmath.matrix(cov_b.tolist())
        roots = mpmath.fsum(mpmath.sqrt(abs(v)) for v in mpmath.eig(product, right=False))
        expected = float(mpmath.fsum([*np.trace([cov_a, cov_b], axis1=1, axis2=2), -2 * roots]))
    got = frechet_distance(gaussian(np.zeros(8), cov_a), gaussian(np.zeros(8), cov_b))
    # The root of the product as a matrix, or of its eigenvalues, errs by 1e-9 to 2e-8 here.
    assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("count", "dim"), [(400, 16), (300, 64)])
def test_agrees_with_torchmetrics_on_the_same_features(count, dim):
    real = features(7, count, dim) @ features(8, dim, dim)
    fake = 1.3 * features(9, count + 50, dim) @ features(10, dim, dim) + 0.2
    module = torch.nn.Identity()
    module.num_features = dim
    theirs = FrechetInceptionDistance(feature=module)
    for part in real.split(77):
        theirs.update(part, real=True)
    theirs.update(fake, real=False)
    ours = frechet_distance(FeatureStatistics.of(real), FeatureStatistics.of(fake))
    # Both in float64 from full-rank covariances: sums of squares without centring cost digits.
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-9)


def test_covariances_that_share_a_singular_subspace_differ_only_outside_it():
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(40, 40)))[0][:, :2]
    cov_a = basis @ np.diag([4.0, 1.0]) @ basis.T
    cov_b = basis @ np.diag([1.0, 9.0]) @ basis.T
    zero = np.zeros(40)
    got = frechet_distance(gaussian(zero, cov_a), gaussian(zero, cov_b))
    assert got == pytest.approx(1.0 + 4.0, rel=1e-12)


def test_a_point_mass_is_at_the_other_trace():
    point = gaussian([0.0, 0.0], np.zeros((2, 2)))
    assert frechet_distance(point, gaussian([3.0, 0.0], np.diag([2.0, 5.0]))) == pytest.approx(16.0)


def test_symmetric_in_its_arguments():
    a = FeatureStatistics.of(features(0, 300, 20))
    b = FeatureStatistics.of(features(1, 400, 20) @ features(2, 20, 20))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_fewer_samples_than_features_need_are_reported_with_both_numbers():
    line = too_few_samples(9, 9)
    assert "9 samples of 9 features: fewer than 10" in line
    assert "\n" not in line
    assert too_few_samples(10, 9) is None


def test_with_the_fewest_samples_that_are_enough_the_covariance_has_full_rank():
    ranks = [
        np.linalg.matrix_rank(FeatureStatistics.of(features(0, count, 9)).covariance)
        for count in (9, 10)
    ]
    assert ranks == [8, 9]


def test_moments_are_those_of_numpy_with_the_unbiased_covariance():
    values = features(3, 57, 5)
    statistics = FeatureStatistics.of(values)
    assert statistics.count == 57
    np.testing.assert_allclose(statistics.mean, values.numpy().mean(0), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(statistics.covariance, np.cov(values.numpy().T), rtol=1e-12)


@pytest.mark.parametrize("sizes", [[1] * 100, [50, 50], [1, 99], [37, 3, 60]])
def test_any_split_merges_to_the_statistics_of_the_whole(sizes):
    # A large common offset: sums of squares without centring lose 12 digits to it.
    values = features(4, 100, 6) + 1e6
    whole = FeatureStatistics.of(values)
    merged = merge_all(FeatureStatistics.of(part) for part in values.split(sizes))
    assert merged.count == 100
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-7, atol=1e-7)


def test_split_of_ordinary_features_agrees_to_1e_12():
    values = features(5, 200, 16)
    whole = FeatureStatistics.of(values)
    merged = merge_all(FeatureStatistics.of(part) for part in values.split(17))
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-12, atol=1e-12)


def test_distance_to_a_sample_of_the_same_gaussian_is_its_bias_and_not_more():
    # Bias of the trace term for equal covariances ~ d(d+1)/(4n): 0.105 with d=20, n=1000; + d/n.
    exact = gaussian(np.zeros(20), np.eye(20))
    sample = FeatureStatistics.of(features(6, 1000, 20))
    assert frechet_distance(exact, sample) == pytest.approx(0.125, rel=0.3)


def test_different_widths_are_refused():
    with pytest.raises(ValueError, match="3 and of 4 dimensions"):
        frechet_distance(gaussian(np.zeros(3), np.eye(3)), gaussian(np.zeros(4), np.eye(4)))


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 samples, not 1"):
        _ = FeatureStatistics.of(features(0, 1, 3)).covariance
