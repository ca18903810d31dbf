"""The I-JEPA objective: context encoder, predictor and target encoder as one module."""

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import SettingsError
from ..seeds import standard_normal
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
        target_layers: Number of last blocks of the target encoder whose outputs are averaged into
            the targets (data2vec, arXiv 2202.03555); 1 in the official repository.
        position_noise: Standard deviation of the noise in the positions of the mask tokens (StoP,
            arXiv 2308.00566, whose code has 0.25); the official repository has none. See `forward`.

    Attributes:
        noise_seed: Seed of the noise; the trainer changes it with every update.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: Predictor,
        target_encoder: VisionTransformer | None = None,
        regularizer: nn.Module | None = None,
        loss: Literal["smooth_l1", "l2"] = "smooth_l1",
        target_layers: int = 1,
        position_noise: float = 0.0,
    ) -> None:
        super().__init__()
        if position_noise < 0:
            raise SettingsError(f"position_noise must be 0 or more, got {position_noise}")
        if loss not in ("smooth_l1", "l2"):
            raise SettingsError(f"loss must be 'smooth_l1' or 'l2', got {loss!r}")
        if not 1 <= target_layers <= len(encoder.blocks):
            raise SettingsError(
                f"target_layers must be between 1 and {len(encoder.blocks)}, the encoder's blocks, "
                f"got {target_layers}"
            )
        self.loss = loss
        self.target_layers = target_layers
        self.position_noise = position_noise
        self.noise_seed = 0
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
        layers = self.target_encoder.encode_layers(images, self.target_layers)
        normed = [F.layer_norm(tokens, tokens.shape[-1:]) for tokens in layers]
        tokens = normed[0] if len(normed) == 1 else torch.stack(normed).mean(dim=0)
        index = targets.view(len(images), -1, 1).expand(-1, -1, tokens.shape[-1])
        return tokens.gather(1, index).view(*targets.shape, -1)

    def predict(self, images: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Predictions of :meth:`target_tokens`, ``[B * R, M, L, D]``; arguments as `forward`."""
        prediction: Tensor = self.predictor(self.encoder.encode(images, context), context, targets)
        return prediction

    def forward(self, images: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Loss between predictions and target tokens, and the regularizer's term.

        With ``position_noise`` the mask token at position j is ``m + p_j + W n_j + b``, where W and
        b are the predictor's embedding of context tokens and ``n_j`` is drawn from
        ``N(0, position_noise^2 I)``. The paper draws for every mask token; here all images of an
        update share one draw per position, which does not depend on the number of processes.

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
        loss = distance(self.predictor(tokens, context, targets, self._noise(tokens)), truth)
        if self.regularizer is not None:
            loss = loss + self.regularizer(tokens)
        return loss

    def _noise(self, tokens: Tensor) -> Tensor | None:
        """Noise for each position of the grid, ``[N, D]``."""
        if not self.position_noise:
            return None
        shape = self.encoder.patch_embed.num_patches, tokens.shape[-1]
        noise = standard_normal(shape, self.noise_seed, tokens.device)
        return (self.position_noise * noise).to(tokens.dtype)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Move the target encoder: ``momentum * target + (1 - momentum) * encoder``."""
        if not 0 <= momentum <= 1:
            raise SettingsError(f"momentum must be between 0 and 1, got {momentum}")
        targets: Any = list(self.target_encoder.parameters())
        sources: Any = [p.detach() for p in self.encoder.parameters()]
        torch._foreach_lerp_(targets, sources, 1.0 - momentum)
