"""Terms that keep the context encoder from collapsing; the official loss has none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..seeds import standard_normal

Over = Literal["images", "tokens", "residuals"]


class Regularizer(nn.Module, ABC):
    """A term over samples from the context tokens, times `weight`.

    Samples are, by `over`: the mean of an image's context tokens (`images`, n = B), every context
    token (`tokens`, n = B * K; positions then count as variance), or every context token minus the
    mean of its image's (`residuals`, only the variance within images).
    """

    def __init__(self, weight: float, over: Over = "images") -> None:
        super().__init__()
        if over not in get_args(Over):
            raise SettingsError(f"over is {over!r}; it must be one of {', '.join(get_args(Over))}")
        self.weight, self.over = weight, over
        self.seed = 0  # set by the trainer in every step
        self.value = torch.zeros(())  # weighted term of the last forward pass, for the log

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the weighted term of context tokens `[B, K, D]` as a scalar."""
        # In bf16 a covariance of unit-variance features has an error as large as its entries.
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float()
            means = tokens.mean(dim=1)
            if self.over == "residuals":
                tokens = tokens - means[:, None]
            samples = means if self.over == "images" else tokens.flatten(0, 1)
            if len(samples) < 2:
                raise SettingsError(f"{type(self).__name__} needs at least two images in a batch")
            term = self.weight * self.term(samples)
        self.value = term.detach()
        return term

    @abstractmethod
    def term(self, samples: Tensor) -> Tensor:
        """Return the term of samples `[n, D]`, float32, without its weight."""


class VarianceCovariance(Regularizer):
    """Variance and covariance terms of VICReg (arXiv 2105.04906, eq. 1-4).

    With samples `z [n, D]`, their covariance matrix `C` and `eps = 1e-4`:

        variance   = 1/D * sum_j max(0, 1 - sqrt(C_jj + eps))
        covariance = 1/D * sum_{i != j} C_ij^2
        term       = variance + covariance_share * covariance

    C-JEPA (arXiv 2410.19560) adds both terms to I-JEPA. VICReg's samples are one vector per image;
    its invariance term needs a second view and is left out.
    """

    def __init__(
        self, weight: float, over: Over = "images", covariance_share: float = 0.04
    ) -> None:
        super().__init__(weight, over)
        self.covariance_share = covariance_share

    def term(self, samples: Tensor) -> Tensor:
        """See the class."""
        centered = samples - samples.mean(dim=0)
        covariance = centered.T @ centered / (len(samples) - 1)
        variances = covariance.diagonal()
        hinge = torch.relu(1.0 - torch.sqrt(variances + 1e-4)).mean()
        off_diagonal = (covariance.square().sum() - variances.square().sum()) / len(variances)
        return hinge + self.covariance_share * off_diagonal


class IsotropicGaussian(Regularizer):
    """SIGReg of LeJEPA (arXiv 2511.08544): distance of the samples from an isotropic Gaussian.

    Along random unit directions `a`, new ones in every step, the empirical characteristic function
    of the samples is compared with that of a standard normal variable (Epps and Pulley):

        distance(t) = |1/n sum_i exp(i t a.z_i) - exp(-t^2/2)|^2
        term = n * mean_a integral_{-5}^{5} distance(t) exp(-t^2/2) dt

    with 17 points and the trapezoidal rule.
    """

    def __init__(self, weight: float, over: Over = "images", directions: int = 256) -> None:
        super().__init__(weight, over)
        self.directions = directions

    def term(self, samples: Tensor) -> Tensor:
        """See the class."""
        directions = standard_normal((samples.shape[1], self.directions), self.seed, samples.device)
        directions = directions / directions.norm(dim=0)
        points = torch.linspace(-5, 5, 17, device=samples.device)
        normal = torch.exp(-0.5 * points.square())
        angles = (samples @ directions).unsqueeze(-1) * points  # [n, directions, 17]
        real, imaginary = angles.cos().mean(dim=0), angles.sin().mean(dim=0)
        distance = ((real - normal).square() + imaginary.square()) * normal
        return len(samples) * torch.trapezoid(distance, points, dim=-1).mean()
