import pytest
import torch

from cdm_ray.config import CPConfig, DSMConfig, NetworkConfig
from cdm_ray.networks import build_network
from cdm_ray.objectives.base import ImageBatch
from cdm_ray.objectives.cp import forward_units
from cdm_ray.objectives.image import ImageObjective
from cdm_ray.randomness import BlockRng, generator
from tests.objectives.fakes import RELEASED, FakeNetwork

CASES = [
    ({"weight": 0.0}, [(16, True)]),
    ({}, [(16, True), (8, True)]),
    ({"gradient": "both"}, [(16, True), (8, True)]),
    ({"gradient": "high"}, [(16, True), (8, False)]),
    ({"gradient": "high", "estimator": "regress"}, [(16, True), (4, False)]),
    ({"rollout_steps": 3}, [(16, True), (8, False), (8, False), (8, True)]),
    ({"rollout_steps": 2, "reuse_d0": False}, [(16, True), (8, False), (8, False), (8, True)]),
    (RELEASED, [(16, True)] + 5 * [(32, False)] + [(32, True)]),
]


def objective(dsm=None, rollout_model=None, **options):
    cp = CPConfig.model_validate({"weight": 1.0} | options)
    return ImageObjective(DSMConfig.model_validate(dsm or {}), cp, 0.5, rollout_model)


def lanes(numbers=range(4)):
    return BlockRng.for_lanes(3, 5, list(numbers), "cpu")


def batch(n=16, labels=True):
    gen = generator(8)
    return ImageBatch(
        images=torch.rand(n, 1, 8, 8, generator=gen) * 2 - 1,
        class_labels=torch.eye(10)[torch.randint(10, (n,), generator=gen)] if labels else None,
    )


def rows_of(whole, rows):
    return ImageBatch(images=whole.images[rows], class_labels=whole.class_labels[rows])


def small_network(label_dim=10):
    torch.manual_seed(0)
    config = NetworkConfig(
        model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), dropout=0.2
    )
    network = build_network(config, resolution=8, channels=1, label_dim=label_dim)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize(("options", "calls"), CASES)
def test_network_is_called_as_often_as_the_options_say_and_no_more(options, calls):
    network = FakeNetwork()
    objective(**options)(network, batch(), lanes(), 0)
    assert [(call.rows, call.grad) for call in network.calls] == calls
    cp = CPConfig.model_validate({"weight": 1.0} | options)
    assert network.units / 16 == forward_units(cp)


def test_averaged_rollouts_spare_the_live_network():
    network, averaged = FakeNetwork(), FakeNetwork()
    options = {"rollout_weights": "ema", "reuse_d0": False}
    objective(rollout_model=averaged, **options)(network, batch(), lanes(), 0)
    assert [(call.rows, call.grad) for call in network.calls] == [(16, True), (8, True)]
    assert [(call.rows, call.grad) for call in averaged.calls] == [(8, False)]


def test_without_consistency_there_is_one_term_and_no_further_draw():
    network, rng = FakeNetwork(), lanes()
    plain = objective(weight=0.0)
    terms = plain(network, batch(), rng, 0)
    assert list(terms) == ["dsm"]
    assert terms["dsm"].weight == 1.0
    assert plain.consistency is None
    again = lanes()
    again.normal(16)
    again.normal(16, 1, 8, 8)
    assert torch.equal(rng.uniform(4), again.uniform(4))
    assert network.calls[0].dropout.active is None


def test_denoising_term_is_the_weighted_squared_error_at_log_normal_noise():
    network, n = FakeNetwork(), 4000
    images = batch(n, labels=False)
    term = objective(weight=0.0)(network, images, lanes(), 0)["dsm"]
    (call,) = network.calls
    log = call.sigma.log()
    # 4 standard errors at n = 4000
    assert log.mean().item() == pytest.approx(-1.2, abs=4 * 1.2 / n**0.5)
    assert log.std().item() == pytest.approx(1.2, abs=4 * 1.2 / (2 * n) ** 0.5)
    noise = (call.x - images.images) / call.sigma.view(-1, 1, 1, 1)
    assert noise.std().item() == pytest.approx(1, abs=4 / (2 * n * 64) ** 0.5 + 1e-4)
    weight = (call.sigma**2 + 0.25) / (call.sigma * 0.5) ** 2
    squares = ((call.result - images.images) ** 2).sum((1, 2, 3))
    assert term.value.item() == pytest.approx((weight * squares).sum().item(), rel=1e-5)


def test_input_perturbation_adds_noise_that_the_network_is_not_told_of():
    seen = {}
    for gamma in (0.0, 0.75):
        network = FakeNetwork()
        objective({"input_perturbation": gamma}, weight=0.0)(network, batch(), lanes(), 0)
        seen[gamma] = network.calls[0]
    assert torch.equal(seen[0.75].sigma, seen[0.0].sigma)
    noise = {gamma: call.x - batch().images for gamma, call in seen.items()}
    # sqrt(1 + 0.75^2) = 1.25; float32 rounding of sums around 1
    torch.testing.assert_close(noise[0.75], 1.25 * noise[0.0], rtol=1e-4, atol=1e-5)


def test_dropout_of_the_released_code_spares_no_image():
    network = FakeNetwork(p=0.5)
    objective(fraction=1.0, dropout=True)(network, batch(), lanes(), 0)
    assert network.calls[0].dropout.active is None
    assert all(call.dropout is not None for call in network.calls)


def test_noise_and_dropout_of_the_denoising_term_do_not_depend_on_consistency():
    results = {}
    for weight in (0.0, 1.0):
        network = FakeNetwork(p=0.5)
        objective(weight=weight, fraction=0.5)(network, batch(), lanes(), 0)
        results[weight] = network.calls[0]
    off, on = results[0.0], results[1.0]
    assert torch.equal(off.x, on.x)
    assert torch.equal(off.sigma, on.sigma)
    part = torch.tensor([True, True, False, False] * 4)
    assert torch.equal(on.dropout.active, ~part)
    assert torch.equal(off.result[~part], on.result[~part])
    assert (off.result[part] == 0).float().mean() > 0.4
    assert (on.result[part] != 0).all()


def test_lanes_on_several_workers_add_up_to_the_whole_batch():
    network, whole = small_network(), batch()
    told = objective(fraction=0.5, rollout_steps=2)
    together = told(network, whole, lanes(), 0)
    halves = [
        told(network, rows_of(whole, slice(0, 8)), lanes([0, 1]), 0),
        told(network, rows_of(whole, slice(8, 16)), lanes([2, 3]), 0),
    ]
    for name, term in together.items():
        apart = sum(half[name].value for half in halves)
        # sums of float32 in another order
        torch.testing.assert_close(apart, term.value, rtol=1e-4, atol=1e-5)
    assert together["cp"].value != 0


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_a_share_of_the_batch_estimates_the_whole(fraction):
    """D = c sigma everywhere makes each pair (c (sigma - sigma'))^2 per pixel, sigma' uniform
    within the window: its mean is c^2 sigma^2 window^2 / 3."""

    def constant(x, sigma, **labels):
        return 3 * sigma.view(-1, 1, 1, 1).expand_as(x)

    n, sigma = 4096, 0.5
    dsm = {"p_mean": float(torch.tensor(sigma).log()), "p_std": 1e-6}
    images = ImageBatch(images=torch.zeros(n, 1, 2, 2))
    term = objective(dsm, fraction=fraction, window=0.4)(constant, images, lanes(), 0)["cp"]
    scale = (3 * sigma * 0.4) ** 2 * 4
    # the square of a uniform number has mean 1/3 and variance 4/45
    error = 4 * scale * (4 / 45 / (n * fraction)) ** 0.5
    assert term.value.item() / n == pytest.approx(scale / 3, abs=error)


@pytest.mark.parametrize(
    ("warmup", "seen", "expected"),
    [(0, 0, 10.0), (1000, 0, 0.0), (1000, 250, 2.5), (1000, 1000, 10.0), (1000, 5000, 10.0)],
)
def test_weight_grows_linearly_over_the_warm_up(warmup, seen, expected):
    terms = objective(weight=10.0, warmup_images=warmup)(FakeNetwork(), batch(), lanes(), seen)
    assert terms["cp"].weight == expected
    assert terms["dsm"].weight == 1.0


@pytest.mark.parametrize("label_dim", [0, 10])
def test_one_backward_pass_reaches_all_weights_with_and_without_labels(label_dim):
    network = small_network(label_dim)
    terms = objective()(network, batch(labels=label_dim > 0), lanes(), 0)
    sum(term.weight * term.value for term in terms.values()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
