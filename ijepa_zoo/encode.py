"""Pixels to features in a chosen precision, on one device."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from .data.loading import usable_cpus
from .data.transforms import describe_transform, transform_config
from .distributed import choose_device
from .errors import SettingsError
from .features import FeatureExtractor, Layers, evaluating

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PRECISIONS = ("auto", "float32", "bfloat16", "float16", "bfloat16-weights")
Batch = tuple[Tensor, list[str | None]]

_PACKAGES = ("torch", "timm", "pillow")
_TOKENS = 512  # that one CPU thread works on at a time; more is hardly faster
_GPU_TOKENS = 65_536  # of a batch that fills a GPU
_BATCH = 32  # images, elsewhere and at least


class Encoder:
    """Pixels to features in the chosen precision, on one device.

    On a CPU the last bits of a matrix product depend on its number of threads, so each piece of a
    batch is computed by one thread, several pieces at a time: features are bit-identical for any
    number of threads.

    Arguments are those of :func:`ijepa_zoo.extract_features`; `extractor` replaces the
    `FeatureExtractor`, see `ijepa_zoo.predictions`. `settings` determine the features, which stay
    on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Layers = "last",
        pool: str | None = "auto",
        dtype: str = "float32",
        precision: str = "float32",
        device: str | torch.device = "auto",
        threads: int | None = None,
        extractor: Any = None,
    ) -> None:
        self.device = choose_device(str(device))
        on_cpu = self.device.type == "cpu"
        if precision not in PRECISIONS:
            raise SettingsError(f"precision is {precision!r}; use one of {', '.join(PRECISIONS)}")
        if precision == "auto":
            precision = fast_precision(self.device)
        if precision == "float16" and on_cpu:
            raise SettingsError("float16 computation needs a GPU; use bfloat16 on a CPU")
        extractor = extractor or FeatureExtractor(model, layers, pool)
        config = transform_config(model)
        self.in_chans: int = config["input_size"][0]
        self.size: tuple[int, int] = tuple(config["input_size"][1:])
        self.grid = extractor.grid(self.size)
        self.piece = max(1, _TOKENS // math.prod(self.grid)) if on_cpu else None
        self.threads = (threads or usable_cpus()) if on_cpu else 1
        self.settings: dict[str, Any] = {
            "model": model_name(model),
            "weights": getattr(model, "weights_origin", "not from a checkpoint"),
            "weights_hash": weights_fingerprint(model),
            "layers": extractor.layers,
            "pool": extractor.pool,
            "transform": describe_transform(model),
            "dtype": dtype,
            "precision": precision,
            "device": self.device.type,
            "images_at_once": self.piece,
            "versions": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
        }
        self.settings |= getattr(extractor, "settings", {})
        if precision == "bfloat16-weights":
            extractor = copy.deepcopy(extractor).to(torch.bfloat16)
        self.extractor = extractor.to(self.device)
        self.dtype = DTYPES[dtype]
        self.autocast = DTYPES[precision] if precision in ("bfloat16", "float16") else None
        self.mean, self.std = (
            torch.tensor(config[key], device=self.device).view(-1, 1, 1) for key in ("mean", "std")
        )

    @property
    def batch_size(self) -> int:
        """Images of a batch that fills the device."""
        on_gpu = self.device.type == "cuda"
        return max(_BATCH, _GPU_TOKENS // math.prod(self.grid)) if on_gpu else _BATCH

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of the features of one image."""
        return self.extractor.row_shape(self.size)

    def encode(self, batches: Iterable[Batch]) -> Generator[Batch, None, None]:
        """Features of the good images of each batch, and its reasons; several batches at a time.

        Batches are uint8 `[B, C, H, W]`, and for each image None or the reason why its slot is left
        out; further slots are padding. The model is in evaluation mode until the end.
        """
        waiting: deque[tuple[list[Future[Tensor]], list[str | None]]] = deque()
        before = torch.get_num_threads()
        threads = ThreadPoolExecutor(self.threads, initializer=self._begin_thread)
        with evaluating(self.extractor):
            try:
                for pixels, reasons in batches:
                    step = self.piece or len(pixels)
                    jobs = [
                        threads.submit(self._encode, pixels[i : i + step], reasons[i : i + step])
                        for i in range(0, len(pixels), step)
                    ]
                    waiting.append((jobs, reasons))
                    while sum(len(jobs) for jobs, _ in waiting) > 2 * self.threads:
                        jobs, reasons = waiting.popleft()
                        yield torch.cat([job.result() for job in jobs]), reasons
                for jobs, reasons in waiting:
                    yield torch.cat([job.result() for job in jobs]), reasons
            finally:
                threads.shutdown(cancel_futures=True)
                torch.set_num_threads(before)

    def _begin_thread(self) -> None:
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        if self.device.type == "cuda":  # the current GPU is a setting of the thread
            torch.cuda.set_device(self.device)

    @torch.inference_mode()
    def _encode(self, pixels: Tensor, reasons: list[str | None]) -> Tensor:
        good = [slot for slot, reason in enumerate(reasons) if reason is None]
        if not good:
            return torch.empty(0, *self.row_shape, dtype=self.dtype, device=self.device)
        # The operations of torchvision's ToTensor and Normalize, in their order: the same bits.
        images = pixels.to(self.device, non_blocking=True).float().div_(255)
        images = images.sub_(self.mean).div_(self.std)
        images = images.to(next(self.extractor.parameters()).dtype)
        enabled = self.autocast is not None
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=enabled):
            features: Tensor = self.extractor(images)
        if len(good) < len(features):  # indexing with a list synchronizes
            features = features[good]
        return features.to(self.dtype)


def fast_precision(device: torch.device) -> str:
    """The fastest autocast dtype of a GPU; float32 elsewhere."""
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"


def model_name(model: nn.Module) -> str:
    """The timm name of a model's architecture, or the name of its class."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)


def class_names(model: Any) -> list[str] | None:
    """Names of the classes of a classifier, or their numbers; None for an encoder."""
    count = getattr(model, "num_classes", 0)
    if not count:
        return None
    names = getattr(model, "class_names", None) or model.pretrained_cfg.get("label_names") or ()
    if isinstance(names, dict):  # timm's form for names with gaps
        names = [names.get(i, names.get(str(i), i)) for i in range(count)]
    return [str(name) for name in names] if len(names) == count else [*map(str, range(count))]


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of every tensor's name, dtype, shape, sum of bits and about 256 elements.

    Takes a fraction of a second for a billion parameters. Sums of integers do not depend on the
    order of the elements, so the hash is the same on every device.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    texts = []
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        total = int(flat.view(integers[flat.element_size()]).sum(dtype=torch.int64))
        step = flat.numel() // 256 | 1  # odd, so that samples are of different columns
        sample = flat[::step].cpu().contiguous().view(torch.uint8)
        texts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total}")
        texts.append(sample.numpy().tobytes().hex())
    return hash_texts(texts)


def hash_texts(texts: Iterable[str]) -> str:
    """A hash of texts in their order; texts may hold file names that are not UTF-8."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()[:32]
