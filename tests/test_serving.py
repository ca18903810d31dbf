"""Exported graphs, run by onnxruntime and torch.export, beside the model they were made from."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ijepa_zoo
from ijepa_zoo.errors import RunError
from ijepa_zoo.serving import export, export_graph, formats

PHOTOS = sorted((Path(__file__).parents[1] / "examples" / "images" / "photos").glob("*.jpg"))
HAVE_ONNX = all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))
needs_onnx = pytest.mark.skipif(not HAVE_ONNX, reason="the extra onnx is not installed")
FORMATS = [pytest.param("onnx", marks=needs_onnx), "torch-export"]
TINY = {"img_size": 32, "embed_dim": 96, "depth": 2, "num_heads": 3, "pretrained": False}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = ijepa_zoo.create_model("vit_tiny16_ijepa", **TINY).eval()
    for name, parameter in made.named_parameters():  # norms and biases that do something
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return made


def expected(model, pixels, blocks, pool=True):
    """Features by hooks on the blocks, with ImageNet's mean and std."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    outputs = {}
    hooks = [
        model.blocks[i].register_forward_hook(lambda _, __, out, i=i: outputs.update({i: out}))
        for i in blocks
    ]
    with torch.no_grad():
        model.forward_features((pixels / 255 - mean) / std)
        tokens = torch.cat([model.norm(outputs[i]) for i in blocks], -1)
    for hook in hooks:
        hook.remove()
    if pool:
        return tokens.mean(1)
    return tokens.transpose(1, 2).reshape(len(pixels), -1, 2, 2)


def some_pixels(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def run(folder, pixels):
    """The file as a server runs it."""
    record = json.loads((folder / "serving.json").read_text())
    if record["file"].endswith(".pt2"):
        return torch.export.load(folder / record["file"]).module()(pixels)
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / record["file"])
    (output,) = session.run(["features"], {"images": pixels.numpy()})
    return torch.from_numpy(output)


@pytest.fixture(scope="module", params=FORMATS)
def served(request, model, tmp_path_factory):
    """A plain export in each format."""
    return export_graph(model, tmp_path_factory.mktemp("made") / "served", request.param)


def test_file_gives_the_models_features_for_any_batch(model, served):
    for count in (1, 2, 3, 7):
        pixels = some_pixels(count)
        torch.testing.assert_close(run(served, pixels), expected(model, pixels, [1]))
    record = json.loads((served / "serving.json").read_text())
    assert record["input"] == {"name": "images", "dtype": "uint8", "shape": ["batch", 3, 32, 32]}
    assert record["output"] == {"name": "features", "dtype": "float32", "shape": ["batch", 96]}
    assert record["layers"] == [1]
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert [check["images"] for check in record["checked"]["batches"]] == [1, 2, 5]
    assert record["checked"]["lowest_cosine"] > 0.99999


@pytest.mark.parametrize("to", FORMATS)
def test_maps_of_several_blocks(model, tmp_path, to):
    folder = export_graph(model, tmp_path / "served", to, layers=[0, -1], pool=None)
    for count in (1, 5):
        pixels = some_pixels(count)
        wanted = expected(model, pixels, [0, 1], pool=False)
        torch.testing.assert_close(run(folder, pixels), wanted)


def test_files_do_not_say_where_they_were_made(served):
    for path in served.iterdir():
        for place in (ijepa_zoo.__file__, torch.__file__, served):
            assert str(Path(place).parent).encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("to", "dtype", "limit"),
    [
        pytest.param("onnx", "float16", 2e-3, marks=needs_onnx),
        ("torch-export", "float16", 2e-3),
        ("torch-export", "bfloat16", 2e-2),
    ],
)
def test_half_precision_is_smaller_and_close(model, tmp_path, to, dtype, limit):
    folder = export_graph(model, tmp_path / "half", to, dtype=dtype)
    size = sum(path.stat().st_size for path in folder.glob("model.*"))
    assert size < 0.7 * sum(tensor.nbytes for tensor in model.state_dict().values())
    pixels = some_pixels(4)
    got, wanted = run(folder, pixels), expected(model, pixels, [1])
    assert got.dtype == torch.float32
    assert 0 < (got - wanted).norm() / wanted.norm() < limit
    assert next(model.parameters()).dtype == torch.float32


@needs_onnx
def test_int8_holds_all_linear_layers_and_is_close(model, tmp_path):
    import onnx

    folder = export_graph(model, tmp_path / "served", quantize="int8")
    operators = [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]
    assert operators.count("MatMulInteger") == 4 * 2  # qkv, proj, fc1, fc2 of two blocks
    pixels = some_pixels(4)
    got, wanted = run(folder, pixels), expected(model, pixels, [1])
    assert 0 < (got - wanted).norm() / wanted.norm() < 0.05
    assert json.loads((folder / "serving.json").read_text())["precision"] == "int8"


@needs_onnx
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_weights_beyond_one_file(model, tmp_path, monkeypatch, quantize):
    monkeypatch.setattr(formats, "_ONE_FILE", 10_000)
    folder = export_graph(model, tmp_path / "served", quantize=quantize)
    names = {"model.onnx", "serving.json"} | ({"model.onnx.data"} if quantize is None else set())
    assert {path.name for path in folder.iterdir()} == names
    moved = folder.rename(tmp_path / "elsewhere")
    pixels = some_pixels(3)
    got, wanted = run(moved, pixels), expected(model, pixels, [1])
    assert (got - wanted).norm() / wanted.norm() < (0.05 if quantize else 1e-5)


def _wrong_numbers(features):
    return features * 1.001


def _no_numbers(features):
    return features * float("nan")


def _lost_images(features):
    return features[:1]


@pytest.mark.parametrize("damage", [_wrong_numbers, _no_numbers, _lost_images])
def test_file_that_disagrees_is_not_kept(model, tmp_path, monkeypatch, damage):
    earlier = tmp_path / "served"
    earlier.mkdir()
    (earlier / "serving.json").write_text("earlier")
    reopen = formats.reopen

    def damaged(folder, to):
        right = reopen(folder, to)
        return lambda images: damage(right(images))

    with monkeypatch.context() as patch:
        patch.setattr(formats, "reopen", damaged)
        with pytest.raises(RunError, match="not kept"):
            export_graph(model, earlier, "torch-export", overwrite=True)
        assert [path.name for path in tmp_path.rglob("*")] == ["served", "serving.json"]
        assert (earlier / "serving.json").read_text() == "earlier"
    if damage is _no_numbers:
        export_graph(model, earlier, "torch-export", overwrite=True)
        assert json.loads((earlier / "serving.json").read_text())["layers"] == [1]


def test_interruption_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(formats, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_graph(model, tmp_path / "served", "torch-export")
    assert not list(tmp_path.iterdir())


def test_full_disk_is_told_before_writing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(formats.shutil, "disk_usage", lambda _: SimpleNamespace(free=300_000))
    with pytest.raises(RunError, match="300,000 bytes free"):
        export_graph(model, tmp_path / "served", "torch-export")
    assert not list(tmp_path.iterdir())


def test_model_is_left_as_it_was(tmp_path):
    model = ijepa_zoo.create_model("vit_tiny16_ijepa", **TINY).to(torch.float64).train()
    model.blocks[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    export_graph(model, tmp_path / "served", "torch-export")
    assert [part.training for part in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_preprocessing_in_words_gives_the_transforms_pixels():
    """The words of serving.json, followed with Pillow alone as a server would."""
    for size in (32, 48):
        model = ijepa_zoo.create_model("vit_tiny16_ijepa", **{**TINY, "img_size": size})
        words = json.loads(json.dumps(export.preprocessing(model)))
        transform = ijepa_zoo.create_transform(model, normalize=False)
        for path in PHOTOS:
            image = Image.open(path)
            for shape in (image.size, (133, 67), (67, 133), (20, 20)):
                resized = image.resize(shape)
                got = _follow(resized.convert("RGB"), words)
                np.testing.assert_array_equal(got, np.asarray(transform(resized)))


def _follow(image, words):
    short, (height, width) = words["resize"], words["center_crop"]
    scaled = [int(short * side / min(image.size)) for side in image.size]
    image = image.resize(scaled, Image.Resampling[words["interpolation"].upper()])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    cropped = image.crop((left, top, left + width, top + height))
    return np.asarray(cropped).transpose(2, 0, 1)


def test_images_that_the_words_cannot_make_are_refused(tmp_path):
    model = ijepa_zoo.create_model("vit_tiny16_ijepa", **{**TINY, "img_size": (32, 48)})
    with pytest.raises(ValueError, match="32x48"):
        export_graph(model, tmp_path / "served", "torch-export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "tensorrt"}, "use one of onnx, torch-export"),
        ({"dtype": "float64"}, "use one of float32, float16, bfloat16"),
        ({"quantize": "int4"}, "there is int8"),
        ({"to": "onnx", "dtype": "bfloat16"}, "use float16 or int8"),
        ({"to": "torch-export", "quantize": "int8"}, "is bfloat16"),
        ({"to": "onnx", "quantize": "int8", "dtype": "float16"}, "not from onnx in float16"),
        ({"to": "torch-export", "layers": [2]}, "do not fit a model of 2 blocks"),
    ],
)
def test_impossible_options_are_refused_before_work(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_graph(model, tmp_path / "served", **options)
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_file_is_overwritten(model, tmp_path):
    with pytest.raises(RunError, match="overwrite"):
        export_graph(model, tmp_path, "torch-export")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(RunError, match=r"holds model\.safetensors"):
        export_graph(model, tmp_path, "torch-export", overwrite=True)


def test_missing_packages_are_named_before_work(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"needs .*onnxscript.*pip install 'ijepa-zoo\[onnx\]'"):
        export_graph(model, tmp_path / "served", "onnx")
    assert not list(tmp_path.iterdir())


@needs_onnx
@pytest.mark.parametrize("kind", [ImportError, OSError])
def test_installed_package_that_does_not_load_is_named_with_the_reason(monkeypatch, kind):
    def load(name):
        if name == "onnxruntime":
            raise kind("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(formats.importlib, "import_module", load)
    with pytest.raises(ImportError, match=r"onnxruntime, which is installed .*libgomp\.so\.1"):
        formats.require_onnx()


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "not finite"), (0.0, "all zero")])
def test_weights_without_features_are_told_before_exporting(tmp_path, monkeypatch, value, words):
    spoilt = ijepa_zoo.create_model("vit_tiny16_ijepa", **TINY).eval()
    torch.nn.init.constant_(spoilt.norm.weight, value)
    torch.nn.init.constant_(spoilt.norm.bias, value)
    monkeypatch.setattr(export, "trace", lambda _: pytest.fail("traced"))
    with pytest.raises(RunError, match=f"the model's own features are {words}"):
        export_graph(spoilt, tmp_path / "served", "torch-export")
    assert not list(tmp_path.iterdir())
