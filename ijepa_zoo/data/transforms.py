"""The model's own evaluation transform."""

from typing import Any

from PIL import Image
from torch import nn

from .images import to_rgb

_LONGEST = 32  # short sides that a long side may measure


class LimitAspect:
    """Cut the long side of an extreme image about its centre, to ``ratio`` times the short one.

    A 1 x 60,000 image would be resized to 256 x 15,360,000 before the centre crop takes 224 of it.

    Args:
        ratio: Length of the long side allowed, in short sides.
    """

    def __init__(self, ratio: int = _LONGEST) -> None:
        self.ratio = ratio

    def __call__(self, image: Image.Image) -> Image.Image:
        """Cut if the image is beyond the ratio, else return it as it is."""
        longest = self.ratio * min(image.size)
        if max(image.size) <= longest:
            return image
        width, height = (min(side, longest) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    def __repr__(self) -> str:
        return f"LimitAspect({self.ratio})"


def transform_config(model: nn.Module) -> dict[str, Any]:
    """The data config of a timm model, at the image size that the model has now.

    Returns:
        ``input_size``, ``interpolation``, ``mean``, ``std``, ``crop_pct``, ``crop_mode``. The
        input size is that of the patch embedding (``create_model(..., img_size=...)``,
        ``set_input_size``), so the resize before the crop scales with it by ``crop_pct``.

    Raises:
        ValueError: If the model does not take images of three channels.
    """
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if size is not None:
        config["input_size"] = (config["input_size"][0], *size)
    channels = getattr(getattr(embed, "proj", None), "in_channels", 3)
    if channels != 3:
        raise ValueError(
            f"the model takes images of {channels} channels; its transform makes RGB images of 3"
        )
    return config


def create_transform(model: nn.Module, *, normalize: bool = True) -> Any:
    """The evaluation transform that belongs to a model: resize, centre crop, normalise.

    It is timm's, after a conversion of any image to RGB (see :func:`~ijepa_zoo.data.images.to_rgb`)
    and a cut of images more than 32 times longer than wide.

    Args:
        model: A timm model; its ``pretrained_cfg`` gives filter, crop share, mean and std.
        normalize: False gives uint8 pixels ``[3, H, W]``, before scaling to 0..1 and mean and std.

    Returns:
        A callable from a ``PIL.Image`` to a float32 tensor ``[3, H, W]``.

    Raises:
        ValueError: If the model does not take images of three channels.
    """
    from timm.data import create_transform as timm_transform

    config = transform_config(model)
    transform = timm_transform(**config, is_training=False, normalize=normalize)
    before = [LimitAspect()] if config["crop_mode"] == "center" else []
    transform.transforms[:0] = [to_rgb, *before]
    return transform


def describe_transform(model: nn.Module) -> str:
    """The transform in words, for reports and for the settings of a run."""
    config = transform_config(model)
    height, width = config["input_size"][1:]
    mean, std = (" ".join(f"{v:g}" for v in config[key]) for key in ("mean", "std"))
    return (
        f"{config['interpolation']} resize, {config['crop_mode']} crop {config['crop_pct']:g} "
        f"to {height}x{width}, mean {mean}, std {std}"
    )
