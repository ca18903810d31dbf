"""Terms that keep the context encoder from collapsing; the published loss has none."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn


class VarianceCovariance(nn.Module):
    """Variance and covariance terms of VICReg (arXiv 2105.04906, eq. 1-4) on context tokens.

    With samples `z [n, D]`, their covariance matrix `C` and `eps = 1e-4`:

        variance   = 1/D * sum_j max(0, 1 - sqrt(C_jj + eps))
        covariance = 1/D * sum_{i != j} C_ij^2
        term       = weight * (variance + covariance_share * covariance)

    C-JEPA (arXiv 2410.19560) adds variance and covariance terms to I-JEPA. VICReg looks at one
    vector per image; its invariance term needs a second view and is left out.

    Args:
        weight: Factor of the whole term.
        over: What a sample is. `images`: the mean of an image's context tokens, n = B.
            `tokens`: every context token, n = B * K; positions then count as variance.
            `residuals`: every context token minus the mean of its image's context tokens, so that
            differences between images do not count and only what varies within them does.
        covariance_share: Weight of the covariance against the variance term.

    Raises:
        ValueError: `over` is unknown, or a weight is negative.
    """

    def __init__(
        self,
        weight: float,
        over: Literal["images", "tokens", "residuals"] = "images",
        covariance_share: float = 0.04,
    ) -> None:
        super().__init__()
        if over not in ("images", "tokens", "residuals"):
            raise ValueError(f"over is {over!r}; it must be 'images', 'tokens' or 'residuals'")
        if weight < 0 or covariance_share < 0:
            raise ValueError(
                f"weight is {weight} and covariance_share {covariance_share}; "
                "both must be 0 or more"
            )
        self.weight = weight
        self.over = over
        self.covariance_share = covariance_share

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the weighted term of context tokens `[B, K, D]` as a scalar.

        Raises:
            ValueError: There are fewer than two samples, which have no variance.
        """
        # In bf16 a covariance of unit-variance features has an error as large as its entries.
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float()
            means = tokens.mean(dim=1)
            if self.over == "residuals":
                tokens = tokens - means[:, None]
            samples = means if self.over == "images" else tokens.flatten(0, 1)
            if len(samples) < 2:
                raise ValueError("VarianceCovariance needs at least two images in a batch")
            centred = samples - samples.mean(dim=0)
            covariance = centred.T @ centred / (len(samples) - 1)
            variances = covariance.diagonal()
            hinge = torch.relu(1.0 - torch.sqrt(variances + 1e-4)).mean()
            off_diagonal = (covariance.square().sum() - variances.square().sum()) / len(variances)
            return self.weight * (hinge + self.covariance_share * off_diagonal)

    def extra_repr(self) -> str:
        """Show the settings when the module is printed."""
        return f"{self.weight}, over={self.over!r}, covariance_share={self.covariance_share}"
