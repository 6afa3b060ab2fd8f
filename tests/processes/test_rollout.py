import torch

from cdm_ray.processes.edm import euler_maruyama_step, rho_levels
from cdm_ray.processes.oracles import Gaussian
from cdm_ray.processes.rollout import path, rollout

DATA = Gaussian(mean=0.3, variance=0.25)


class Noise:
    def __init__(self, shape, seed=0):
        self.draws, self.shape = 0, shape
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self):
        self.draws += 1
        return torch.randn(self.shape, generator=self.generator, dtype=torch.float64)


class CountedField:
    def __init__(self):
        self.times = []

    def __call__(self, x, t):
        self.times.append(t.clone())
        return DATA(x, t)


def start():
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    times = rho_levels(torch.full((4,), 1.0), torch.tensor([0.5, 0.4, 0.9, 0.1]), 4, 7.0)
    return x, times


def test_evaluates_the_field_and_draws_noise_once_per_step():
    x, times = start()
    field, noise = CountedField(), Noise(x.shape)
    rollout(field, euler_maruyama_step, x, times, noise)
    assert noise.draws == 3
    assert torch.equal(torch.stack(field.times), times[:-1])


def test_a_known_first_value_saves_an_evaluation_and_changes_nothing():
    x, times = start()
    field = CountedField()
    saved = rollout(
        field, euler_maruyama_step, x, times, Noise(x.shape), first_field=DATA(x, times[0])
    )
    assert torch.equal(torch.stack(field.times), times[1:-1])
    assert torch.equal(saved, rollout(DATA, euler_maruyama_step, x, times, Noise(x.shape)))


def test_a_path_shows_the_state_at_every_time_and_ends_where_the_rollout_does():
    x, times = start()
    states = list(path(DATA, euler_maruyama_step, x, times, Noise(x.shape)))
    assert len(states) == 3
    for i, state in enumerate(states):
        end = rollout(DATA, euler_maruyama_step, x, times[: i + 2], Noise(x.shape))
        assert torch.equal(state, end)
    assert torch.equal(rollout(DATA, euler_maruyama_step, x, times[:1], Noise(x.shape)), x)


def test_samples_may_have_their_own_times():
    x, times = start()
    together = rollout(DATA, euler_maruyama_step, x, times, Noise(x.shape))
    for i in range(4):
        alone = rollout(DATA, euler_maruyama_step, x, times[:, i], Noise(x.shape))
        assert torch.equal(alone[i], together[i])


def test_the_mean_of_the_path_converges_with_the_step():
    """The reverse law of Gaussian data has mean mu + (u'/u)(x - mu); Euler's is off by O(step)."""
    x, _ = start()
    exact = 0.3 + (0.25 + 0.4**2) / (0.25 + 1) * (x - 0.3)
    errors = []
    for steps in (20, 40, 80):
        times = rho_levels(torch.tensor(1.0), torch.tensor(0.4), steps + 1, 7.0)
        mean = rollout(DATA, euler_maruyama_step, x, times, lambda: torch.zeros_like(x))
        errors.append((mean - exact).abs().max().item())
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 1.9 < coarse / fine < 2.2  # order 1
