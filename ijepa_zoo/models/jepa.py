"""The I-JEPA objective: context encoder, predictor and target encoder as one module."""

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import SettingsError
from .encoder import as_encoder
from .predictor import Predictor


class IJepa(nn.Module):
    """Image joint-embedding predictive architecture (Assran et al., CVPR 2023).

    Args:
        encoder: Context encoder: an I-JEPA encoder, or any timm ViT that
            :func:`~ijepa_zoo.models.encoder.encode_visible` supports.
        predictor: Predictor over its tokens.
        target_encoder: Its moving average; None for a copy of ``encoder``. Takes no gradient and
            stays in evaluation mode.
        regularizer: Called with the context tokens ``[B, K, D]``; its scalar is added to the loss.
            The official loss has none.
        loss: ``smooth_l1`` (beta 1, mean) is the official repository's; ``l2``, the squared
            distance averaged over features, is the paper's text.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: Predictor,
        target_encoder: VisionTransformer | None = None,
        regularizer: nn.Module | None = None,
        loss: Literal["smooth_l1", "l2"] = "smooth_l1",
    ) -> None:
        super().__init__()
        if loss not in ("smooth_l1", "l2"):
            raise SettingsError(f"loss must be 'smooth_l1' or 'l2', got {loss!r}")
        self.loss = loss
        self.encoder = as_encoder(encoder)
        self.predictor = predictor
        self.target_encoder = as_encoder(target_encoder or copy.deepcopy(encoder))
        self.target_encoder.requires_grad_(False).eval()
        self.regularizer = regularizer

    def train(self, mode: bool = True) -> "IJepa":
        """Set training mode for everything but the target encoder."""
        super().train(mode)
        self.target_encoder.eval()
        return self

    @torch.no_grad()
    def target_tokens(self, images: Tensor, targets: Tensor) -> Tensor:
        """Targets of the predictor, ``[B * R, M, L, D]``; arguments as `forward`.

        The target encoder sees the whole image; blocks are cut from its output after a LayerNorm
        without affine parameters over the features.
        """
        tokens = self.target_encoder.encode(images)
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        index = targets.view(len(images), -1, 1).expand(-1, -1, tokens.shape[-1])
        return tokens.gather(1, index).view(*targets.shape, -1)

    def predict(self, images: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Predictions of :meth:`target_tokens`, ``[B * R, M, L, D]``; arguments as `forward`."""
        return self.predictor(self.encoder.encode(images, context), context, targets)

    def forward(self, images: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Loss between predictions and target tokens, and the regularizer's term.

        Args:
            images: ``[B, C, H, W]``, normalized.
            context: Patch indices ``[B * R, K]``, int64, R rows for each image.
            targets: Patch indices ``[B * R, M, L]``, int64.

        Returns:
            Scalar.
        """
        truth = self.target_tokens(images, targets)
        tokens = self.encoder.encode(images, context)
        distance = F.smooth_l1_loss if self.loss == "smooth_l1" else F.mse_loss
        loss = distance(self.predictor(tokens, context, targets), truth)
        if self.regularizer is not None:
            loss = loss + self.regularizer(tokens)
        return loss

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Move the target encoder: ``momentum * target + (1 - momentum) * encoder``."""
        if not 0 <= momentum <= 1:
            raise SettingsError(f"momentum must be between 0 and 1, got {momentum}")
        targets: Any = list(self.target_encoder.parameters())
        sources: Any = [p.detach() for p in self.encoder.parameters()]
        torch._foreach_lerp_(targets, sources, 1.0 - momentum)
