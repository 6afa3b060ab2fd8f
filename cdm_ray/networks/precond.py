"""EDM preconditioning (Karras et al. 2022, table 1 and equation 7)."""

from __future__ import annotations

import torch

from cdm_ray.networks.dropout import Dropout


class EDMPrecond(torch.nn.Module):
    """Denoiser `D(x; sigma) = c_skip x + c_out F(c_in x, c_noise)` around a network F.

    The inner network works at unit scale and knows nothing of `sigma_data`.
    """

    def __init__(self, network: torch.nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.model = network
        self.sigma_data = sigma_data

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> torch.Tensor:
        """x [N, C, H, W], sigma [N] or scalar, one-hot class_labels [N, K], augment_labels [N, A];
        all float32, as is the result D [N, C, H, W]. F runs in the dtype of its parameters."""
        sigma = sigma.float().expand(x.shape[0]).view(-1, 1, 1, 1)
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        c_noise = sigma.flatten().log() / 4
        dtype = next(self.model.parameters()).dtype
        f = self.model((c_in * x).to(dtype), c_noise, class_labels, augment_labels, dropout)
        return c_skip * x + c_out * f.float()
