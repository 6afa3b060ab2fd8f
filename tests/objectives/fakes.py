"""Stand-ins for networks that record how they are called, and the options of the released code."""

from dataclasses import dataclass

import torch

from cdm_ray.config import ImageConfig, load_config
from cdm_ray.networks.dropout import Dropout

RELEASED = load_config(ImageConfig, "cifar10-cond-faithful").cp.model_dump(exclude={"weight"})
"""Options of the released code of Consistent Diffusion Models."""


@dataclass(frozen=True)
class Call:
    x: torch.Tensor
    sigma: torch.Tensor
    grad: bool
    class_labels: torch.Tensor | None
    augment_labels: torch.Tensor | None
    dropout: Dropout | None
    result: torch.Tensor

    @property
    def rows(self):
        return len(self.x)


class FakeNetwork(torch.nn.Module):
    """D = scale * shrink(sigma) * x, with dropout on D if p > 0; `scale` is the one parameter."""

    def __init__(self, shrink=lambda sigma: 0.25 / (0.25 + sigma**2), scale=1.0, p=0.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.shrink, self.p, self.calls = shrink, p, []

    def forward(self, x, sigma, class_labels=None, augment_labels=None, dropout=None):
        h = self.scale * self.shrink(sigma).view(-1, *[1] * (x.ndim - 1)) * x
        mask = None if dropout is None else dropout.draw(h.shape, self.p)
        h = h if mask is None else mask(h)
        grad = torch.is_grad_enabled()
        self.calls.append(Call(x, sigma, grad, class_labels, augment_labels, dropout, h.detach()))
        return h

    @property
    def units(self):
        """Cost of all calls so far: 3 per row with gradient, 1 without."""
        return sum(call.rows * (3 if call.grad else 1) for call in self.calls)
