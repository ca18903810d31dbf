"""Linear depth heads on patch features, all heads of a grid at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..seeds import Stream, torch_generator
from .depth_metrics import MIN_DEPTH, Total

_STD = 0.01  # of the weights at the start, as mmsegmentation's and VISSL's linear heads
_FLOOR = 0.1  # added to every bin before the normalisation, as in AdaBins and DINOv2
_BN_EPS, _BN_MOMENTUM = 1e-5, 0.1
_WARM_UP = 1 / 3  # of the steps, in DINOv2's configuration: 12,800 of 38,400


@dataclass(frozen=True)
class DepthHeadSpec:
    """One head: what it sees, whether BatchNorm comes first, and its learning rate."""

    representation: str
    batch_norm: bool
    lr: float

    @property
    def name(self) -> str:
        """In words, for tables."""
        return f"{self.representation}{' bn' if self.batch_norm else ''} lr={self.lr:g}"


class DepthHeads(nn.Module):
    """DINOv2's linear depth head (its `lin. 1` and `lin. 4`), for a grid of settings.

    Bins of uniform depth are scored at every patch, the scores are upsampled bilinearly, and the
    depth is their mean weighted by `relu(score) + 0.1` (arXiv 2304.07193, section 7.4, after
    AdaBins; facebookresearch/dinov2 `BNHead`). A linear layer and bilinear upsampling can be
    exchanged, so the scores are upsampled instead of the features. Without DINOv2's class token,
    which I-JEPA's encoders lack.

    All heads of a representation are one matrix product: BatchNorm is folded into the weights.

    Args:
        specs: The heads.
        widths: Channels of each representation.
        max_depth: Depth of the last bin.
        bins: Number of bins.
        upsample: Factor of the bilinear upsampling.
        seed: Decides the weights at the start.
        total: Sum of a tensor over the processes: BatchNorm then uses the whole batch. None for
            one process.
    """

    bins: Tensor

    def __init__(
        self,
        specs: Sequence[DepthHeadSpec],
        widths: dict[str, int],
        *,
        max_depth: float,
        bins: int = 256,
        upsample: int = 4,
        seed: int = 0,
        total: Total | None = None,
    ) -> None:
        super().__init__()
        self.total = total
        self.specs, self.upsample = tuple(specs), upsample
        self.register_buffer("bins", torch.linspace(MIN_DEPTH, max_depth, bins))
        self.heads = nn.ModuleList()
        for spec in self.specs:
            width, head = widths[spec.representation], nn.Module()
            # the same start for every learning rate: a head does not depend on its neighbours
            generator = torch_generator(seed, Stream.EVAL_INIT, width, int(spec.batch_norm))
            head.weight = nn.Parameter(torch.randn(bins, width, generator=generator) * _STD)
            head.bias = nn.Parameter(torch.zeros(bins))
            if spec.batch_norm:
                head.gain = nn.Parameter(torch.ones(width))
                head.shift = nn.Parameter(torch.zeros(width))
                head.register_buffer("mean", torch.zeros(width))
                head.register_buffer("var", torch.ones(width))
            self.heads.append(head)

    def optimizer(self, weight_decay: float) -> torch.optim.AdamW:
        """AdamW with the learning rate of each head, in the order of the heads."""
        groups = [
            {"params": list(head.parameters()), "lr": spec.lr, "name": spec.name}
            for spec, head in zip(self.specs, self.heads)
        ]
        return torch.optim.AdamW(groups, weight_decay=weight_decay)

    def forward(self, features: dict[str, Tensor], only: int | None = None) -> Tensor:
        """Predict depth.

        Args:
            features: Maps `[B, D, h, w]` of each representation.
            only: Place of the one head to ask; None for all.

        Returns:
            `[H, B, upsample * h, upsample * w]`, above 0; H is 1 with `only`.
        """
        wanted = range(len(self.specs)) if only is None else [only]
        depths: dict[int, Tensor] = {}
        for representation, maps in features.items():
            places = [i for i in wanted if self.specs[i].representation == representation]
            if places:
                depths |= zip(places, self._depths(places, maps))
        return torch.stack([depths[place] for place in wanted])

    def _depths(self, places: list[int], maps: Tensor) -> Tensor:
        tokens = maps.float().permute(0, 2, 3, 1)
        statistics = self._statistics(places, tokens)
        folded = [self._fold(self.heads[place], *statistics) for place in places]
        weight, bias = (torch.cat(parts) for parts in zip(*folded))
        scores = F.linear(tokens, weight, bias).permute(0, 3, 1, 2)
        scores = F.interpolate(scores, scale_factor=self.upsample, mode="bilinear")
        # normalising and averaging: two sums over the bins, to which the floor adds constants
        sums = torch.stack([self.bins, torch.ones_like(self.bins)], dim=1)
        shares = scores.permute(0, 2, 3, 1)
        shares = shares.reshape(*shares.shape[:3], len(places), -1).relu()
        weighted, total = (shares @ sums + _FLOOR * sums.sum(0)).permute(4, 3, 0, 1, 2)
        return weighted / total

    def _statistics(self, places: list[int], tokens: Tensor) -> tuple[Tensor, Tensor] | tuple[()]:
        """Mean and variance of the batch in training; updates the running ones."""
        normed: list[Any] = [self.heads[place] for place in places if self.specs[place].batch_norm]
        if not self.training or not normed:
            return ()
        rows = tokens.flatten(0, 2).double()
        count = rows.new_full((rows.shape[1],), len(rows))
        sums = torch.stack([count, rows.sum(0), rows.square().sum(0)])
        count, first, second = sums if self.total is None else self.total(sums)
        mean64 = first / count
        var64 = second / count - mean64.square()
        mean, var = mean64.float(), var64.clamp(min=0).float()
        for head in normed:
            head.mean.lerp_(mean, _BN_MOMENTUM)
            head.var.lerp_(var * (count / (count - 1)).float(), _BN_MOMENTUM)
        return mean, var

    def _fold(self, head: Any, *statistics: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and bias that act on features before BatchNorm."""
        if not hasattr(head, "gain"):
            return head.weight, head.bias
        mean, var = statistics or (head.mean, head.var)
        scale = head.gain / (var + _BN_EPS).sqrt()
        return head.weight * scale, head.bias + head.weight @ (head.shift - mean * scale)


def lr_scale(step: int, steps: int) -> float:
    """Share of the learning rate: linear over the first third of the steps, then a cosine to 0.

    Args:
        step: Updates done.
        steps: Updates of the whole training.
    """
    warm_up = max(1, round(steps * _WARM_UP))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
