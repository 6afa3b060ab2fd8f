import numpy as np
import pytest
import torch

from cdm_ray.evaluation.frechet import (
    FeatureStatistics,
    frechet_distance,
    merge_all,
    metric_name,
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
    with pytest.warns(UserWarning, match="50 samples of 200 features"):
        distance = frechet_distance(statistics, statistics)
    # Rounding of 1e-16 times a trace of 200; the roots of rounded eigenvalues give 1e-6.
    assert distance < 1e-11


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


def test_fewer_samples_than_features_warn_with_both_numbers():
    few = FeatureStatistics.of(features(0, 9, 9))
    enough = FeatureStatistics.of(features(0, 10, 9))
    with pytest.warns(UserWarning, match="9 samples of 9 features: fewer than 10"):
        frechet_distance(few, enough)


def test_enough_samples_do_not_warn(recwarn):
    enough = FeatureStatistics.of(features(0, 10, 9))
    frechet_distance(enough, enough)
    assert not recwarn.list


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


def test_only_inception_with_2048_features_is_called_fid():
    assert metric_name("inception", 2048) == "fid"
    assert metric_name("inception", 64) == "fd_inception"
    assert metric_name("digits", 64) == "fd_digits"
    assert metric_name("digits", 2048) == "fd_digits"
