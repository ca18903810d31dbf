"""The attentive probe: a learned query pools the patch tokens of a frozen encoder.

From V-JEPA and V-JEPA 2 (`src/models/attentive_pooler.py`, `evals/image_classification_frozen`):
one query, one cross-attention block with its MLP, then a linear layer; AdamW; V-JEPA 2's grid of
20 heads (five learning rates, four weight decays) on one pass of the encoder, 20 epochs, a cosine
to 0 without warmup. From capi (`eval_classification.py`): random resized crops and flips instead
of AutoAugment and random erasing, no weight decay of biases, the head chosen on 10 % of the
training images. As in capi, rates are given per 256 images and grow with the batch.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.classifier import AttentiveHead
from ..seeds import Stream, fold
from .features import BlockFeatures, Source
from .heads import Grid, HeadSpec
from .linear import evaluate_heads
from .models import EvalModel
from .probe import HeadsConfig, Probe
from .results import Result
from .tasks import CROP, Protocol, Task

ATTENTIVE = Protocol(
    20,
    CROP,
    optimizer="adamw",
    lrs=(5e-3, 3e-3, 1e-3, 3e-4, 1e-4),
    weight_decays=(0.01, 0.1, 0.4, 0.8),
    schedule="cosine",
    floor=0.0,
    per_step=True,
)


def evaluate_attentive(
    task: str | Task,
    model: str | nn.Module | EvalModel,
    data: Any,
    out: str | Path = "results",
    **options: Any,
) -> Result:
    """Train attentive heads on the patch tokens of a frozen encoder, and test the best one.

    As :func:`evaluate_linear`, but processes average gradients instead of exchanging features.
    Files of cached tokens are large: 256 tokens of 1280 numbers are 655 kB per image in half
    precision, and as much for its mirror image.
    """
    config = HeadsConfig(task=task, model=model, data=data, out=out, **options)
    return evaluate_heads(config, "attentive", ATTENTIVE, attentive_grid, "tokens")


def attentive_grid(probe: Probe, source: Source) -> Grid:
    """Heads of equal initial weights for each rate and decay, with the encoder's num_heads."""
    assert isinstance(source, BlockFeatures)
    block: Any = source.model.model.blocks[-1]  # type: ignore[index]
    num_heads = getattr(block, "attn", block).num_heads  # timm's parallel blocks have it themselves
    heads: dict[HeadSpec, nn.Module] = {}
    groups = []
    for lr, wd in product(probe.protocol.lrs, probe.protocol.weight_decays):
        spec, width = HeadSpec("patches", "attentive", lr, wd), source.widths["patches"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold(probe.config.seed, Stream.EVAL_INIT))
            head = AttentiveHead(width, probe.num_classes, num_heads)
        heads[spec] = head.to(source.device)
        decayed = [p for p in head.parameters() if p.ndim > 1]
        groups += spec.groups(decayed, [p for p in head.parameters() if p.ndim == 1])
    half = source.settings["precision"] != "float32" and source.device.type == "cuda"
    return Grid(heads, torch.optim.AdamW(groups), torch.bfloat16 if half else None)
