"""A training step by the published code, on our weights, images and masks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..train.batches import Batch, normalise
from ..train.parallel import autocast
from ..train.trainer import Trainer
from .published import PublishedCode
from .steps import BATCHES, STEPS, WARMUP, OurStep


class PublishedStep:
    """Updates in the order of the published loop, by the modules of the published code.

    Args:
        code: Its modules.
        ours: Whose weights, images and masks it takes over; not changed.
        precision: `bf16` switches its autocast on; it was released with fp32.
    """

    def __init__(
        self, code: PublishedCode, ours: OurStep, precision: Literal["fp32", "bf16"]
    ) -> None:
        self.code, self.device, trainer = code, ours.device, ours.trainer
        self.optim, self.precision = trainer.config.optim, precision
        self._build(trainer)
        self._init_optimizer()
        data = trainer.config.data
        self.batches = [
            (normalise(batch.images, data.mean, data.std), [batch.context], _blocks(batch))
            for batch in ours.batches
        ]
        if self.device.type == "cuda":
            self.batches = [_pinned(*batch) for batch in self.batches]
        self.step = 0

    def update(self) -> float:
        """Do the next update; returns its loss."""
        for _ in self.phases():
            pass
        return self.loss

    def phases(self) -> Iterator[str]:
        """The published step, divided where its comments divide it."""
        mask, precision = (
            self.code.masks.apply_masks,
            partial(autocast, self.device, self.precision),
        )
        images, context, targets = self.batches[self.step % BATCHES]
        images = images.to(self.device, non_blocking=True)
        context, targets = (
            [m.to(self.device, non_blocking=True) for m in masks] for masks in (context, targets)
        )
        self.lr_schedule.step()
        self.decay_schedule.step()
        yield "input"
        with precision(), torch.no_grad():
            truth = self.target_encoder(images)
            truth = mask(F.layer_norm(truth, (truth.size(-1),)), targets)
        yield "target forward"
        with precision():
            tokens = self.encoder(images, context)
        yield "context forward"
        with precision():
            loss = F.smooth_l1_loss(self.predictor(tokens, context, targets), truth)
        yield "predictor forward"
        torch.autograd.backward(self.scaler.scale(loss))
        yield "backward"
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.code.logs.grad_logger(self.encoder.named_parameters())
        self.optimizer.zero_grad()
        yield "optimizer"
        self._move_target()
        self.loss = float(loss.detach())
        self.step += 1
        yield "moving average"

    def _build(self, trainer: Trainer) -> None:
        model, networks = trainer.model, self.code.networks
        encoder, predictor = model.encoder, model.predictor
        sizes: dict[str, Any] = {
            "num_heads": encoder.blocks[0].attn.num_heads,
            "qkv_bias": True,
            "norm_layer": lambda width: torch.nn.LayerNorm(width, eps=1e-6),
        }
        self.encoder = networks.VisionTransformer(
            img_size=list(encoder.patch_embed.img_size),
            patch_size=encoder.patch_embed.patch_size[0],
            embed_dim=encoder.embed_dim,
            depth=len(encoder.blocks),
            mlp_ratio=encoder.blocks[0].mlp.fc1.out_features / encoder.embed_dim,
            **sizes,
        )
        self.predictor = networks.VisionTransformerPredictor(
            num_patches=math.prod(encoder.patch_embed.grid_size),
            embed_dim=encoder.embed_dim,
            predictor_embed_dim=predictor.predictor_embed.out_features,
            depth=len(predictor.predictor_blocks),
            mlp_ratio=4.0,
            **sizes,
        )
        self.encoder.load_state_dict(encoder.state_dict())
        self.predictor.load_state_dict(predictor.state_dict())
        self.encoder.to(self.device)
        self.predictor.to(self.device)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def _init_optimizer(self) -> None:
        optim = self.optim
        made = self.code.helper.init_opt(
            encoder=self.encoder,
            predictor=self.predictor,
            iterations_per_epoch=1,
            start_lr=optim.start_lr,
            ref_lr=optim.lr,
            warmup=WARMUP,
            num_epochs=STEPS,
            wd=optim.weight_decay,
            final_wd=optim.final_weight_decay,
            final_lr=optim.final_lr,
            ipe_scale=optim.schedule_scale,
        )
        self.optimizer, _, self.lr_schedule, self.decay_schedule = made
        scaled = self.precision == "bf16" and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)

    @torch.no_grad()
    def _move_target(self) -> None:
        optim = self.optim
        rise = optim.final_momentum - optim.momentum
        momentum = optim.momentum + self.step * rise / STEPS
        for own, moving in zip(self.encoder.parameters(), self.target_encoder.parameters()):
            moving.data.mul_(momentum).add_((1.0 - momentum) * own.detach().data)


def _blocks(batch: Batch) -> list[torch.Tensor]:
    """Target blocks as the published code has them: a list of `[B, L]`."""
    return [block.contiguous() for block in batch.targets.unbind(1)]


def _pinned(images: torch.Tensor, *masks: list[torch.Tensor]) -> Any:
    return images.pin_memory(), *([mask.pin_memory() for mask in part] for part in masks)
