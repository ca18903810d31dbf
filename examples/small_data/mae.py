"""MAE as the yardstick of study.py: the same encoder, images, order, crops, batch and steps.

    python examples/small_data/mae.py --data cifar10/train --out runs/small_data --seed 0

trains transformers' ViTMAEForPreTraining (`pip install transformers`) on the batches that a run of
study.py with this seed has, and writes the figures that study.py's table has, of the same held-out
images, to `mae-0/figures.json`. The encoder becomes a timm model in `mae-0/encoder`:

    ijepa-zoo eval linear --model timm:local-dir:runs/small_data/mae-0/encoder --data cifar10

MAE's own (arXiv 2111.06377, appendix A.1) are the class token, the share of hidden patches (75 %),
normalised pixels as targets, Xavier initialisation, AdamW with betas 0.9 and 0.95, weight decay
0.05, warm-up (1/20 of the steps) and cosine to 0. Ours are the crops (`--mae-crops` for scales 0.2
to 1 and flips) and the decoder, which is as wide and deep as the predictor. The paper's learning
rate, 1.5e-4 for each 256 images, is for 800 epochs. Here 250 steps on a CPU had a linear accuracy
of 38.7, 38.9 and 37.3 % with 5e-4, 1e-3 and 2e-3 (35.7 without training): for real length, search.

A step of MAE costs less than one of I-JEPA. `--equal-compute` gives it as many steps more, thus
more images than I-JEPA has, into `mae_compute-0`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from study import MAES_OWN, SIZES, overrides, refuse_settings
from timm.models import save_for_hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.utils.logging import disable_progress_bar

from ijepa_zoo.data import ImageDataset, open_images
from ijepa_zoo.data.transforms import transform_config
from ijepa_zoo.metrics import knn_accuracy, linear_accuracy, rankme, spread
from ijepa_zoo.models.encoder import sincos_positions
from ijepa_zoo.models.jepa import IJepa
from ijepa_zoo.progress import progress_bar
from ijepa_zoo.seeds import Stream, fold
from ijepa_zoo.train import PretrainConfig, Trainer, load_config
from ijepa_zoo.train.config import micro_batch_size, steps_of
from ijepa_zoo.train.data import mask_sampler, normalize
from ijepa_zoo.train.flops import flops_per_image
from ijepa_zoo.train.monitor import Monitor
from ijepa_zoo.train.networks import build_networks
from ijepa_zoo.train.optim import make_optimizer, set_rates
from ijepa_zoo.weights.formats import from_transformers

LR = 1e-3
CROPS = ["data.crop_scale=0.2,1.0", "data.horizontal_flip=true"]
DRAWS = 32  # steps whose masks are averaged to count I-JEPA's operations


def words_of(args: argparse.Namespace, steps: int | None) -> list[str]:
    """Settings of study.py's run, with MAE's rates instead of I-JEPA's."""
    words = overrides(args.size, "published", args.seed, steps, args.set)
    words += CROPS * args.mae_crops
    optim = load_config("vith14_in1k", words).optim
    total = steps_of(optim.duration, batch_size=optim.batch_size, images=0)
    return [
        *words, f"optim.warmup={total // 20} steps", f"optim.lr={args.lr:g}", "optim.start_lr=0",
        "optim.final_lr=0", "optim.weight_decay=0.05", "optim.final_weight_decay=0.05",
    ]  # fmt: skip


def make_mae(ours: IJepa) -> ViTMAEForPreTraining:
    """MAE with the encoder's sizes, and a decoder of the predictor's, initialised as in the paper.

    transformers (5.0 to 5.23) leaves the positions of a new model at zero, without which no patch
    could be told from another: they are set here.
    """
    embed, sizes = ours.encoder.patch_embed, {}
    wide, narrow = ours.encoder.blocks, ours.predictor.predictor_blocks
    for prefix, blocks in {"": wide, "decoder_": narrow}.items():
        sizes |= {
            f"{prefix}hidden_size": blocks[0].norm1.normalized_shape[0],
            f"{prefix}num_hidden_layers": len(blocks),
            f"{prefix}num_attention_heads": blocks[0].attn.num_heads,
            f"{prefix}intermediate_size": blocks[0].mlp.fc1.out_features,
        }
    sizes |= {"image_size": embed.img_size[0], "patch_size": embed.patch_size[0]}
    sizes |= {"mask_ratio": 0.75, "norm_pix_loss": True, "layer_norm_eps": ours.encoder.norm.eps}
    model = ViTMAEForPreTraining(ViTMAEConfig(**sizes))
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


def operations(config: PretrainConfig) -> tuple[float, float]:
    """GFLOP of a step for each image: MAE's, and I-JEPA's with the published recipe."""
    ours = build_networks(config)
    embed = ours.encoder.patch_embed
    masks, together = mask_sampler(config.mask, embed.grid_size), micro_batch_size(config, 1)
    drawn = [masks.sample(together, seed=config.seed, step=step) for step in range(DRAWS)]
    context = round(statistics.fmean(context.shape[1] for context, _ in drawn))
    block = round(statistics.fmean(targets.shape[2] for _, targets in drawn))
    model = make_mae(ours).to("meta")
    images = torch.zeros(1, 3, *embed.img_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(images).loss.backward()
    count = flops_per_image(ours.to("meta"), context, config.mask.num_targets, block)
    return counter.get_total_flops() / 1e9, count.total / 1e9


def train(model: ViTMAEForPreTraining, trainer: Trainer) -> dict[str, float]:
    """Train on the trainer's batches, by its schedule; returns the last loss and the time."""
    config, device = trainer.config, trainer.distributed.device
    bf16, times = config.optim.precision == "bf16", []
    optimizer = make_optimizer(model.vit, model.decoder)
    for group in optimizer.param_groups:
        group["betas"] = (0.9, 0.95)
    started = time.perf_counter()
    with progress_bar(True, trainer.schedule.steps, "mae", "step") as bar:
        for step, batches in enumerate(trainer.batches()):
            pixels = torch.cat([batch.images for batch in batches]).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                loss = model(normalize(pixels, config.data.mean, config.data.std)).loss
            rates = trainer.schedule.rates(step)
            set_rates(optimizer, lr=rates["lr"], weight_decay=rates["weight_decay"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not math.isfinite(value := loss.item()):
                raise ValueError(f"the loss of step {step} is {value}: use a lower --lr")
            times.append(time.perf_counter() - started)
            bar.set_postfix({"loss": f"{value:.3f}"}, refresh=False)
            bar.update()
            started = time.perf_counter()
    return {"loss": value, "step (ms)": 1000 * statistics.median(times)}


@torch.no_grad()
def to_timm(model: ViTMAEForPreTraining, preprocessing: dict[str, Any]) -> tuple[nn.Module, Any]:
    """The encoder as a timm model on the CPU that gives the same tokens, and its arguments.

    The features are the mean over patches after the last LayerNorm, as those of I-JEPA.
    """
    model, sizes = model.cpu(), model.config
    arguments = {
        "img_size": sizes.image_size, "patch_size": sizes.patch_size, "num_classes": 0,
        "embed_dim": sizes.hidden_size, "depth": sizes.num_hidden_layers,
        "num_heads": sizes.num_attention_heads, "global_pool": "avg", "fc_norm": False,
        "mlp_ratio": sizes.intermediate_size / sizes.hidden_size,
    }  # fmt: skip
    encoder = timm.create_model(
        "vit_base_patch16_224", pretrained_cfg_overlay=preprocessing, **arguments
    )
    with tempfile.TemporaryDirectory() as folder:  # names in files do not change with the version
        model.vit.save_pretrained(folder)
        state = load_file(Path(folder) / "model.safetensors")
    class_token = state.pop("embeddings.cls_token")
    encoder.load_state_dict({"cls_token": class_token, **from_transformers(state, "MAE's encoder")})
    images = torch.randn(4, *preprocessing["input_size"])
    in_order = torch.arange(encoder.patch_embed.num_patches).expand(4, -1).float()
    sizes.mask_ratio, hidden = 0.0, sizes.mask_ratio
    tokens = model.vit(images, noise=in_order).last_hidden_state
    sizes.mask_ratio = hidden
    torch.testing.assert_close(encoder.eval().forward_features(images), tokens, rtol=0, atol=1e-4)
    return encoder, arguments


@torch.no_grad()
def measure(encoder: nn.Module, monitor: Monitor, device: torch.device) -> dict[str, float]:
    """study.py's figures of the held-out images."""
    encoder.to(device)
    pooled = []
    for images in monitor.images.split(monitor.batch_size):
        with torch.autocast(device.type, torch.bfloat16, monitor.precision == "bf16"):
            pooled.append(encoder(normalize(images.to(device), monitor.mean, monitor.std)).float())
    features, labels = torch.cat(pooled), monitor.labels
    probes = {"linear": linear_accuracy(features, labels), "knn": knn_accuracy(features, labels)}
    return {**probes, "rankme": rankme(features), "spread": spread(features)}


def run(config: PretrainConfig, images: ImageDataset, folder: Path) -> dict[str, Any]:
    """Train, measure before and after, save the encoder in `folder`; returns the figures."""
    if images.targets is None or len(images.classes) < 2:
        raise ValueError("images without a class: --data must be a folder of class folders")
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    trainer = Trainer(config, images)
    monitor, _ = trainer.monitor()
    preprocessing, device = transform_config(trainer.model.encoder), trainer.distributed.device
    torch.manual_seed(fold(config.seed, Stream.INIT))  # initialisation, then what is hidden
    model = make_mae(trainer.model)
    before = measure(to_timm(model, preprocessing)[0], monitor, device)
    trained = train(model.to(device), trainer)
    encoder, arguments = to_timm(model, preprocessing)
    figures = measure(encoder, monitor, device)
    save_for_hf(encoder, str(folder / "encoder"), model_args=arguments, safe_serialization=True)
    seen = {"seed": config.seed, "images": trainer.schedule.steps * config.optim.batch_size}
    return {**figures, **trained, **seen, "before training": before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", nargs="+", required=True, help="folder of class folders")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: those of study.py")
    parser.add_argument("--set", nargs="+", default=[], metavar="SETTING", help="as in study.py")
    parser.add_argument("--lr", type=float, default=LR, help="at its peak (default: %(default)g)")
    parser.add_argument("--mae-crops", action="store_true", help="scales 0.2 to 1, and flips")
    parser.add_argument("--equal-compute", action="store_true", help="as many FLOP as I-JEPA")
    args = parser.parse_args()
    disable_progress_bar()
    own = {name: "MAE has its own" for name in MAES_OWN}
    refuse_settings(args.set, {**own, "seed": "use --seed", "optim.duration": "use --steps"})
    config = load_config("vith14_in1k", words := words_of(args, args.steps))
    gflop, ijepa = operations(config)
    print(f"GFLOP of a step for each image: MAE {gflop:.4f}, I-JEPA {ijepa:.4f}")
    if args.equal_compute:
        steps = steps_of(config.optim.duration, batch_size=config.optim.batch_size, images=0)
        config = load_config("vith14_in1k", words := words_of(args, round(steps * ijepa / gflop)))
    arm = "mae_compute" if args.equal_compute else "mae"
    folder = args.out / f"{arm}-{args.seed}"
    file = folder / "figures.json"
    images = open_images(args.data)
    given = {"settings": words, "data": images.fingerprint()}
    if file.exists():
        found = json.loads(file.read_text())
        if differing := [name for name, value in given.items() if found.get(name) != value]:
            raise ValueError(f"{file} is of other {' and '.join(differing)}: choose another --out")
    else:
        found = {"arm": arm, **run(config, images, folder)}
        found |= {"GFLOP": gflop, "GFLOP of I-JEPA": ijepa, **given}
        file.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key not in given}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"mae.py: {error}")
    except KeyboardInterrupt:
        print("\nstopped; nothing of this run is kept", file=sys.stderr)
        sys.exit(130)
