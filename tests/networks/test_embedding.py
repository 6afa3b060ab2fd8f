import math

import pytest
import torch

from cdm_ray.networks.embedding import FourierEmbedding, PositionalEmbedding

NOISE = torch.tensor([-1.5, 0.0, 0.7])


def test_positional_frequencies_are_those_of_each_paper():
    song = PositionalEmbedding(6, sines_first=True)(NOISE)
    adm = PositionalEmbedding(6, sines_first=False)(NOISE)
    for row, level in enumerate(NOISE.tolist()):
        angles = [level * 10_000 ** (-k / 2) for k in range(3)]
        told = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert song[row].tolist() == pytest.approx(told, abs=1e-6)
        angles = [level * 10_000 ** (-k / 3) for k in range(3)]
        told = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert adm[row].tolist() == pytest.approx(told, abs=1e-6)


def test_fourier_frequencies_are_normal_of_the_stated_scale():
    torch.manual_seed(0)
    freqs = FourierEmbedding(20_000).freqs
    # 5 standard errors of the mean and of the standard deviation of 10,000 draws
    assert freqs.mean().item() == pytest.approx(0, abs=5 * 16 / 100)
    assert freqs.std().item() == pytest.approx(16, rel=5 / math.sqrt(2 * 10_000))


def test_fourier_features_are_sines_then_cosines():
    embedding = FourierEmbedding(4)
    angles = 2 * math.pi * NOISE[:, None].double() * embedding.freqs.double()
    expected = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    # angles of order 100 in float32 are exact to 1e-5
    torch.testing.assert_close(embedding(NOISE), expected, rtol=0, atol=1e-4)


def test_fourier_frequencies_are_not_rounded_with_the_weights():
    embedding = FourierEmbedding(64)
    exact = embedding.freqs.clone()
    embedding.bfloat16()
    assert embedding.freqs.dtype == torch.float32
    assert torch.equal(embedding.freqs, exact)


def test_fourier_frequencies_can_be_left_out_and_filled_in():
    with torch.device("meta"):
        embedding = FourierEmbedding(8)
    embedding.to_empty(device="cpu").load_state_dict({"freqs": torch.arange(4.0)})
    assert torch.equal(embedding.freqs, torch.arange(4.0))
