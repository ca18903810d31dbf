"""The evaluation transform that belongs to weights, across libraries."""

import logging

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform as timm_transform
from timm.data import resolve_model_data_config

import ijepa_zoo

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SIZE = {"embed_dim": 24, "depth": 1, "num_heads": 3, "img_size": 64}


@pytest.fixture(scope="module")
def image():
    """Smooth colors, so that the resize filter matters and rounding does not."""
    coarse = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((300, 200), Image.Resampling.BICUBIC)


def check_close(ours, theirs):
    difference = (theirs - ours).abs()
    assert difference.max() < 2.5 / 255 / 0.224  # two gray levels: the libraries round differently
    assert difference.mean() < 0.005


@pytest.mark.parametrize("to", ["native", "timm", "transformers"])
@pytest.mark.parametrize(
    "cfg",
    [  # with even margins: libraries round half a pixel differently
        {**IMAGENET, "crop_pct": 0.875, "interpolation": "bilinear"},
        {**HALF, "crop_pct": 0.94, "crop_mode": "squash"},
    ],
    ids=str,
)
def test_export_read_back_has_the_same_transform(tmp_path, image, to, cfg, caplog):
    model = ijepa_zoo.create_model(
        "vit_tiny16_ijepa", pretrained=False, pretrained_cfg_overlay=cfg, **SIZE
    )
    folder = ijepa_zoo.export(model, tmp_path / to, to)
    expected = ijepa_zoo.create_transform(model)(image)
    for again in (
        ijepa_zoo.create_model(f"local-dir:{folder}"),
        ijepa_zoo.create_model("vit_tiny16_ijepa", checkpoint=folder, **SIZE),
    ):
        assert torch.equal(ijepa_zoo.create_transform(again)(image), expected)
    assert not [r for r in caplog.records if r.name.startswith("ijepa_zoo")]
    if to == "transformers":
        transformers = pytest.importorskip("transformers")
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        check_close(expected, processor(image, return_tensors="pt")["pixel_values"][0])
        assert processor(image.convert("L"), return_tensors="pt")["pixel_values"].shape[1] == 3
    else:
        stock = timm.create_model(f"local-dir:{folder}", pretrained=True)
        theirs = timm_transform(**resolve_model_data_config(stock), is_training=False)
        check_close(expected, theirs(image))


@pytest.mark.parametrize(
    ("kind", "options", "warns"),
    [
        ("ViTImageProcessor", {"size": {"height": 64, "width": 64}}, True),  # mean 0.5
        (
            "BitImageProcessor",
            {"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 64}}
            | {"image_mean": IMAGENET["mean"], "image_std": IMAGENET["std"]},
            False,
        ),
    ],
)
def test_transform_is_that_of_the_image_processor_in_the_folder(
    tmp_path, image, kind, options, warns, caplog
):
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, kind)(**options)
    config = transformers.IJepaConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=64
    )
    transformers.IJepaModel(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    caplog.set_level(logging.WARNING, "ijepa_zoo")
    model = ijepa_zoo.create_model(f"local-dir:{tmp_path}")
    assert (str(tmp_path) in caplog.text) is warns
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    check_close(ijepa_zoo.create_transform(model)(image), expected)
