"""MAE of the same encoder, on the same batches as a run of study.py (arm `mae`).

transformers' ViTMAEForPreTraining with MAE's own (arXiv 2111.06377, appendix A.1): class token,
75 % of the patches hidden, normalized pixels as targets, Xavier initialization, AdamW with betas
0.9 and 0.95, weight decay 0.05, warm-up of 1/20 of the steps, cosine to 0. The decoder is as wide
and deep as I-JEPA's predictor. The learning rate is 1e-3: in 250 steps of 64 images of CIFAR-10
5e-4, 1e-3 and 2e-3 had 38.7, 38.9 and 37.3 % linear accuracy.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn

from ijepa_zoo.data import open_images
from ijepa_zoo.data.transforms import transform_config
from ijepa_zoo.models.encoder import sincos_positions
from ijepa_zoo.models.jepa import IJepa
from ijepa_zoo.progress import progress_bar
from ijepa_zoo.seeds import Stream, fold
from ijepa_zoo.train import PretrainConfig, Trainer
from ijepa_zoo.train.data import normalize
from ijepa_zoo.weights.formats import from_transformers

LR = 1e-3


def train_mae(config: PretrainConfig, data: Path, out: Path) -> Path:
    """Train MAE on the batches of a run with these settings; returns a timm folder.

    A finished run is not repeated; an interrupted one starts again.
    """
    folder = out / "encoder"
    if (folder / "config.json").exists():
        return folder
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    trainer = Trainer(config, open_images(data))
    device = trainer.distributed.device
    torch.manual_seed(fold(config.seed, Stream.INIT))  # initialization, then what is hidden
    mae = make_mae(trainer.model).to(device)
    steps = trainer.schedule.steps
    decayed = [p for p in mae.parameters() if p.requires_grad and p.ndim > 1]
    free = [p for p in mae.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    with progress_bar(True, steps, "mae", "step") as bar:
        for step, batches in enumerate(trainer.batches()):
            pixels = torch.cat([batch.images for batch in batches]).to(device)
            half = config.optim.precision == "bf16"
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                loss = mae(normalize(pixels, config.data.mean, config.data.std)).loss
            for group in optimizer.param_groups:
                group["lr"] = LR * lr_scale(step, steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix({"loss": f"{loss.item():.3f}"}, refresh=False)
            bar.update()
    encoder, arguments = to_timm(mae, transform_config(trainer.model.encoder))
    save_for_hf(encoder, str(folder), model_args=arguments, safe_serialization=True)
    return folder


def lr_scale(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up over 1/20 of the steps, then a cosine to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_mae(ours: IJepa) -> Any:
    """MAE with the encoder's sizes, and a decoder of the predictor's.

    transformers (5.0 to 5.23) leaves the positions of a new model at zero, without which no patch
    could be told from another: they are set here.
    """
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    embed = ours.encoder.patch_embed
    sizes: dict[str, Any] = {"image_size": embed.img_size[0], "patch_size": embed.patch_size[0]}
    blocks = {"": ours.encoder.blocks, "decoder_": ours.predictor.predictor_blocks}
    for prefix, own in blocks.items():
        sizes |= {
            f"{prefix}hidden_size": own[0].norm1.normalized_shape[0],
            f"{prefix}num_hidden_layers": len(own),
            f"{prefix}num_attention_heads": own[0].attn.num_heads,
            f"{prefix}intermediate_size": own[0].mlp.fc1.out_features,
        }
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            **sizes, mask_ratio=0.75, norm_pix_loss=True, layer_norm_eps=ours.encoder.norm.eps
        )
    )
    tokens = model.vit.embeddings
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    nn.init.xavier_uniform_(tokens.patch_embeddings.projection.weight.flatten(1))
    nn.init.normal_(tokens.cls_token, std=0.02)
    nn.init.normal_(model.decoder.mask_token, std=0.02)
    for positions in (tokens.position_embeddings, model.decoder.decoder_pos_embed):
        positions.data[:, 1:] = sincos_positions(positions.shape[-1], embed.grid_size)
    return model


@torch.no_grad()
def to_timm(mae: Any, preprocessing: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The encoder as a timm model on the CPU that gives the same tokens, and its arguments.

    The features are the mean over patches after the last LayerNorm, as those of I-JEPA.
    """
    mae, sizes = mae.cpu(), mae.config
    arguments = {
        "img_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "num_classes": 0,
        "embed_dim": sizes.hidden_size,
        "depth": sizes.num_hidden_layers,
        "num_heads": sizes.num_attention_heads,
        "mlp_ratio": sizes.intermediate_size / sizes.hidden_size,
        "global_pool": "avg",
        "fc_norm": False,
    }
    encoder = timm.create_model(
        "vit_base_patch16_224", pretrained_cfg_overlay=preprocessing, **arguments
    )
    with tempfile.TemporaryDirectory() as folder:  # names in files do not change with the version
        mae.vit.save_pretrained(folder)
        state = load_file(Path(folder) / "model.safetensors")
    class_token = state.pop("embeddings.cls_token")
    encoder.load_state_dict({"cls_token": class_token, **from_transformers(state, "MAE's encoder")})
    images = torch.randn(4, *preprocessing["input_size"])
    in_order = torch.arange(encoder.patch_embed.num_patches).expand(4, -1).float()
    sizes.mask_ratio, hidden = 0.0, sizes.mask_ratio
    tokens = mae.vit(images, noise=in_order).last_hidden_state
    sizes.mask_ratio = hidden
    torch.testing.assert_close(encoder.eval().forward_features(images), tokens, rtol=0, atol=1e-4)
    return encoder, arguments
