import pytest
import torch

from cdm_ray.networks.block import UNetBlock
from cdm_ray.networks.dropout import Dropout
from cdm_ray.randomness import BlockRng
from tests.networks.architectures import ARCHITECTURES, build, loud, noise


def lanes(*numbers):
    return BlockRng.for_lanes(0, 0, numbers, "cpu")


def dropped(h, p, *numbers, active=None):
    return Dropout(lanes(*numbers), active).draw(h.shape, p)(h)


def test_masks_do_not_depend_on_how_lanes_are_grouped():
    h = noise(8, 3, 4, 4)
    apart = [dropped(h[:4], 0.3, 0, 1), dropped(h[4:], 0.3, 2, 3)]
    assert torch.equal(dropped(h, 0.3, 0, 1, 2, 3), torch.cat(apart))


def test_keeps_the_mean_and_drops_the_stated_share():
    told = dropped(torch.ones(1, 100_000), 0.3, 0)
    # 4 standard errors of a proportion at n = 100,000
    error = 4 * (0.3 * 0.7 / 100_000) ** 0.5
    assert abs((told == 0).float().mean() - 0.3) < error
    assert abs(told.mean() - 1) < error / 0.7
    assert torch.equal(told[told != 0], torch.full_like(told[told != 0], 1 / 0.7))


def test_keeps_the_mean_in_bf16():
    h = torch.arange(128, 256).bfloat16()[None]  # every mantissa
    kept = dropped(h, 0.25, 0)
    # one rounding of the exact product; a factor rounded to bf16 gives other values
    exact = (h.double() / 0.75).bfloat16()
    assert torch.equal(kept, torch.where(kept == 0, kept, exact))


def test_inactive_rows_are_untouched_and_leave_the_masks_of_the_others():
    h = noise(4, 50)
    active = torch.tensor([True, False, True, False])
    some, every = dropped(h, 0.5, 0, 1, active=active), dropped(h, 0.5, 0, 1)
    assert torch.equal(some[~active], h[~active])
    assert torch.equal(some[active], every[active])
    assert not torch.equal(every[active], h[active])


@pytest.mark.parametrize("active", [None, torch.tensor([True, False])])
def test_memory_format_changes_nothing_and_is_kept(active):
    h = noise(2, 3, 4, 4).requires_grad_()
    last = h.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    told, told_last = (dropped(each, 0.5, 0, active=active) for each in (h, last))
    assert torch.equal(told, told_last)
    assert told.is_contiguous()
    assert told_last.is_contiguous(memory_format=torch.channels_last)
    gradient = noise(2, 3, 4, 4, seed=2)
    told.backward(gradient)
    told_last.backward(gradient.contiguous(memory_format=torch.channels_last))
    assert torch.equal(h.grad, last.grad)
    assert last.grad.is_contiguous(memory_format=torch.channels_last)


def test_each_draw_is_new_and_a_mask_stays_the_same():
    dropout, h = Dropout(lanes(0)), torch.ones(1, 1000)
    first, second = dropout.draw(h.shape, 0.5), dropout.draw(h.shape, 0.5)
    assert torch.equal(first(h), first(h))
    assert not torch.equal(first(h), second(h))


class Recorder:
    """Draws no masks, and notes those that it was asked for."""

    def __init__(self):
        self.asked = []

    def draw(self, shape, p):
        self.asked.append((shape, p))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_block_has_a_mask_of_its_own_in_the_shape_of_its_hidden_layer(architecture):
    network, recorder = build(architecture, dropout=0.3, num_blocks=2), Recorder()
    hidden = []
    for module in network.modules():
        if isinstance(module, UNetBlock):
            module.conv1.register_forward_pre_hook(lambda _, given: hidden.append(given[0].shape))
    network(noise(3, 1, 8, 8), torch.ones(3), dropout=recorder)
    assert recorder.asked == [(tuple(shape), 0.3) for shape in hidden]
    assert len(hidden) == 2 * 2 + 1 + 2 * 3 + 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_call_without_dropout_has_none(architecture):
    x, sigma = torch.ones(2, 1, 8, 8), torch.ones(2)
    dropping = loud(build(architecture, dropout=0.5))
    assert torch.equal(dropping(x, sigma), loud(build(architecture, dropout=0.0))(x, sigma))
    assert not torch.equal(dropping(x, sigma, dropout=Dropout(lanes(0))), dropping(x, sigma))
