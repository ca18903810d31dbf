"""`ijepa-zoo bench features`: from a folder of JPEG files to features, and the bare model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.sources import find_items
from ..extraction import extract_features
from ..extraction.encoder import Encoder, usable_cpus
from ..models.factory import create_model
from ..weights.export import export
from .loading import OTHERS, refuse_absent
from .photos import photographs
from .result import BenchResult, agreed
from .timing import OURS, Work, finish, take_turns, use_threads

_SAME, _CLOSE = 1e-5, 1e-2  # cosine distances: equal settings, and other precision or filter
_BARE = "bare model"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def features(
    *,
    model: str = "vit_base16_ijepa",
    data: str | Path | None = None,
    images: int = 500,
    precision: str = "float32",
    other_precision: str = "float32",
    batch_size: int = 32,
    device: str = "auto",
    workers: int | None = None,
    compile: bool = False,
    threads: int | None = None,
    vs: Sequence[str] = (),
    seconds: float = 120.0,
    rounds: int = 10,
    progress: bool = False,
) -> BenchResult:
    """Time features of a folder of photographs, end to end, and of pixels in memory.

    The weights are random. Ours is `extract_features` with a file as its result; timm's is the
    loop of its documentation over a `DataLoader`; transformers' is its pipeline for image features.
    The latter two read weights that were exported to them, and average over the patches.

    Args:
        model: Name of the model.
        data: A folder of images, those that cannot be decoded are left out; None for made up
            photographs.
        images: Number of made up ones.
        precision: Ours, see `extract_features`.
        other_precision: That of the others, by autocast: float32 (as documented) or bfloat16.
        batch_size: Images of a batch.
        device: `auto`, `cpu`, `cuda`, ...
        workers: Processes that decode (ours and timm's); None for one per CPU, up to 8.
        compile: Compile the models of all.
        threads: CPU threads; None for torch's own choice.
        vs: `timm`, `transformers` or both.
        seconds: Time for the rounds, of the folder and of the bare model each.
        rounds: Most rounds.
        progress: Show a progress bar.

    Returns:
        Seconds and images/s, end to end and of the bare models, and the ratios; end to end also
        `start_seconds` until the first batch comes to the model, which with few images decides:
        processes that decode must begin first. Not with `compile`, whose graphs it would break.

    Raises:
        ValueError: A setting does not fit, or no file can be decoded.
        ImportError: A library is not installed.
        DisagreementError: Features, less their mean over the images, differ by more than a cosine
            distance of 1e-2; those of timm in float32 by more than 1e-5.
    """
    vs = list(dict.fromkeys(vs))
    settings = {name: value for name, value in locals().items() if name != "progress"}
    refuse_absent("features", vs, OTHERS)
    if other_precision not in _DTYPES:
        raise ValueError(f"other_precision is {other_precision!r}; use {', '.join(_DTYPES)}")
    workers = min(8, usable_cpus()) if workers is None else workers
    with (
        use_threads(threads),
        photographs(data, images, progress=progress) as good,
        TemporaryDirectory(prefix="ijepa-zoo-bench-") as scratch,
    ):
        ours = _Ours(model, good.folder, Path(scratch), settings, workers)
        contenders: dict[str, Any] = {OURS: ours}
        for name in vs:
            exported = export(ours.model, Path(scratch) / name, name)
            kind = _Timm if name == "timm" else _Transformers
            contenders[name] = kind(exported, ours, other_precision, compile)
        agreement = _compare(contenders, precision == other_precision == "float32")
        if compile:
            ours.model.compile()
        turn = partial(take_turns, seconds=seconds, rounds=rounds, progress=progress)
        works: dict[str, Work] = {
            name: one.folder_features if compile else partial(_timed_start, one)
            for name, one in contenders.items()
        }
        whole = turn(works, what="features", warmup=0)
        bare: dict[str, Work] = {name: one.bare for name, one in contenders.items()}
        alone = turn(bare, what=_BARE)
        count = len(ours.paths)
    results: dict[str, dict[str, Any]] = {}
    ratios: dict[str, dict[str, Any]] = {}
    for timings, suffix, number in ((whole, "", count), (alone, f", {_BARE}", batch_size)):
        for name in contenders:
            taken = timings.summary(name)
            rate = number / taken.median
            results[name + suffix] = {"seconds": taken.as_json(), "images_per_second": rate}
            if timings is whole and not compile:
                start = timings.summary(name, "start_seconds").median
                results[name]["start_seconds"] = start
        ratios |= {name + suffix: ratio for name, ratio in timings.ratios().items()}
    resolved, extra = {"device": str(ours.device)}, {"images": count, **good.about}
    return BenchResult("features", settings, results, ratios, agreement, extra, resolved)


class _Ours:
    """This package."""

    def __init__(
        self, model: str, folder: Path, scratch: Path, settings: dict[str, Any], workers: int
    ) -> None:
        self.model = create_model(model, pretrained=False).eval()
        self.entry = self.model.patch_embed  # begins the work on a batch
        self.folder, self.out, self.workers = folder, scratch / "ours.safetensors", workers
        self.batch_size, self.threads = settings["batch_size"], settings["threads"]
        self.precision = settings["precision"]
        self.encoder = Encoder(
            self.model,
            precision=self.precision,
            device=settings["device"],
            threads=self.threads,
        )
        self.device = self.encoder.device
        self.paths = [item.path for item in find_items(folder) if item.skipped is None]
        size = (self.batch_size, 3, *self.encoder.size)
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        floats = self.pixels.to(self.device).float() / 255
        self.images = (floats - self.encoder.mean) / self.encoder.std

    def folder_features(self) -> Tensor:
        for file in self.out.parent.glob("ours.*"):
            file.unlink()
        extract_features(
            self.folder,
            self.model,
            self.out,
            batch_size=self.batch_size,
            device=str(self.device),
            workers=self.workers,
            threads=self.threads,
            precision=self.precision,
        )
        return load_file(self.out)["features"]

    def bare(self) -> None:
        list(self.encoder.encode([(self.pixels, [None] * self.batch_size)]))
        finish(self.device)


class _Timm:
    """timm's documented loop: its transform, data set and model, with a DataLoader."""

    def __init__(self, folder: Path, ours: _Ours, precision: str, compile: bool) -> None:
        self.ours, self.autocast = ours, _autocast(ours.device, precision)
        self.model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
        self.model.eval().to(ours.device)
        self.entry = self.model.patch_embed
        config = timm.data.resolve_model_data_config(self.model)
        self.transform = timm.data.create_transform(**config, is_training=False)
        if compile:
            self.model.compile()

    def folder_features(self) -> Tensor:
        ours = self.ours
        images = timm.data.ImageDataset(str(ours.folder), transform=self.transform)
        loader = DataLoader(images, ours.batch_size, num_workers=ours.workers)
        with torch.inference_mode(), self.autocast():
            rows = [self.model(batch.to(ours.device)).float().cpu() for batch, _ in loader]
        found = dict(zip(images.filenames(absolute=True), torch.cat(rows)))
        return torch.stack([found[path] for path in ours.paths])

    def bare(self) -> None:
        with torch.inference_mode(), self.autocast():
            self.model(self.ours.images)
        finish(self.ours.device)


class _Transformers:
    """The pipeline of transformers' documentation, with the processor that the export wrote."""

    def __init__(self, folder: Path, ours: _Ours, precision: str, compile: bool) -> None:
        from transformers import logging, pipeline

        logging.disable_progress_bar()
        self.ours, self.autocast = ours, _autocast(ours.device, precision)
        self.pipeline = pipeline("image-feature-extraction", model=str(folder), device=ours.device)
        self.entry = self.pipeline.model
        if compile:
            self.pipeline.model.compile()

    def folder_features(self) -> Tensor:
        with self.autocast():
            found = self.pipeline(
                self.ours.paths, batch_size=self.ours.batch_size, return_tensors=True
            )
        return torch.stack([tokens[0].float().mean(0) for tokens in found])

    def bare(self) -> None:
        with torch.inference_mode(), self.autocast():
            self.pipeline.model(self.ours.images).last_hidden_state.mean(1)
        finish(self.ours.device)


def _timed_start(one: Any) -> dict[str, float]:
    """Features of the folder; seconds until the first batch came to the model."""
    with _first_call(one.entry) as called:
        started = time.perf_counter()
        one.folder_features()
        whole = time.perf_counter() - started
    return {"seconds": whole, "start_seconds": called[0] - started}


@contextmanager
def _first_call(module: nn.Module) -> Iterator[list[float]]:
    """A list that gets the times of a module's calls, the first of them first."""
    called: list[float] = []
    handle = module.register_forward_pre_hook(lambda *call: called.append(time.perf_counter()))
    try:
        yield called
    finally:
        handle.remove()


def _compare(contenders: dict[str, Any], exact: bool) -> dict[str, dict[str, Any]]:
    """Compare the features of all images, as they are timed; warms everything up.

    With random weights all images have nearly the same features, so their mean is taken off first.
    """
    found = {name: one.folder_features().double() for name, one in contenders.items()}
    ours = found.pop(OURS)
    mean = ours.mean(0) if len(ours) > 1 else 0.0
    agreement = {}
    for name, others in found.items():
        near = nn.functional.cosine_similarity(others - mean, ours - mean, dim=1)
        tolerance = _SAME if exact and name == "timm" else _CLOSE
        what = f"features of {len(others)} images, as cosine distances about their mean,"
        agreement[name] = agreed(what, float((1 - near).max()), tolerance)
    return agreement


def _autocast(device: torch.device, precision: str) -> Callable[[], Any]:
    enabled = precision != "float32"
    return lambda: torch.autocast(device.type, dtype=_DTYPES[precision], enabled=enabled)
