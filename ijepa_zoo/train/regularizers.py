"""A term that keeps the context encoder from collapsing; the official loss has none."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import SettingsError

Over = Literal["residuals", "images"]


class VarianceCovariance(nn.Module):
    """Variance and covariance terms of VICReg (arXiv 2105.04906, eq. 1-4) over context tokens.

    With samples `z [n, D]`, their covariance matrix `C` and `eps = 1e-4`:

        variance   = 1/D * sum_j max(0, 1 - sqrt(C_jj + eps))
        covariance = 1/D * sum_{i != j} C_ij^2
        term       = weight * (variance + covariance_share * covariance)

    C-JEPA (arXiv 2410.19560) adds both terms to I-JEPA. VICReg's samples are one vector per image;
    its invariance term needs a second view and is left out.

    Args:
        weight: Factor of the whole term.
        over: Samples. `residuals`: each context token minus the mean of its image's, n = B * K, so
            that only the variance within images counts. `images`: these means, n = B.
        covariance_share: Weight of the covariance relative to the variance.

    Attributes:
        value: The term of the last forward pass, a scalar, for the log.
    """

    def __init__(
        self, weight: float, over: Over = "residuals", covariance_share: float = 0.04
    ) -> None:
        super().__init__()
        self.weight, self.over, self.covariance_share = weight, over, covariance_share
        self.value = torch.zeros(())

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the term of context tokens `[B, K, D]` as a float32 scalar."""
        # In bf16 a covariance of unit-variance features has an error as large as its entries.
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float()
            means = tokens.mean(dim=1)
            samples = means if self.over == "images" else (tokens - means[:, None]).flatten(0, 1)
            if len(samples) < 2:
                raise SettingsError("the regularizer needs at least two images in a batch")
            term = self.weight * self._term(samples)
        self.value = term.detach()
        return term

    def _term(self, samples: Tensor) -> Tensor:
        centered = samples - samples.mean(dim=0)
        covariance = centered.T @ centered / (len(samples) - 1)
        variances = covariance.diagonal()
        hinge = torch.relu(1.0 - torch.sqrt(variances + 1e-4)).mean()
        off_diagonal = (covariance.square().sum() - variances.square().sum()) / len(variances)
        return hinge + self.covariance_share * off_diagonal
