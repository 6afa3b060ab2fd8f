import torch

from cdm_ray.config import NetworkConfig
from cdm_ray.networks import build_network
from cdm_ray.networks.dropout import Dropout
from cdm_ray.randomness import BlockRng


def lanes(*numbers):
    return BlockRng.for_lanes(0, 0, numbers, "cpu")


def test_masks_do_not_depend_on_how_lanes_are_grouped():
    h = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    together = Dropout(lanes(0, 1, 2, 3))(h, 0.3)
    apart = [Dropout(lanes(0, 1))(h[:4], 0.3), Dropout(lanes(2, 3))(h[4:], 0.3)]
    assert torch.equal(together, torch.cat(apart))


def test_keeps_the_mean_and_drops_the_stated_share():
    told = Dropout(lanes(0))(torch.ones(1, 100_000), 0.3)
    # 4 standard errors of a proportion at n = 100,000
    error = 4 * (0.3 * 0.7 / 100_000) ** 0.5
    assert abs((told == 0).float().mean() - 0.3) < error
    assert abs(told.mean() - 1) < error / 0.7
    assert torch.equal(told[told != 0], torch.full_like(told[told != 0], 1 / 0.7))


def test_inactive_rows_are_untouched_and_leave_the_masks_of_the_others():
    h = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    active = torch.tensor([True, False, True, False])
    some, every = Dropout(lanes(0, 1), active)(h, 0.5), Dropout(lanes(0, 1))(h, 0.5)
    assert torch.equal(some[~active], h[~active])
    assert torch.equal(some[active], every[active])
    assert not torch.equal(every[active], h[active])


def test_each_draw_is_new():
    dropout, h = Dropout(lanes(0)), torch.ones(1, 1000)
    assert not torch.equal(dropout(h, 0.5), dropout(h, 0.5))


def network(p):
    torch.manual_seed(0)
    config = NetworkConfig(
        model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), dropout=p
    )
    built = build_network(config, resolution=8, channels=1, label_dim=0).requires_grad_(False)
    for parameter in built.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return built


def test_a_call_without_dropout_has_none():
    x, sigma = torch.ones(2, 1, 8, 8), torch.ones(2)
    dropping = network(0.5)
    assert torch.equal(dropping(x, sigma), network(0.0)(x, sigma))
    assert not torch.equal(dropping(x, sigma, dropout=Dropout(lanes(0))), dropping(x, sigma))
