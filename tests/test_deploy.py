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
FREE_FORMATS = [
    pytest.param("onnx", marks=needs_onnx),
    pytest.param("torch-export", marks=needs_new_timm),
]
FORMATS = [pytest.param("onnx", marks=needs_onnx), "torch-export"]
TINY = {"img_size": 48, "embed_dim": 96, "depth": 2, "num_heads": 3, "pretrained": False}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = ijepa_zoo.create_model("vit_tiny16_ijepa", **TINY).eval()
    for name, parameter in made.named_parameters():  # norms and biases that do something
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return made


def normalized(pixels):
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    return (pixels / 255 - mean) / std


@torch.no_grad()
def maps(model, pixels, blocks):
    """Maps of the blocks by hooks."""
    outputs = {}
    hooks = [
        model.blocks[i].register_forward_hook(lambda _, __, out, i=i: outputs.update({i: out}))
        for i in blocks
    ]
    model.forward_features(normalized(pixels))
    tokens = torch.cat([model.norm(outputs[i]) for i in blocks], -1)
    for hook in hooks:
        hook.remove()
    height, width = (side // 16 for side in pixels.shape[-2:])
    return tokens.transpose(1, 2).reshape(len(pixels), -1, height, width)


def features(model, pixels):
    return maps(model, pixels, [1]).mean((2, 3))


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


def relative_error(got, wanted):
    return (got - wanted).norm() / wanted.norm()


@pytest.mark.parametrize("to", FORMATS)
def test_features_of_any_batch(model, tmp_path, to):
    folder = export_graph(model, tmp_path / "served", to)
    for count in (1, 2, 7):
        pixels = some_pixels(count)
        torch.testing.assert_close(run(folder, pixels), features(model, pixels))
    about = record(folder)
    assert about["input"] == {"name": "images", "dtype": "uint8", "shape": ["batch", 3, 48, 48]}
    assert about["output"] == {"name": "features", "dtype": "float32", "shape": ["batch", 96]}
    assert (about["layers"], about["pool"]) == ([1], "avg")
    assert [check["images"] for check in about["checked"]["batches"]] == [1, 2, 5]
    assert about["checked"]["lowest_cosine"] > 0.99999
    for path in folder.iterdir():  # the file does not tell where it was made
        for place in (ijepa_zoo.__file__, torch.__file__, folder):
            assert str(Path(place).parent).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("to", FREE_FORMATS)
def test_maps_of_other_sizes_resample_positions_as_timm_does(model, tmp_path, to):
    options = {"layers": [0, -1], "pool": None, "dynamic_size": True}
    folder = export_graph(model, tmp_path / "served", to, **options)
    assert record(folder)["input"]["shape"] == ["batch", 3, "height", "width"]
    assert record(folder)["input"]["multiple_of"] == [16, 16]
    resized = ijepa_zoo.create_model("vit_tiny16_ijepa", **TINY).eval()
    for size in ((48, 48), (32, 112), (144, 144)):
        resized.load_state_dict(model.state_dict())
        resized.set_input_size(size)
        pixels = some_pixels(3, *size)
        torch.testing.assert_close(run(folder, pixels), maps(resized, pixels, [0, 1]))
        resized.set_input_size((48, 48))
    assert not model.dynamic_img_size


@needs_new_timm
def test_other_sizes_need_absolute_positions(tmp_path):
    eva = timm.create_model("eva02_tiny_patch14_224", depth=1, img_size=28)
    with pytest.raises(SettingsError, match="Eva"):
        export_graph(eva, tmp_path / "served", "torch-export", dynamic_size=True)


@needs_new_timm
def test_class_token_of_a_timm_model(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=48).eval()
    options = {"output": "features", "dynamic_size": True}
    folder = export_graph(vit, tmp_path / "served", "torch-export", **options)
    pixels = some_pixels(2)
    with torch.no_grad():
        wanted = vit.forward_features((pixels / 255 - 0.5) / 0.5)[:, 0]
    torch.testing.assert_close(run(folder, pixels), wanted)
    assert record(folder)["pool"] == "cls"


@pytest.mark.parametrize(
    ("to", "dtype", "limit"),
    [
        pytest.param("onnx", "float16", 2e-3, marks=needs_onnx),
        ("torch-export", "bfloat16", 2e-2),
    ],
)
def test_half_precision_is_smaller_and_close(model, tmp_path, to, dtype, limit):
    folder = export_graph(model, tmp_path / "half", to, dtype=dtype)
    size = sum(path.stat().st_size for path in folder.glob("model.*"))
    assert size < 0.7 * sum(tensor.nbytes for tensor in model.state_dict().values())
    pixels = some_pixels(4)
    got = run(folder, pixels)
    assert got.dtype == torch.float32
    assert 0 < relative_error(got, features(model, pixels)) < limit
    assert next(model.parameters()).dtype == torch.float32


@needs_onnx
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_int8_and_weights_beyond_one_file(model, tmp_path, monkeypatch, quantize):
    import onnx

    monkeypatch.setattr(deploy, "_ONE_FILE", 10_000)
    folder = export_graph(model, tmp_path / "served", quantize=quantize)
    names = {"model.onnx", "serving.json"} | ({"model.onnx.data"} if quantize is None else set())
    assert {path.name for path in folder.iterdir()} == names
    operators = [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]
    linear = 4 * 2 if quantize else 0  # qkv, proj, fc1, fc2 of two blocks
    assert operators.count("MatMulInteger") == linear
    moved = folder.rename(tmp_path / "elsewhere")
    pixels = some_pixels(3)
    limit = 0.05 if quantize else 1e-5
    assert relative_error(run(moved, pixels), features(model, pixels)) < limit
    assert record(moved)["precision"] == (quantize or "float32")


@pytest.mark.parametrize(
    "damage", [lambda x: x * 1.001, lambda x: x * float("nan"), lambda x: x[:1]]
)
def test_file_that_disagrees_is_not_kept(model, tmp_path, monkeypatch, damage):
    earlier = tmp_path / "served"
    earlier.mkdir()
    (earlier / "serving.json").write_text("earlier")
    load = deploy._load
    monkeypatch.setattr(deploy, "_load", lambda *args: lambda images: damage(load(*args)(images)))
    with pytest.raises(RunError, match="differs"):
        export_graph(model, earlier, "torch-export", overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["served", "serving.json"]
    assert (earlier / "serving.json").read_text() == "earlier"


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_weights_without_features_are_refused(tmp_path, value):
    broken = ijepa_zoo.create_model("vit_tiny16_ijepa", **TINY).eval()
    torch.nn.init.constant_(broken.norm.weight, value)
    torch.nn.init.constant_(broken.norm.bias, value)
    with pytest.raises(RunError, match="the model itself"):
        export_graph(broken, tmp_path / "served", "torch-export")
    assert not list(tmp_path.iterdir())


def test_model_is_left_as_it_was(tmp_path):
    model = ijepa_zoo.create_model("vit_tiny16_ijepa", **TINY).double().train()
    model.blocks[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    export_graph(model, tmp_path / "served", "torch-export")
    export_graph(model, tmp_path / "served", "torch-export", overwrite=True)
    assert [part.training for part in model.modules()] == modes
    assert model.patch_embed.strict_img_size
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_described_preprocessing_gives_the_pixels_of_the_transform(model, tmp_path):
    about = record(export_graph(model, tmp_path / "served", "torch-export"))["preprocessing"]
    transform = ijepa_zoo.create_transform(model, normalize=False)
    for path in PHOTOS:
        for shape in ((133, 67), (67, 133), (20, 20)):
            image = Image.open(path).resize(shape)
            short, (height, width) = about["resize"], about["center_crop"]
            scaled = [int(short * side / min(image.size)) for side in image.size]
            filter = Image.Resampling[about["interpolation"].upper()]
            resized = image.convert(about["color"]).resize(scaled, filter)
            left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
            pixels = np.asarray(resized.crop((left, top, left + width, top + height)))
            np.testing.assert_array_equal(pixels.transpose(2, 0, 1), transform(image))
    wide = ijepa_zoo.create_model("vit_tiny16_ijepa", **{**TINY, "img_size": (32, 48)})
    with pytest.raises(SettingsError, match="32x48"):
        export_graph(wide, tmp_path / "wide", "torch-export")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"to": "tensorrt"}, "tensorrt"),
        ({"dtype": "float64"}, "float64"),
        ({"quantize": "int4"}, "int4"),
        ({"to": "onnx", "dtype": "bfloat16"}, "bfloat16"),
        ({"to": "torch-export", "quantize": "int8"}, "int8"),
        ({"output": "logits", "to": "torch-export"}, "no classifier"),
    ],
)
def test_impossible_options(model, tmp_path, options, named):
    with pytest.raises(SettingsError, match=named):
        export_graph(model, tmp_path / "served", **options)


def test_missing_packages_are_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingPackageError, match=r"onnxscript.*pip install onnx onnxscript"):
        export_graph(model, tmp_path / "served", "onnx")
