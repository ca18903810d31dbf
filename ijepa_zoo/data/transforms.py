"""The evaluation transform of a model, and random crops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop

from .decode import Decoder, Pixels, Raw

_LONGEST = 32  # short sides that a long side may measure
_TRIES = 10  # boxes drawn before the fallback, as in torchvision's RandomResizedCrop
DRAWS = 2 * _TRIES + 3  # uniform numbers of an image: areas, aspects, top, left, flip

Box = tuple[int, int, int, int]  # top, left, height, width


class ModelTransform:
    """The evaluation transform of a model: decode, resize, center crop, normalize.

    The resize and the crop are timm's. Images more than 32 times longer than wide are cut first:
    1 x 60,000 pixels would be resized to 256 x 15,360,000 before the crop takes 224 of them.
    """

    def __init__(self, config: dict[str, Any], normalize: bool = True) -> None:
        from timm.data import create_transform as timm_transform

        self.input_size: tuple[int, int, int] = config["input_size"]
        self.decoder = Decoder(in_chans=self.input_size[0])
        self.limits_aspect = config["crop_mode"] == "center"
        made = timm_transform(**config, is_training=False, normalize=False)
        self.geometry = made.transforms[:-1]  # the last one makes an array
        self.normalize = normalize
        self.mean, self.std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))

    def __call__(self, image: Raw) -> Tensor:
        """Transform an image (see `Decoder`) to float32 `[C, H, W]`, uint8 without `normalize`."""
        pixels = self.decoder(image)
        if self.limits_aspect:
            pixels = limit_aspect(pixels)
        for step in self.geometry:
            pixels = step(pixels)
        tensor = pil_to_tensor(pixels) if isinstance(pixels, Image.Image) else pixels
        if not self.normalize:
            return tensor
        return tensor.float().div_(255).sub_(self.mean).div_(self.std)

    def __repr__(self) -> str:
        mean, std = (values.flatten().tolist() for values in (self.mean, self.std))
        return f"ModelTransform({self.geometry}, mean={mean}, std={std})"


def transform_config(model: nn.Module) -> dict[str, Any]:
    """The data config of a timm model, at its current image size and channels.

    A model of other channels than RGB gets the average of mean and std for each.
    """
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    embed = getattr(model, "patch_embed", None)
    height, width = getattr(embed, "img_size", None) or config["input_size"][1:]
    channels = config["input_size"][0]
    if not hasattr(embed, "backbone"):  # a hybrid's patch embedding reads feature maps
        channels = getattr(getattr(embed, "proj", None), "in_channels", channels)
    config["input_size"] = (channels, height, width)
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def create_transform(model: nn.Module, *, normalize: bool = True) -> ModelTransform:
    """The evaluation transform that belongs to a model.

    Args:
        model: A timm model; its `pretrained_cfg` gives filter, crop share, mean and std.
        normalize: False returns uint8 pixels, before scaling to 0..1 and mean and std.

    Returns:
        A callable from a Pillow image, array or tensor to a float32 tensor `[C, H, W]`.
    """
    return ModelTransform(transform_config(model), normalize)


def describe_transform(model: nn.Module) -> str:
    """One line about the transform, for reports and the settings of a run."""
    config = transform_config(model)
    height, width = config["input_size"][1:]
    mean, std = (" ".join(f"{v:g}" for v in config[key]) for key in ("mean", "std"))
    return (
        f"{config['interpolation']} resize, {config['crop_mode']} crop {config['crop_pct']:g} "
        f"to {height}x{width}, mean {mean}, std {std}"
    )


def pixel_size(pixels: Pixels) -> tuple[int, int]:
    """Height and width in pixels."""
    if isinstance(pixels, Tensor):
        return pixels.shape[-2], pixels.shape[-1]
    return pixels.height, pixels.width


def limit_aspect(pixels: Pixels) -> Pixels:
    """Cut the long side of an extreme image about its center, to 32 times the short one."""
    sides = pixel_size(pixels)
    longest = _LONGEST * min(sides)
    if max(sides) <= longest:
        return pixels
    height, width = (min(side, longest) for side in sides)
    top, left = (sides[0] - height) // 2, (sides[1] - width) // 2
    if isinstance(pixels, Tensor):
        return pixels[..., top : top + height, left : left + width]
    return pixels.crop((left, top, left + width, top + height))


def crop_box(
    draws: Sequence[float],
    size: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """A random box, distributed as in torchvision's RandomResizedCrop.

    `draws` are uniform numbers in [0, 1): areas of ten tries, their aspects, top and left. `scale`
    is the range of the area over the image's, uniform, and `ratio` that of width / height,
    log-uniform.
    """
    image_h, image_w = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, aspect_draw in zip(draws[:_TRIES], draws[_TRIES : 2 * _TRIES]):
        area = image_h * image_w * (scale[0] + area_draw * (scale[1] - scale[0]))
        aspect = math.exp(low + aspect_draw * (high - low))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image_w and 0 < height <= image_h:
            top_draw, left_draw = draws[2 * _TRIES : 2 * _TRIES + 2]
            top = math.floor(top_draw * (image_h - height + 1))
            return top, math.floor(left_draw * (image_w - width + 1)), height, width
    return center_box(size, min(max(image_w / image_h, ratio[0]), ratio[1]))


def center_box(size: tuple[int, int], aspect: float) -> Box:
    """The largest box in the middle of an image whose width / height is `aspect`."""
    image_h, image_w = height, width = size
    if image_w / image_h < aspect:
        height = max(round(image_w / aspect), 1)
    else:
        width = max(round(image_h * aspect), 1)
    return (image_h - height) // 2, (image_w - width) // 2, height, width


def crop_resize(pixels: Pixels, box: Box, size: tuple[int, int]) -> Tensor:
    """A box of an image, resized to uint8 `[C, *size]` with a bilinear filter, antialiased.

    torchvision's filter for uint8 tensors takes a third of the time of Pillow's, which the
    official repository uses; results differ by at most one level of 255.
    """
    top, left, height, width = box
    if isinstance(pixels, Image.Image):
        part = np.array(pixels.crop((left, top, left + width, top + height)))
        pixels = torch.from_numpy(part.reshape(height, width, -1)).permute(2, 0, 1)
        top = left = 0
    return resized_crop(pixels, top, left, height, width, list(size))
