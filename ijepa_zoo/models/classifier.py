"""Provisional heads."""

from torch import Tensor, nn


class LinearHead(nn.Module):
    """Linear."""

    def __init__(self, in_features: int, num_classes: int, batch_norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(in_features, affine=False) if batch_norm else nn.Identity()
        self.linear = nn.Linear(in_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.linear(self.norm(features))
        return logits
