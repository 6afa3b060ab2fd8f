import pickle
import textwrap

import pytest
import torch

from cdm_ray.errors import ConfigError
from cdm_ray.processes.references import Schedule, jacobian_transpose
from cdm_ray.processes.user_drift import drift_from

START, END = torch.tensor([1.0, 0.5]), torch.tensor([-1.0, 2.0])

DRIFTS = """
import torch

from cdm_ray.processes.references import MuellerBrown

mueller_brown = MuellerBrown(3.0).drift

CUBE = 3

def swirl(x):
    return torch.stack((-x[:, 1] - x[:, 0] ** 3, 2 * x[:, 0]), dim=1)

def in_place(x):
    out = torch.zeros_like(x)
    out[:, 0] = -x[:, 0] ** 3
    return out

def constant(x):
    return torch.ones_like(x)

def optional(x, scale=2.0):
    return -scale * x

def raises(x):
    raise RuntimeError("no such\\nluck")

def transposed(x):
    return x.T

def first_only(x):
    return x[:, :1]

def double(x):
    return x.double()

def single(x):
    return x.float()

def log(x):
    return x.log()

def infinite_at_the_start(x):
    return 1 / (x - 1)

def detached(x):
    return -x.detach() ** 3

def numpy(x):
    return torch.from_numpy(x.detach().numpy() ** 3)

def kink(x):
    return (x - 1).clamp(min=0)

def rows(x):
    return x - x.mean(0)

def noisy(x):
    return torch.randn_like(x)

def changes(x):
    x *= 2
    return x

def number(x):
    return 1.0

def with_sigma(x):
    return -x, x.sqrt()

def wants_sigma(x, sigma):
    return -x * sigma

def wants_time(x, t):
    return -x * t
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module with the drifts above."""
    (tmp_path / "drifts_of_a_user.py").write_text(textwrap.dedent(DRIFTS))
    (tmp_path / "broken_drifts_of_a_user.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "drifts_of_a_user"


@pytest.mark.parametrize("function", ["swirl", "in_place", "constant", "optional"])
def test_a_good_drift_becomes_a_process(module, function):
    sigma = Schedule((0.0, 1.0), (1.0, 0.5))
    process = drift_from(f"{module}:{function}", 2, sigma, START, END)
    assert process.dim == 2
    assert process.noise == sigma
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([[0.5, -2.0], [1.5, 3.0], [0.0, 0.1]], dtype=dtype)
        v = x.flip(0)
        b = process.drift(x)
        assert b.dtype == dtype
        full = torch.stack(
            [torch.func.jacrev(lambda y: process.drift(y[None])[0])(row) for row in x]
        )
        torch.testing.assert_close(
            jacobian_transpose(process, x, v), torch.einsum("nij,ni->nj", full, v)
        )
    assert torch.equal(pickle.loads(pickle.dumps(process)).drift(x), b)


def test_a_steep_drift_is_accepted_at_its_stationary_points(module):
    """Terms of a thousand cancel there, which leaves only rounding in float32."""
    start, end = torch.tensor([-0.558, 1.442]), torch.tensor([0.624, 0.028])
    process = drift_from(f"{module}:mueller_brown", 2, 3.0, start, end)
    assert process.drift(end[None]).abs().max() < 2


def test_a_function_that_does_not_tell_its_arguments_is_tried_all_the_same():
    x = torch.tensor([[0.5, -2.0]])
    assert torch.equal(drift_from("torch:sin", 2, 0.5, START, END).drift(x), x.sin())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("missing", "there is no missing in drifts_of_a_user"),
        ("CUBE", "CUBE is no function"),
        ("raises", r"fails on states of shape \[3, 2\] \(RuntimeError: no such luck\)"),
        ("transposed", r"\[3, 2\] into \[2, 3\]; it has to keep \[N, d\] with d = 2"),
        ("first_only", r"into \[3, 1\]"),
        ("double", "turns torch.float32 into torch.float64"),
        ("single", "turns torch.float64 into torch.float32"),
        ("log", r"is \[nan, 0.69.*\] at the end \[-1.0, 2.0\]; it has to be finite"),
        ("infinite_at_the_start", r"is \[inf, -2.0\] at the start \[1.0, 0.5\]"),
        ("detached", "derivative by autograd differs"),
        ("numpy", "autograd cannot differentiate it|derivative by autograd differs"),
        ("kink", "at a kink"),
        ("rows", "changes with the other rows"),
        ("noisy", "from call to call"),
        ("changes", "changes the states it is given"),
        ("number", "returns float, not a tensor"),
        ("with_sigma", "returns a tuple, not b.x. alone: sigma may depend on time only"),
        ("wants_sigma", "wants x, sigma, .* sigma may depend on time only"),
        ("wants_time", "wants x, t, .* does not depend on time"),
    ],
)
def test_a_bad_drift_is_refused_in_one_line_that_names_it(module, function, message):
    spec = f"{module}:{function}"
    with pytest.raises(ConfigError, match=message) as caught:
        drift_from(spec, 2, 0.5, START, END)
    assert str(caught.value).startswith(f"drift={spec}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("drift", "give module:function"),
        (":drift", "give module:function"),
        ("module:", "give module:function"),
        ("no_such_module:drift", "cannot import no_such_module .ModuleNotFoundError.*PYTHONPATH"),
        ("broken_drifts_of_a_user:drift", "cannot import .*ZeroDivisionError"),
    ],
)
def test_a_drift_that_cannot_be_imported_is_refused_in_one_line(module, spec, message):
    with pytest.raises(ConfigError, match=message) as caught:
        drift_from(spec, 2, 0.5, START, END)
    assert str(caught.value).startswith(f"drift={spec}")


def test_a_wrong_dimension_shows_when_the_drift_is_tried(module):
    three = torch.ones(3)
    with pytest.raises(ConfigError, match=r"\[3, 3\] into \[3, 2\].*d = 3"):
        drift_from(f"{module}:swirl", 3, 0.5, three, three)
