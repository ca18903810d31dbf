"""What a server runs: uint8 pixels in, features out, with the normalisation inside."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from math import floor
from typing import Any

import torch
from torch import Tensor, nn

from ..data.transforms import transform_config
from ..errors import SettingsError
from ..features import FeatureExtractor, Layers

INPUT, OUTPUT = "images", "features"


class PixelsToFeatures(nn.Module):
    """A feature extractor with the model's normalisation before it.

    Args:
        model: A timm ViT. It is used as it is where it lies on the CPU in ``dtype``, copied where
            not.
        layers: See :class:`ijepa_zoo.FeatureExtractor`.
        pool: See :class:`ijepa_zoo.FeatureExtractor`.
        dtype: Data type of the weights and the computation.

    Attributes:
        size: Height and width of the images.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, layers: Layers, pool: str | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        config = transform_config(model)
        self.size: tuple[int, int] = tuple(config["input_size"][1:])
        extractor = FeatureExtractor(model, layers, pool)
        if {(p.device.type, p.dtype) for p in extractor.parameters()} != {("cpu", dtype)}:
            extractor = copy.deepcopy(extractor).to("cpu", dtype)
        self.extractor = extractor
        self.dtype = dtype
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features.

        Args:
            images: uint8 RGB pixels ``[B, 3, H, W]``, resized and cropped.

        Returns:
            float32 ``[B, nD]`` for n blocks, or maps ``[B, nD, h, w]`` without pooling.
        """
        normalised = images.float().div(255).sub(self.mean).div(self.std)
        features: Tensor = self.extractor(normalised.to(self.dtype))
        return features.float()


def trace(graph: PixelsToFeatures) -> torch.export.ExportedProgram:
    """The graph for any number of images, without the traces of where its code lies."""
    example = torch.zeros(2, 3, *graph.size, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(graph, (example,), dynamic_shapes={INPUT: {0: batch}})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; the modules' own modes are put back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def preprocessing(model: nn.Module) -> dict[str, Any]:
    """How a file becomes the pixels that the graph takes, in words that any library can follow.

    Returns:
        ``resize``: the short side in pixels, or ``[height, width]`` of a resize that does not keep
        the aspect ratio; ``interpolation``; ``antialias``; ``center_crop`` ``[height, width]``;
        ``color``; and ``mean`` and ``std`` of the normalisation, which is inside the graph.

    Raises:
        ValueError: If the model's transform is none that these words describe.
    """
    config = transform_config(model)
    height, width = config["input_size"][1:]
    mode = config["crop_mode"]
    if mode not in ("center", "squash") or (mode == "center" and height != width):
        raise SettingsError(
            f"images become {height}x{width} by the crop mode {mode!r}, which serving.json cannot "
            "say: export a square image size with the crop mode 'center'"
        )
    scaled = [floor(side / config["crop_pct"]) for side in (height, width)]
    return {
        "color": "RGB",
        "resize": scaled[0] if mode == "center" else scaled,
        "interpolation": config["interpolation"],
        "antialias": True,
        "center_crop": [height, width],
        "normalisation": "inside the graph",
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }
