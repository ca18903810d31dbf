"""What heads are trained on: features of a frozen encoder, or pixels to compare them with."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..encode import Batch, Encoder
from ..errors import SettingsError
from .models import Subject

_SIDE = 32  # pixels of the images that stand for themselves


class Representations(Protocol):
    """Turns pixels into rows that hold all representations of an image.

    Attributes:
        widths: Width of each representation.
        device: Where the rows come out.
        settings: Everything that decides the numbers.
        size: Height and width of the images in pixels.
        about: The model as results record it.
        paper_name: The name under which the paper has figures.
    """

    widths: dict[str, int]
    device: torch.device
    settings: dict[str, Any]
    size: tuple[int, int]
    about: dict[str, Any]
    paper_name: str | None

    @property
    def row_width(self) -> int:
        """Width of a row."""

    def encode(self, batches: Iterable[Batch]) -> Generator[Batch, None, None]:
        """Rows `[good, row_width]` of batches, in order; see :class:`Encoder`."""

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """The representations in rows `[..., row_width]`, without a copy."""


class BlockFeatures:
    """`last` and `last4` of a frozen encoder, from one pass over each image.

    The final LayerNorm is applied to the output of each of the last four blocks, and the patches
    are averaged (arXiv 2301.08243, appendix A.1). `last` is the end of `last4`, so rows hold the
    latter alone.

    Args:
        subject: A timm ViT of at least four blocks.
        device: See :class:`Encoder`.
        precision: See :class:`Encoder`; `auto` for bfloat16 on a GPU and float32 elsewhere.

    Raises:
        TypeError: It is no ViT.
        ValueError: It has fewer blocks, takes no RGB images, or the precision is unknown.
    """

    def __init__(self, subject: Subject, *, device: str = "auto", precision: str = "auto") -> None:
        blocks = getattr(subject.model, "blocks", None)
        if blocks is not None and len(blocks) < 4:
            raise SettingsError(
                f"the model has {len(blocks)} blocks, and the paper's probes read the last four: "
                "take a model of at least four"
            )
        if precision == "auto":
            gpu = torch.device(device).type == "cuda" if device != "auto" else _has_gpu()
            precision = "bfloat16" if gpu else "float32"
        self.encoder = Encoder(
            subject.model,
            layers="last4",
            pool="avg",
            device=device,
            precision=precision,
            host=False,
        )
        self.device, self.settings = self.encoder.device, self.encoder.settings
        self.size, self.about = self.encoder.size, subject.describe()
        self.paper_name = subject.paper_name
        width = self.row_width // 4
        self.widths = {"last": width, "last4": 4 * width}

    @property
    def row_width(self) -> int:
        """See :class:`Representations`."""
        return self.encoder.row_shape[0]

    def encode(self, batches: Iterable[Batch]) -> Generator[Batch, None, None]:
        """See :class:`Representations`."""
        return self.encoder.encode(batches)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """See :class:`Representations`."""
        return {"last": rows[..., -self.widths["last"] :], "last4": rows}


class RawPixels:
    """The pixels themselves, 32 x 32, from 0 to 1: what a probe reaches without any encoder.

    Args:
        size: Height and width of the images that an encoder would get.
        device: Where the rows come out.
    """

    paper_name: str | None = None

    def __init__(self, size: tuple[int, int], device: torch.device) -> None:
        self.size, self.device = size, device
        self.widths = {"pixels": 3 * _SIDE * _SIDE}
        shown = f"{_SIDE} x {_SIDE} pixels"
        self.settings: dict[str, Any] = {"model": "raw pixels", "size": shown}
        self.about: dict[str, Any] = {
            "name": "raw pixels",
            "architecture": "none",
            "weights": shown,
            "weights_hash": "none",
            "image_size": list(size),
            "parameters": 0,
        }

    @property
    def row_width(self) -> int:
        """See :class:`Representations`."""
        return self.widths["pixels"]

    def encode(self, batches: Iterable[Batch]) -> Generator[Batch, None, None]:
        """See :class:`Representations`."""
        for pixels, reasons in batches:
            good = [slot for slot, reason in enumerate(reasons) if reason is None]
            images = pixels[good].to(self.device).float().div_(255)
            if len(good):
                images = F.interpolate(images, (_SIDE, _SIDE), mode="bilinear", antialias=True)
            yield images.reshape(len(good), self.row_width), reasons

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """See :class:`Representations`."""
        return {"pixels": rows}


def _has_gpu() -> bool:
    return torch.cuda.is_available()
