"""The network of a bridge's control, and the parametrisation of drift, score and control."""

import pytest
import torch

from cdm_ray.errors import ConfigError
from cdm_ray.networks.control import FIRST_OUTPUT, BridgeControl, ControlNetwork
from cdm_ray.processes.references import Brownian, DoubleWell, OrnsteinUhlenbeck, Schedule

FORMS = ("free", "gradient")
T = 2.0


def make_network(form, dim=2, **options):
    """Of large outputs, so that nothing is right only because it is near 0."""
    torch.manual_seed(0)
    settings = {"width": 16, "depth": 3, "location": 0.3, "scale": 1.7} | options
    network = ControlNetwork(dim, T, form=form, **settings).double()
    with torch.no_grad():
        network.out.weight /= FIRST_OUTPUT
    return network


def points(n=5, dim=2):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(n, dim, generator=rng, dtype=torch.float64)
    return x, torch.rand(n, generator=rng, dtype=torch.float64) * T


def jacobian(field, x, t):
    """[N, d, d] by reverse mode, row by row."""
    return torch.stack(
        [torch.autograd.functional.jacobian(lambda y, s=s: field(y[None], s)[0], row)
         for row, s in zip(x, t, strict=True)]
    )  # fmt: skip


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_gradient_form_is_the_gradient_of_its_potential(depth):
    network = make_network("gradient", depth=depth, scale=[0.5, 3.0])
    x, t = points()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(network.potential(x, t).sum(), x)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(network(x, t), expected, rtol=1e-12, atol=1e-14)


def test_only_the_gradient_form_is_curl_free():
    x, t = points()
    curl = {f: (j := jacobian(make_network(f), x, t))[:, 0, 1] - j[:, 1, 0] for f in FORMS}
    assert curl["gradient"].abs().max() < 1e-14
    assert curl["free"].abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_a_jvp_goes_through_the_network(form):
    network, (x, t), v = make_network(form), points(), points()[0].flip(0)
    with torch.no_grad():
        value, derivative = torch.func.jvp(lambda y: network(y, t), (x,), (v,))
    expected = (jacobian(network, x, t) @ v[..., None]).squeeze(-1)
    torch.testing.assert_close(derivative, expected, rtol=1e-12, atol=1e-14)
    assert value.equal(network(x, t))


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_of_the_field_reaches_every_parameter(form):
    network, (x, t) = make_network(form), points()
    (network(x, t) ** 2).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
    # One by finite differences: a wrong graph through the gradient form would show.
    weight = network.from_state.weight
    expected, step = weight.grad[0, 0].item(), 1e-6
    with torch.no_grad():
        losses = []
        for sign in (1, -2):
            weight[0, 0] += sign * step
            losses.append((network(x, t) ** 2).sum().item())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_share_their_time_may_give_it_once(form):
    network, (x, _) = make_network(form), points()
    t = torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(network(x, t), network(x, t.expand(len(x))), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("form", FORMS)
def test_a_new_network_starts_near_zero_and_is_smooth(form):
    torch.manual_seed(0)
    network = ControlNetwork(3, T, width=64, depth=2, form=form)
    x, t = torch.randn(100, 3), torch.rand(100) * T
    assert 0 < network(x, t).abs().max() < 0.05
    # C1: the derivative of a ReLU network would jump somewhere on a fine line.
    network = make_network(form, dim=1)
    line = torch.linspace(-5, 5, 20001, dtype=torch.float64)[:, None]
    now = torch.tensor(0.4, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda y: network(y, now), (line,), (torch.ones_like(line),))
    assert slope.diff(dim=0).abs().max() < 1e-2 * slope.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_scaled_by_location_and_scale(form):
    """x = location + scale y is to one network what y is to another with 0 and 1."""
    location, scale = [1.0, -2.0], [0.5, 4.0]
    scaled = make_network(form, location=location, scale=scale)
    plain = make_network(form, location=0.0, scale=1.0)
    y, t = points()
    factor = torch.tensor(scale, dtype=torch.float64)
    x = torch.tensor(location, dtype=torch.float64) + factor * y
    # The gradient of phi in x is that in y over the scale.
    expected = plain(y, t) / factor if form == "gradient" else plain(y, t)
    torch.testing.assert_close(scaled(x, t), expected, rtol=1e-12, atol=1e-14)


END = torch.tensor([0.4, -1.1], dtype=torch.float64)


@pytest.mark.parametrize("guide", ["brownian", "none"])
@pytest.mark.parametrize("coefficient", ["one", "sqrt"])
@pytest.mark.parametrize("c", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_drift_score_and_control_are_what_their_names_say(guide, coefficient, c, form):
    sigma = Schedule((0.0, T), (0.5, 2.0))
    process = OrnsteinUhlenbeck(2, sigma, 1.5)
    network = make_network(form)
    control = BridgeControl(
        network, process, END, T, drift_coefficient=c, guide=guide, coefficient=coefficient
    )
    x, t = points()
    s, left = (0.5 + 1.5 * t / T)[:, None], (T - t)[:, None]
    drift = c * -1.5 * x + (left.sqrt() if coefficient == "sqrt" else 1) * s * network(x, t)
    if guide == "brownian":
        drift = drift + (END - x) / left
    tolerance = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(control.drift(x, t), drift, **tolerance)
    torch.testing.assert_close(control.score(x, t), (drift + 1.5 * x) / s**2, **tolerance)
    torch.testing.assert_close(control.control(x, t), (drift + 1.5 * x) / s, **tolerance)
    one = torch.tensor(0.7, dtype=torch.float64)
    for method in (control.drift, control.score, control.control):
        torch.testing.assert_close(method(x, one), method(x, one.expand(len(x))), **tolerance)


def test_with_a_network_that_is_zero_the_score_is_exact_for_brownian_motion():
    process = Brownian(2, 0.7)
    control = BridgeControl(make_network("gradient"), process, END, T)
    with torch.no_grad():
        control.network.out.weight.zero_()
    x, t = points()
    torch.testing.assert_close(control.score(x, t), (END - x) / (0.7**2 * (T - t)[:, None]))
    torch.testing.assert_close(control.control(x, t), (END - x) / (0.7 * (T - t)[:, None]))


@pytest.mark.parametrize("coefficient", ["one", "sqrt"])
def test_the_guide_stays_finite_at_the_end(coefficient):
    process = DoubleWell(1.0, 3.0)
    control = BridgeControl(
        make_network("free", dim=1), process, END[:1], T, coefficient=coefficient
    )
    x, at_end = torch.ones(3, 1, dtype=torch.float64), torch.tensor(T, dtype=torch.float64)
    guided = (END[:1] - x) / (1e-4 * T) + process.drift(x)
    learned = control.network(x, at_end) if coefficient == "one" else 0.0
    torch.testing.assert_close(control.drift(x, at_end), guided + learned)


def test_float32_states_with_float64_times_stay_float32():
    process = OrnsteinUhlenbeck(2, 0.7, 1.5)
    control = BridgeControl(
        make_network("gradient").float(), process, END.float(), T, coefficient="sqrt"
    )
    x, t = points()
    for time in (t, t[0]):
        assert control.drift(x.float(), time).dtype == torch.float32
        assert control.score(x.float(), time).dtype == torch.float32


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ConfigError, match="location=.*give one number or 2"):
        make_network("free", location=[1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match="scale=.*positive"):
        make_network("free", scale=0.0)
    with pytest.raises(ConfigError, match="depth=0"):
        make_network("free", depth=0)
    with pytest.raises(ConfigError, match="use form=gradient"):
        make_network("free").potential(*points())
    with pytest.raises(ConfigError, match="give its 2 coordinates"):
        BridgeControl(make_network("free"), Brownian(2, 0.7), END[:1], T)
    with pytest.raises(ConfigError, match="guide=brown; use brownian or none"):
        BridgeControl(make_network("free"), Brownian(2, 0.7), END, T, guide="brown")
