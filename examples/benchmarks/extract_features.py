"""Time features of a folder of JPEG files, end to end and on the bare model, against others.

    python examples/benchmarks/extract_features.py --model vit_base16_ijepa --vs timm transformers
    python examples/benchmarks/extract_features.py --model vit_huge14_ijepa --images 2000 \
        --precision bfloat16 --vs-precision bfloat16 --compile --vs timm transformers

Weights are random. Ours is `extract_features`, file writing included; timm's is a loop over a
DataLoader with its transform; that of transformers is its image-feature-extraction pipeline. The
two read exports of our weights, and average over patches. `--vs-precision` is their autocast;
float32 is what their documentation shows.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from harness import (
    OURS,
    agree,
    image_files,
    interleave,
    parse,
    parser,
    random_jpegs,
    ratios,
    report,
    summary,
    write,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import ijepa_zoo

BARE = "bare model"


def autocast(args: Namespace, precision: str) -> AbstractContextManager[Any]:
    dtype = torch.float32 if precision == "float32" else getattr(torch, precision)
    return torch.autocast(args.device, dtype=dtype, enabled=precision != "float32")


class Ours:
    """`ijepa_zoo.extract_features`."""

    def __init__(self, args: Namespace, scratch: Path, paths: list[Path]) -> None:
        self.args, self.out, self.paths = args, scratch / "features.safetensors", paths
        self.model = ijepa_zoo.create_model(args.model, pretrained=False).eval().to(args.device)
        if args.compile:
            for block in self.model.blocks:
                block.compile()

    def files(self, number: int) -> None:
        """Features of all files, written to a file."""
        ijepa_zoo.extract_features(
            self.paths, self.model, self.out, batch_size=self.args.batch_size,
            device=self.args.device, workers=self.args.workers, threads=self.args.threads,
            precision=self.args.precision, overwrite=True,
        )  # fmt: skip
        self.out.with_suffix(".run.json").unlink()  # the next call starts anew

    def features(self) -> Tensor:
        """Features of all files."""
        self.files(0)
        return load_file(self.out)["features"].double()

    @torch.inference_mode()
    def bare(self, images: Tensor, number: int) -> None:
        """One batch in memory."""
        with autocast(self.args, self.args.precision):
            ijepa_zoo.FeatureExtractor(self.model)(images)


class Files(Dataset[Tensor]):
    """Transformed image files."""

    def __init__(self, paths: list[Path], transform: Any) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


class Timm:
    """timm's model and transform with a DataLoader."""

    def __init__(self, args: Namespace, exported: Path, paths: list[Path]) -> None:
        self.args = args
        self.model: Any = timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=0)
        self.model.eval().to(args.device)
        config = timm.data.resolve_model_data_config(self.model)
        transform = timm.data.create_transform(**config, is_training=False)
        pin = args.device == "cuda"
        self.loader = DataLoader(
            Files(paths, transform), args.batch_size, num_workers=args.workers, pin_memory=pin
        )
        if args.compile:
            for block in self.model.blocks:
                block.compile()

    @torch.inference_mode()
    def features(self) -> Tensor:
        """Features of all files."""
        with autocast(self.args, self.args.vs_precision):
            rows = [
                self.model(batch.to(self.args.device, non_blocking=True)) for batch in self.loader
            ]
        return torch.cat(rows).double().cpu()

    def files(self, number: int) -> None:
        """Features of all files."""
        self.features()

    @torch.inference_mode()
    def bare(self, images: Tensor, number: int) -> None:
        """One batch in memory."""
        with autocast(self.args, self.args.vs_precision):
            self.model(images)


class Transformers:
    """The image-feature-extraction pipeline, with the processor of the export."""

    def __init__(self, args: Namespace, exported: Path, paths: list[Path]) -> None:
        from transformers import logging, pipeline

        logging.disable_progress_bar()
        self.args, self.paths = args, [str(path) for path in paths]
        self.pipeline = pipeline(
            "image-feature-extraction", model=str(exported), device=args.device
        )
        if args.compile:
            model = self.pipeline.model
            for layer in model.layers if hasattr(model, "layers") else model.encoder.layer:
                layer.compile()

    def features(self) -> Tensor:
        """Features of all files."""
        with autocast(self.args, self.args.vs_precision):
            found = self.pipeline(
                self.paths, batch_size=self.args.batch_size, num_workers=self.args.workers,
                return_tensors=True,
            )  # fmt: skip
        return torch.stack([tokens[0].double().mean(0) for tokens in found]).cpu()

    def files(self, number: int) -> None:
        """Features of all files."""
        self.features()

    @torch.inference_mode()
    def bare(self, images: Tensor, number: int) -> None:
        """One batch in memory."""
        with autocast(self.args, self.args.vs_precision):
            self.pipeline.model(images).last_hidden_state.mean(1)


def compare(args: Namespace, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare features less their mean: random weights give nearly the same ones to all images."""
    features = {name: one.features() for name, one in found.items()}
    ours = features.pop(OURS)
    mean = ours.mean(0)
    agreement = {}
    for name, theirs in features.items():
        near = torch.cosine_similarity(theirs - mean, ours - mean, dim=1)
        exact = name == "timm" and args.precision == args.vs_precision == "float32"
        what = f"features of {len(ours)} images, as cosine distance about their mean,"
        agreement[name] = agree(what, float((1 - near).max()), 1e-5 if exact else 2e-2)
    return agreement


def arguments() -> Namespace:
    made = parser(__doc__)
    made.add_argument("--model", default="vit_base16_ijepa")
    made.add_argument("--data", type=Path, help="folder of JPEG files; default: random ones")
    made.add_argument("--images", type=int, default=100)
    made.add_argument("--batch-size", type=int, default=32)
    made.add_argument("--workers", type=int, default=min(16, torch.get_num_threads()))
    precisions = ["float32", "bfloat16", "float16"]
    made.add_argument("--precision", choices=precisions, default="float32")
    made.add_argument("--vs", nargs="*", choices=["timm", "transformers"], default=[])
    made.add_argument("--vs-precision", choices=precisions, default="float32")
    made.add_argument("--compile", action="store_true", help="all contenders")
    return parse(made)


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        source = args.data or random_jpegs(scratch / "jpegs", args.images)
        paths = image_files(source, args.images)
        ours = Ours(args, scratch, paths)
        found: dict[str, Any] = {OURS: ours}
        for name in args.vs:
            exported = ijepa_zoo.export(ours.model, scratch / name, name)
            kind = Timm if name == "timm" else Transformers
            found[name] = kind(args, exported, paths)
        agreement = compare(args, found)
        size = ours.model.patch_embed.img_size
        batch = torch.randn(args.batch_size, 3, *size, device=args.device)
        bare = {name: partial(one.bare, batch) for name, one in found.items()}
        for run in bare.values():
            run(0)
        whole = {name: one.files for name, one in found.items()}
        metrics: dict[str, Any] = {}
        pairs: dict[str, Any] = {}
        for turns, count, suffix in ((bare, args.batch_size, f", {BARE}"), (whole, len(paths), "")):
            for samples in interleave(turns, args.seconds, args.rounds):
                for name, seconds in samples.items():
                    rate = count / summary(seconds)["median"]
                    metrics[name + suffix] = {
                        "seconds": summary(seconds),
                        "images_per_second": rate,
                    }
                pairs |= {name + suffix: ratio for name, ratio in ratios(samples).items()}
                write(args, metrics, ratios=pairs, agreement=agreement)
    report(metrics, pairs)


if __name__ == "__main__":
    main()
