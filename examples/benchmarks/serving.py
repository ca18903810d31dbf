"""Files for servers compared with the model: speed, size, cosine to float32, kNN on photos.

    python examples/benchmarks/serving.py --speed-model vit_small16_ijepa --photos cifar10

`--photos` has train and test folders of one folder per class. Speed with random weights, which take
as long as trained ones; accuracy with the shipped model. Rounds take turns; ratios are by round.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

import onnxruntime
import torch
from harness import environment, interleave
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import ijepa_zoo
from ijepa_zoo.deploy import export_graph

Run = Callable[[Tensor], Tensor]
FILES = {
    "torch-export float32": {"to": "torch-export"},
    "torch-export bfloat16": {"to": "torch-export", "dtype": "bfloat16"},
    "onnx float32": {"to": "onnx"},
    "onnx int8": {"to": "onnx", "quantize": "int8"},
}


def opened(model: torch.nn.Module, folder: Path, threads: int) -> tuple[dict[str, Run], dict]:
    """Every file of `FILES`, opened, and its megabytes."""
    runs, sizes = {}, {}
    for name, options in FILES.items():
        made = export_graph(model, folder / name.replace(" ", "-"), **options)
        sizes[name] = round(sum(path.stat().st_size for path in made.glob("model.*")) / 1e6, 1)
        if options["to"] == "torch-export":
            runs[name] = torch.export.load(made / "model.pt2").module()
        else:
            runs[name] = partial(_onnx, _session(made / "model.onnx", threads))
    return runs, sizes


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def _onnx(session: onnxruntime.InferenceSession, images: Tensor) -> Tensor:
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.inference_mode()
def speed(name: str, batch: int, rounds: int, threads: int, folder: Path) -> dict:
    """Milliseconds of an image, and how many times as fast as the model in PyTorch."""
    model = ijepa_zoo.create_model(name, pretrained=False).eval()
    runs, sizes = opened(model, folder, threads)
    size = model.patch_embed.img_size
    images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
    extract = ijepa_zoo.FeatureExtractor(model)
    runs = {"model in PyTorch": lambda pixels: extract(pixels.float().div(255)), **runs}
    contenders = {key: partial(_call, run, images) for key, run in runs.items()}
    *_, seconds = interleave(contenders, seconds=600, rounds=rounds)
    return {
        key: {
            "ms_per_image": round(1000 * median(seconds[key]) / batch, 2),
            "times_as_fast": _ratios(seconds["model in PyTorch"], seconds[key]),
            "megabytes": sizes.get(key),
        }
        for key in runs
    }


def _call(run: Run, images: Tensor, number: int) -> None:
    run(images)


def _ratios(base: list[float], own: list[float]) -> dict:
    ratios = [one / other for one, other in zip(base, own)]
    return {
        "median": round(median(ratios), 2),
        "range": [round(min(ratios), 2), round(max(ratios), 2)],
    }


@torch.inference_mode()
def accuracy(photos: Path, train: int, test: int, folder: Path) -> dict:
    """Cosine to the float32 file on the test photos, and kNN (k 20, temperature 0.07)."""
    model = ijepa_zoo.create_model("vit_nano8_64_ijepa").eval()
    runs, _ = opened(model, folder, 1)
    bank, bank_labels = pixels(model, photos / "train", train)
    queries, labels = pixels(model, photos / "test", test)
    found, whole = {}, None
    for name, run in runs.items():
        known, asked = (
            torch.cat([run(part) for part in set_.split(100)]) for set_ in (bank, queries)
        )
        whole = asked if whole is None else whole
        cosine = F.cosine_similarity(asked, whole)
        found[name] = {
            "cosine_mean": cosine.mean().item(),
            "cosine_lowest": cosine.min().item(),
            "knn": knn_accuracy(known, bank_labels, asked, labels),
        }
    return found


def knn_accuracy(bank: Tensor, bank_labels: Tensor, asked: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent, weighted by the exponent of the cosine."""
    similar, index = (F.normalize(asked) @ F.normalize(bank).T).topk(20)
    votes = torch.zeros(len(asked), 10).scatter_add_(1, bank_labels[index], (similar / 0.07).exp())
    return 100 * (votes.argmax(1) == labels).float().mean().item()


def pixels(model: torch.nn.Module, folder: Path, count: int) -> tuple[Tensor, Tensor]:
    transform = ijepa_zoo.create_transform(model, normalize=False)
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    named = [
        (p, i) for i, c in enumerate(classes) for p in sorted(c.iterdir())[: count // len(classes)]
    ]
    images = torch.stack([torch.as_tensor(transform(Image.open(path))) for path, _ in named])
    return images, torch.tensor([label for _, label in named])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--speed-model", nargs="+", default=["vit_small16_ijepa"])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(f"serving-{date.today()}.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        record = {
            "command": "python examples/benchmarks/serving.py --speed-model "
            f"{' '.join(args.speed_model)} --photos cifar10 --threads {args.threads}",
            "date": str(date.today()),
            "environment": {**environment(), "onnxruntime": onnxruntime.__version__},
            "settings": {"batch_size": args.batch_size, "rounds": args.rounds},
            "speed": {
                name: speed(name, args.batch_size, args.rounds, args.threads, Path(scratch) / name)
                for name in args.speed_model
            },
            "accuracy": accuracy(args.photos, 5000, 2000, Path(scratch) / "nano"),
        }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
