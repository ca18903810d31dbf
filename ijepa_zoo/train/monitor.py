"""Numbers that show collapse during pretraining; the loss does not."""

from __future__ import annotations

import torch


def rankme(features: torch.Tensor) -> float:
    """Effective rank of features: exp of the entropy of their singular values.

    RankMe (arXiv 2210.02885, eq. 1-2), with `p_k = s_k / sum(s) + 1e-7`. It is at most min(n, D),
    so compare only values of the same n and D; the paper advises many more samples than features.

    Args:
        features: One row per image, `[n, D]`.

    Returns:
        The effective rank, from 1 (collapsed) to min(n, D).
    """
    singular = torch.linalg.svdvals(_checked(features))
    p = singular / singular.sum() + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def spread(features: torch.Tensor) -> float:
    """Standard deviation of L2-normalised features, times sqrt(D): 0 collapsed, 1 isotropic.

    Args:
        features: One row per image, `[n, D]`.
    """
    unit = torch.nn.functional.normalize(_checked(features), dim=1)
    return float(unit.std(dim=0).mean() * features.shape[1] ** 0.5)


def _checked(features: torch.Tensor) -> torch.Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"features have shape {tuple(features.shape)}; they must be [n, D] with n >= 2"
        )
    return features.detach().double()
