"""The official repository's training step, imported from a clone (facebookresearch/ijepa).

It is licensed CC-BY-NC: none of it is part of this project.
"""

from __future__ import annotations

import copy
import importlib
import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ijepa_zoo

MODULES = {
    "helper": "src.helper",
    "vit": "src.models.vision_transformer",
    "masks": "src.masks.utils",
    "multiblock": "src.masks.multiblock",
    "transforms": "src.transforms",
    "logs": "src.utils.logging",
}


def load_official(path: Path) -> dict[str, Any]:
    """Import the modules of a clone, and restore the log settings that they change."""
    if not (path / "src" / "helper.py").is_file():
        raise SystemExit(
            f"{path} is not a clone of the official repository: "
            "git clone https://github.com/facebookresearch/ijepa"
        )
    handlers, level = logging.root.handlers[:], logging.root.level
    sys.path.insert(0, str(path))
    modules = {name: importlib.import_module(module) for name, module in MODULES.items()}
    sys.path.remove(str(path))
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    return modules


class OfficialStep:
    """The step of the official `train.py`, on the weights of one of our models.

    Without its wrapper for several GPUs, which needs a process group; with the GradScaler and the
    gradient statistics that its loop computes in every step.

    Args:
        official: From `load_official`.
        ours: Networks whose sizes and weights are taken over.
        optim: Our optimizer settings, with steps as the unit of time.
        steps: Steps of the schedules.
        warmup: Steps of the warm-up.
        device: `cpu` or `cuda`.
        bf16: Use its bfloat16 autocast.
    """

    def __init__(
        self,
        official: dict[str, Any],
        ours: ijepa_zoo.IJepa,
        optim: Any,
        steps: int,
        warmup: int,
        device: str,
        bf16: bool,
    ) -> None:
        self.official, self.device, self.bf16, self.steps = official, device, bf16, steps
        self.momentum = (optim.momentum, optim.final_momentum)
        self.encoder, self.predictor = self._networks(ours)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        made = official["helper"].init_opt(
            encoder=self.encoder, predictor=self.predictor, iterations_per_epoch=1,
            start_lr=optim.start_lr, ref_lr=optim.lr, warmup=warmup, num_epochs=steps,
            wd=optim.weight_decay, final_wd=optim.final_weight_decay, final_lr=optim.final_lr,
            ipe_scale=optim.schedule_scale,
        )  # fmt: skip
        self.optimizer, _, self.lr_schedule, self.decay_schedule = made
        self.scaler = torch.amp.GradScaler(device, enabled=bf16 and device == "cuda")
        self.step = 0

    def update(self, images: Tensor, masks: tuple[Tensor, Tensor]) -> float:
        """One step.

        Args:
            images: Normalized `[B, 3, H, W]`, on the CPU, as its loader delivers them.
            masks: Patch indices of the context `[B, K]` and of the targets `[B, M, L]`.

        Returns:
            The loss.
        """
        images = images.to(self.device, non_blocking=True)
        context = [masks[0].to(self.device, non_blocking=True)]
        targets = masks[1].to(self.device, non_blocking=True)
        blocks = [block.contiguous() for block in targets.unbind(1)]
        self.lr_schedule.step()
        self.decay_schedule.step()
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                truth = self.target_encoder(images)
                truth = F.layer_norm(truth, (truth.size(-1),))
                truth = self.official["masks"].apply_masks(truth, blocks)
            tokens = self.encoder(images, context)
            loss = F.smooth_l1_loss(self.predictor(tokens, context, blocks), truth)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.official["logs"].grad_logger(self.encoder.named_parameters())
        self.optimizer.zero_grad()
        start, end = self.momentum
        momentum = start + self.step * (end - start) / self.steps
        with torch.no_grad():
            for own, moving in zip(self.encoder.parameters(), self.target_encoder.parameters()):
                moving.data.mul_(momentum).add_((1.0 - momentum) * own.detach().data)
        self.step += 1
        return loss.item()

    def _networks(self, ours: ijepa_zoo.IJepa) -> tuple[nn.Module, nn.Module]:
        encoder, predictor = ours.encoder, ours.predictor
        sizes: dict[str, Any] = {
            "num_heads": encoder.blocks[0].attn.num_heads,
            "qkv_bias": True,
            "norm_layer": lambda width: nn.LayerNorm(width, eps=1e-6),
        }
        with torch.device(self.device):  # its initialization takes long on a CPU
            theirs = self.official["vit"].VisionTransformer(
                img_size=list(encoder.patch_embed.img_size),
                patch_size=encoder.patch_embed.patch_size[0],
                embed_dim=encoder.embed_dim,
                depth=len(encoder.blocks),
                mlp_ratio=encoder.blocks[0].mlp.fc1.out_features / encoder.embed_dim,
                **sizes,
            )
            their_predictor = self.official["vit"].VisionTransformerPredictor(
                num_patches=math.prod(encoder.patch_embed.grid_size),
                embed_dim=encoder.embed_dim,
                predictor_embed_dim=predictor.predictor_embed.out_features,
                depth=len(predictor.predictor_blocks),
                mlp_ratio=4.0,
                **sizes,
            )
        theirs.load_state_dict(encoder.state_dict())
        their_predictor.load_state_dict(predictor.state_dict())
        return theirs.to(self.device), their_predictor.to(self.device)
