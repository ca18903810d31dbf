"""Train the same small model with this package and with the published code, and compare.

Same images, recipe, number of steps and seeds; each code draws its own random numbers. Prints loss
curves, accuracy of frozen features and time, and writes them as JSON.

    git clone https://github.com/facebookresearch/ijepa
    python examples/benchmarks/pretrain_vs_published.py --published-path ijepa --data cifar10/train

`--data` is a folder of class folders. Runs that are finished are not repeated. The published code
is CC-BY-NC; nothing of it is in this package.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib
import json
import platform
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import ijepa_zoo
from ijepa_zoo.data.image_sets import open_images
from ijepa_zoo.data.items import Item
from ijepa_zoo.data.sources import find_items
from ijepa_zoo.processes import Processes
from ijepa_zoo.train import PretrainConfig, load_config, pretrain
from ijepa_zoo.train.batches import evaluation_images
from ijepa_zoo.train.monitor import Monitor

PROBED = 4000  # images of the probes, never trained on


def settings(steps: int, seed: int) -> PretrainConfig:
    """The published recipe for a small model of 32 x 32 images."""
    return load_config(
        "vith14_in1k",
        [
            f"seed={seed}", "model.name=vit_nano8_64_ijepa", "model.img_size=32",
            "model.patch_size=4", "data.held_out=0", "mask.cut=64", "mask.min_keep=4",
            "optim.batch_size=64", f"optim.duration={steps} steps",
            f"optim.warmup={steps // 8} steps", "optim.precision=fp32",
            f"log.save_every={steps} steps", f"log.monitor_every={steps}", "log.log_every=1",
            "machine.device=cpu", "machine.workers=0",
        ],
    )  # fmt: skip


def train_ours(config: PretrainConfig, files: list[Item], out: Path) -> list[dict[str, float]]:
    """Train with this package; returns loss and seconds of every step."""
    pretrain(config, files, out, progress=False)
    with (out / "log.csv").open(newline="") as file:
        return [
            {"loss": float(row["loss"]), "seconds": float(row["time (ms)"]) / 1000}
            for row in csv.DictReader(file)
        ]


class _Files(torch.utils.data.Dataset[tuple[Any, int]]):
    """What the published loop gets from ImageFolder: transformed image and label."""

    def __init__(self, files: list[Item], transform: Any) -> None:
        from torchvision.datasets.folder import default_loader

        self.files, self.transform, self.load = files, transform, default_loader

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.load(self.files[index].path)), 0


def train_published(
    config: PretrainConfig, files: list[Item], out: Path, steps: int
) -> list[dict[str, float]]:
    """Train with the published modules, in the order of the published loop, on the CPU."""
    published = importlib.import_module
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)
    encoder, predictor = _published_networks()
    target = copy.deepcopy(encoder).requires_grad_(False)
    mask, optim, data = config.mask, config.optim, config.data
    collator = published("src.masks.multiblock").MaskCollator(
        input_size=32, patch_size=4, pred_mask_scale=mask.target_scale,
        enc_mask_scale=mask.context_scale, aspect_ratio=mask.target_aspect, nenc=1,
        npred=mask.num_targets, allow_overlap=False, min_keep=mask.min_keep,
    )  # fmt: skip
    transform = published("src.transforms").make_transforms(
        crop_size=32, crop_scale=data.crop_scale, color_jitter=0.0
    )
    loader = torch.utils.data.DataLoader(
        _Files(files, transform),
        optim.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collator,
    )
    optimizer, _, lr_schedule, decay_schedule = published("src.helper").init_opt(
        encoder=encoder, predictor=predictor, iterations_per_epoch=len(loader),
        start_lr=optim.start_lr, ref_lr=optim.lr, warmup=(steps // 8) / len(loader),
        num_epochs=steps / len(loader), wd=optim.weight_decay, final_wd=optim.final_weight_decay,
        final_lr=optim.final_lr, use_bfloat16=False, ipe_scale=1.0,
    )  # fmt: skip
    apply_masks = published("src.masks.utils").apply_masks
    rows: list[dict[str, float]] = []
    started = time.perf_counter()
    while len(rows) < steps:
        for (images, _), context, targets in loader:
            lr_schedule.step()
            decay_schedule.step()
            with torch.no_grad():
                truth = target(images)
                truth = apply_masks(nn.functional.layer_norm(truth, truth.shape[-1:]), targets)
            predicted = predictor(encoder(images, context), context, targets)
            loss = nn.functional.smooth_l1_loss(predicted, truth)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            momentum = optim.momentum + len(rows) / steps * (1.0 - optim.momentum)
            with torch.no_grad():
                for own, moving in zip(encoder.parameters(), target.parameters()):
                    moving.mul_(momentum).add_((1.0 - momentum) * own)
            now = time.perf_counter()
            rows.append({"loss": loss.item(), "seconds": now - started})
            started = now
            if len(rows) == steps:
                break
    out.mkdir(parents=True, exist_ok=True)
    networks = {"encoder": encoder, "predictor": predictor, "target_encoder": target}
    state = {
        name: {f"module.{key}": value for key, value in network.state_dict().items()}
        for name, network in networks.items()
    }
    torch.save({**state, "opt": optimizer.state_dict(), "epoch": 1}, out / "jepa-latest.pth.tar")
    return rows


def _published_networks() -> tuple[nn.Module, nn.Module]:
    """Encoder and predictor of the sizes of vit_nano8_64_ijepa, initialised as published."""
    vit = importlib.import_module("src.models.vision_transformer")
    trunc_normal_ = importlib.import_module("src.utils.tensors").trunc_normal_
    common = {"num_heads": 4, "mlp_ratio": 4, "qkv_bias": True}
    common["norm_layer"] = partial(nn.LayerNorm, eps=1e-6)
    encoder = vit.VisionTransformer(img_size=[32], patch_size=4, embed_dim=128, depth=6, **common)
    predictor = vit.VisionTransformerPredictor(
        num_patches=64, embed_dim=128, predictor_embed_dim=64, depth=3, **common
    )
    for module in (*encoder.modules(), *predictor.modules()):
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return encoder, predictor


def probe(model: Any, files: list[Item]) -> dict[str, float]:
    """Accuracy of kNN and of a linear probe on frozen target features, RankMe and spread."""
    images = open_images(files)
    pixels, labels, _ = evaluation_images(images, np.arange(len(images)), (32, 32))
    cfg = model.target_encoder.pretrained_cfg
    monitor = Monitor(pixels, labels, tuple(cfg["mean"]), tuple(cfg["std"]))
    return monitor.measure(model, Processes.alone("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--published-path", type=Path, required=True, help="clone of the code")
    parser.add_argument("--data", required=True, help="folder of class folders, e.g. CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("runs/vs_published"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    sys.path.insert(0, str(args.published_path))
    files = [item for item in find_items(args.data) if item.skipped is None]
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    probed, trained = files[:PROBED], files[PROBED:]
    results = []
    for seed in range(args.seeds):
        config = settings(args.steps, seed)
        for code in ("ijepa_zoo", "published"):
            out = args.out / f"{code}-{seed}"
            done = out / "result.json"
            if not done.exists():
                if code == "ijepa_zoo":
                    rows = train_ours(config, trained, out)
                    model = ijepa_zoo.create_ijepa(f"local-dir:{out}")
                else:
                    rows = train_published(config, trained, out, args.steps)
                    size = {"img_size": 32, "patch_size": 4}
                    file = out / "jepa-latest.pth.tar"
                    model = ijepa_zoo.create_ijepa(config.model.name, checkpoint=file, **size)
                figures = probe(model, probed)
                done.write_text(json.dumps({"code": code, "seed": seed, "steps": rows, **figures}))
            results.append(json.loads(done.read_text()))
    base = ijepa_zoo.create_ijepa("vit_nano8_64_ijepa", pretrained=False, img_size=32, patch_size=4)
    report(results, probe(base, probed), args)


def report(results: list[dict[str, Any]], random: dict[str, float], args: Any) -> None:
    """Print means and ranges over seeds, and write the JSON."""
    table: dict[str, dict[str, Any]] = {"random initialisation": random}
    for code in ("ijepa_zoo", "published"):
        own = [result for result in results if result["code"] == code]
        tail = [np.mean([s["loss"] for s in r["steps"][-args.steps // 10 :]]) for r in own]
        seconds = [float(np.median([s["seconds"] for s in r["steps"]])) for r in own]
        table[code] = {
            **{name: [r[name] for r in own] for name in ("knn", "linear", "rankme", "spread")},
            "loss of the last tenth": tail,
            "median seconds per step": seconds,
            "curve": np.mean([[s["loss"] for s in r["steps"]] for r in own], axis=0).tolist(),
        }
    for code, row in table.items():
        print(code)
        for name, value in row.items():
            if name != "curve":
                values = np.atleast_1d(value)
                spread = f"  ({values.min():.4g} to {values.max():.4g})" if len(values) > 1 else ""
                print(f"  {name:24} {values.mean():.4g}{spread}")
    if args.json:
        about = {
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "hardware": f"{platform.processor() or platform.machine()}, "
            f"{torch.get_num_threads()} threads",
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
            "images": args.steps * 64,
        }
        args.json.write_text(json.dumps({**about, "results": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
