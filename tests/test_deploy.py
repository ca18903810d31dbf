"""Exported graphs, run by onnxruntime and torch.export, compared with the model in PyTorch."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import ijepa_zoo
from ijepa_zoo import deploy
from ijepa_zoo.deploy import export_graph
from ijepa_zoo.errors import MissingPackageError, RunError, SettingsError

PHOTOS = sorted((Path(__file__).parents[1] / "examples" / "images" / "photos").glob("*.jpg"))
HAVE_ONNX = all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))
needs_onnx = pytest.mark.skipif(not HAVE_ONNX, reason="the extra onnx is not installed")
needs_new_timm = pytest.mark.skipif(
    not hasattr(timm.layers, "is_exporting"), reason="older timm keeps positions of the own size"
)
TINY = {"img_size": 48, "embed_dim": 96, "depth": 2, "num_heads": 3, "pretrained": False}


def make_model(**options):
    torch.manual_seed(0)
    made = ijepa_zoo.create_model("vit_tiny16_ijepa", **{**TINY, **options}).eval()
    for name, parameter in made.named_parameters():  # norms and biases that do something
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return made


@pytest.fixture(scope="module")
def model():
    return make_model()


def normalized(pixels):
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    return (pixels / 255 - mean) / std


@torch.no_grad()
def features(model, pixels, layers="last", pool="avg"):
    return ijepa_zoo.FeatureExtractor(model, layers, pool)(normalized(pixels))


def some_pixels(count, height=48, width=48):
    generator = torch.Generator().manual_seed(1)
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def run(folder, pixels):
    """The file as a server runs it."""
    name = record(folder)["file"]
    if name.endswith(".pt2"):
        return torch.export.load(folder / name).module()(pixels)
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / name)
    (output,) = session.run(["features"], {"images": pixels.numpy()})
    return torch.from_numpy(output)


def record(folder):
    return json.loads((folder / "serving.json").read_text())


@pytest.mark.parametrize(
    ("to", "options", "limit"),
    [
        pytest.param("onnx", {}, 1e-5, marks=needs_onnx),
        pytest.param("onnx", {"dtype": "float16"}, 2e-3, marks=needs_onnx),
        pytest.param("onnx", {"quantize": "int8"}, 0.05, marks=needs_onnx),
        ("torch-export", {}, 1e-5),
        ("torch-export", {"dtype": "bfloat16"}, 2e-2),
    ],
)
def test_features_of_any_batch_in_every_precision(model, tmp_path, monkeypatch, to, options, limit):
    if not options:
        monkeypatch.setattr(deploy, "_ONE_FILE", 10_000)
    folder = export_graph(model, tmp_path / "made", to, **options).rename(tmp_path / "served")
    for count in (1, 2, 7):
        pixels = some_pixels(count)
        got, wanted = run(folder, pixels), features(model, pixels)
        assert got.dtype == torch.float32
        assert (got - wanted).norm() / wanted.norm() < limit
    about = record(folder)
    assert about["input"] == {"name": "images", "dtype": "uint8", "shape": ["batch", 3, 48, 48]}
    assert about["output"] == {"name": "features", "dtype": "float32", "shape": ["batch", 96]}
    assert (about["layers"], about["pool"]) == ([1], "avg")
    assert about["precision"] == next(iter(options.values()), "float32")
    assert about["checked"]["lowest_cosine"] > 1 - limit
    names = {about["file"], "serving.json"}
    assert {path.name for path in folder.iterdir()} - names == (
        {"model.onnx.data"} if to == "onnx" and not options else set()
    )
    size = sum(path.stat().st_size for path in folder.glob("model.*"))
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert (size < 0.7 * whole) == bool(options)
    for path in folder.iterdir():  # the file does not tell where it was made
        for place in (ijepa_zoo.__file__, torch.__file__, folder):
            assert str(Path(place).parent).encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    "to",
    [
        pytest.param("onnx", marks=needs_onnx),
        pytest.param("torch-export", marks=needs_new_timm),
    ],
)
def test_maps_of_other_sizes_resample_positions_as_timm_does(model, tmp_path, to):
    options = {"layers": [0, -1], "pool": None, "dynamic_size": True}
    folder = export_graph(model, tmp_path / "served", to, **options)
    assert record(folder)["input"]["shape"] == ["batch", 3, "height", "width"]
    assert record(folder)["input"]["multiple_of"] == [16, 16]
    assert record(folder)["output"]["shape"] == ["batch", 192, "rows", "columns"]
    for size in ((48, 48), (32, 112), (144, 144)):
        resized = make_model()
        resized.set_input_size(size)
        pixels = some_pixels(3, *size)
        wanted = features(resized, pixels, [0, 1], None)
        torch.testing.assert_close(run(folder, pixels), wanted)
    assert not model.dynamic_img_size


@needs_new_timm
def test_models_of_timm(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=48).eval()
    options = {"to": "torch-export", "output": "features", "dynamic_size": True}
    folder, pixels = export_graph(vit, tmp_path / "served", **options), some_pixels(2)
    with torch.no_grad():
        wanted = vit.forward_features((pixels / 255 - 0.5) / 0.5)[:, 0]
    torch.testing.assert_close(run(folder, pixels), wanted)
    assert record(folder)["pool"] == "cls"
    eva = timm.create_model("eva02_tiny_patch14_224", depth=1, img_size=28)
    with pytest.raises(SettingsError, match="Eva"):  # rotary positions
        export_graph(eva, tmp_path / "eva", **options)


@pytest.mark.parametrize(
    "damage", [lambda x: x * 1.001, lambda x: x * float("nan"), lambda x: x[:1]]
)
def test_file_that_disagrees_is_not_kept(tmp_path, monkeypatch, damage):
    (tmp_path / "serving.json").write_text("earlier")
    monkeypatch.setattr(deploy, "_trace", lambda graph: graph)
    monkeypatch.setattr(deploy, "_write", lambda *_: None)
    wrong = make_model(depth=1)
    monkeypatch.setattr(deploy, "_load", lambda *_: lambda pixels: damage(features(wrong, pixels)))
    with pytest.raises(RunError, match="differs"):
        export_graph(wrong, tmp_path, "torch-export", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["serving.json"]
    assert (tmp_path / "serving.json").read_text() == "earlier"


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_weights_without_features_are_refused(tmp_path, value):
    broken = make_model(depth=1)
    for parameter in broken.norm.parameters():
        torch.nn.init.constant_(parameter, value)
    with pytest.raises(RunError, match="the model itself"):
        export_graph(broken, tmp_path / "served", "torch-export")
    assert not list(tmp_path.iterdir())


def test_model_is_left_as_it_was_and_its_preprocessing_is_described(tmp_path):
    model = make_model().double().train()
    model.blocks[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    about = record(export_graph(model, tmp_path / "served", "torch-export"))["preprocessing"]
    assert [part.training for part in model.modules()] == modes
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    transform = ijepa_zoo.create_transform(model, normalize=False)
    short, (height, width) = about["resize"], about["center_crop"]
    filter = Image.Resampling[about["interpolation"].upper()]
    for shape in ((133, 67), (67, 133), (20, 20)):
        image = Image.open(PHOTOS[0]).resize(shape).convert(about["color"])
        scaled = [int(short * side / min(image.size)) for side in image.size]
        left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
        cropped = image.resize(scaled, filter).crop((left, top, left + width, top + height))
        np.testing.assert_array_equal(np.asarray(cropped).transpose(2, 0, 1), transform(image))


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"to": "tensorrt"}, SettingsError, "tensorrt"),
        ({"dtype": "float64"}, SettingsError, "float64"),
        ({"quantize": "int4"}, SettingsError, "int4"),
        ({"to": "onnx", "dtype": "bfloat16"}, SettingsError, "bfloat16"),
        ({"to": "torch-export", "quantize": "int8"}, SettingsError, "int8"),
        ({"to": "torch-export", "output": "logits"}, SettingsError, "no classifier"),
        ({"to": "torch-export"}, SettingsError, "32x48"),
        ({"to": "onnx"}, MissingPackageError, "onnxscript.*pip install onnx onnxscript"),
    ],
    ids=str,
)
def test_impossible_requests(tmp_path, monkeypatch, options, error, named):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    size = {"img_size": (32, 48)} if named == "32x48" else {}
    with pytest.raises(error, match=named):
        export_graph(make_model(depth=1, **size), tmp_path / "served", **options)
