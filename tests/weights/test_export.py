"""Exports: loaded by the other libraries, exact in round trips, safe to overwrite, described."""

import os
import shutil
from functools import partial

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError, RunError, SettingsError
from ijepa_zoo.weights.export import write_folder

FOLDERS = ("native", "timm", "transformers")  # formats that name and load one encoder
OFFICIAL_FILE = "ijepa-latest.pth.tar"


@pytest.fixture
def source(official, tiny, tmp_path):
    """Exports the official file to a folder, by default 'a'."""

    def export(to, folder="a", **kwargs):
        kwargs = {"model_name": "vit_tiny16_ijepa", **tiny, **kwargs}
        return ijepa_zoo.export(official, tmp_path / folder, to, **kwargs)

    return export


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def front_matter(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    head, body = text.removeprefix("---\n").split("---\n", 1)
    return yaml.safe_load(head), body


SQUASH = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.94, "crop_mode": "squash"}
BILINEAR = {"pretrained_cfg_overlay": {"crop_pct": 0.875, "interpolation": "bilinear"}}


@pytest.mark.parametrize(
    ("to", "kwargs"),
    [
        ("native", {"norm_layer": torch.nn.LayerNorm, "num_classes": 5}),
        ("native", {"pretrained_cfg_overlay": SQUASH}),
        ("timm", {"img_size": (96, 64), "patch_size": (8, 16), "in_chans": 1}),
        ("timm", {"mlp_ratio": 1.7, "qkv_bias": False, "drop_path_rate": 0.1, **BILINEAR}),
        ("timm", {"num_classes": 5, "global_pool": "map"}),
        ("transformers", {"patch_size": 8, "mlp_ratio": 1.7, "qkv_bias": False, **BILINEAR}),
        ("transformers", {"norm_layer": torch.nn.LayerNorm, "pretrained_cfg_overlay": SQUASH}),
        ("transformers", {"num_classes": 5}),
    ],
)
@torch.no_grad()
def test_code_in_the_card_gives_the_output_of_any_plain_encoder(
    encoder, check_pixels, tmp_path, to, kwargs, caplog
):
    if to == "transformers":
        pytest.importorskip("transformers")
    model = encoder(**kwargs)
    images = torch.randn(2, kwargs.get("in_chans", 3), *model.patch_embed.img_size)
    folder = ijepa_zoo.export(model, tmp_path / "a", to)
    code = front_matter(folder)[1].split("```python\n")[1].split("```")[0]
    scope = {"image": Image.new("L", (90, 70))}
    exec(code.replace("FOLDER", str(folder)), scope)
    theirs = scope["model"].eval()
    output, again = theirs(images), ijepa_zoo.create_model(f"local-dir:{folder}").eval()
    check_pixels(model, ijepa_zoo.create_transform(again))
    if to == "transformers":
        output = output.logits if model.num_classes else output.last_hidden_state.mean(1)
        assert scope["logits" if model.num_classes else "features"].shape == (1, output.shape[1])
        read = partial(scope["processor"], return_tensors="pt")
        check_pixels(model, lambda image: read(image)["pixel_values"][0])
    elif to == "timm":
        assert type(theirs) is timm.models.VisionTransformer
        if "in_chans" not in kwargs:
            config = timm.data.resolve_model_data_config(theirs)
            check_pixels(model, timm.data.create_transform(**config))
    assert_close(output, model(images), rtol=1e-4, atol=1e-5)
    assert again.norm.eps == model.norm.eps
    assert_close(again(images), model(images), rtol=1e-5, atol=1e-5)
    assert not [record for record in caplog.records if record.name.startswith("ijepa_zoo")]


def test_round_trip_of_an_official_file_is_exact(source, official, create, tmp_path):
    end = ijepa_zoo.export(source("native"), tmp_path / "end", "official")
    ours, theirs = (torch.load(p, weights_only=True) for p in (end / OFFICIAL_FILE, official))
    for network in ("encoder", "predictor", "target_encoder"):
        assert_close(dict(ours[network]), dict(theirs[network]), rtol=0, atol=0)
    assert ours["epoch"] == 0
    assert create(end).weights_origin.startswith("target encoder of")


def test_round_trip_of_all_networks_in_memory_is_exact(tiny, tiny_predictor, tmp_path):
    args = {**tiny, **tiny_predictor}
    ijepa = ijepa_zoo.create_ijepa("vit_tiny16_ijepa", pretrained=False, **args)
    ijepa.encoder.norm.bias.data.normal_()
    native = ijepa_zoo.export(ijepa, tmp_path / "native")
    for folder in (native, ijepa_zoo.export(native, tmp_path / "copy")):
        again = ijepa_zoo.create_ijepa(f"local-dir:{folder}")
        assert_close(dict(again.state_dict()), dict(ijepa.state_dict()), rtol=0, atol=0)
    fresh = ijepa_zoo.create_ijepa(f"local-dir:{native}", pretrained=False, predictor_depth=1)
    assert fresh.predictor.mask_token.shape[-1] == 24
    assert len(fresh.predictor.predictor_blocks) == 1


@pytest.mark.parametrize("names", [{0: "cat", 2: "dog"}, {"0": "cat", "2": "dog"}])
def test_names_of_classes_with_gaps(encoder, tmp_path, names):
    model = encoder(num_classes=3, pretrained_cfg_overlay={"label_names": names})
    ijepa_zoo.export(model, tmp_path / "a")
    again = ijepa_zoo.create_model(f"local-dir:{tmp_path}/a")
    assert [*again.pretrained_cfg["label_names"]] == ["cat", "1", "dog"]


@pytest.mark.parametrize("to", [*FOLDERS, "official"])
@torch.no_grad()
def test_exports_are_byte_identical_also_in_half_precision(source, create, expected, to):
    one, two = (source(to, name, dtype=torch.float16) for name in ("one", "two"))
    assert names(one) == names(two)
    for path in one.rglob("*.*"):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path
        if path.suffix == ".safetensors":
            assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    tokens = create(one).eval().encode(expected["input"])
    assert 0 < (tokens - expected["target_encoder"]).abs().max() < 0.02


@pytest.mark.parametrize(
    ("architecture", "kwargs", "error", "named"),
    [
        ({"qk_norm": True}, {"to": "native"}, CheckpointError, "k_norm"),
        ({"act_layer": "relu"}, {"to": "timm"}, CheckpointError, "ReLU"),
        ({"norm_layer": torch.nn.LayerNorm}, {"to": "timm"}, CheckpointError, "1e-05"),
        ({"num_classes": 5, "global_pool": "max"}, {"to": "transformers"}, CheckpointError, "max"),
        ({"img_size": (96, 64)}, {"to": "transformers"}, CheckpointError, "96x64"),
        ({}, {"to": "official"}, CheckpointError, "three networks"),
        (None, {"to": "official", "network": "encoder"}, CheckpointError, "network=encoder"),
        (None, {"model_name": None}, CheckpointError, "--model"),
        (None, {"depth": 3}, CheckpointError, r"blocks\.2"),
        (None, {"to": "onnx"}, SettingsError, "'onnx'"),
        (None, {"network": "predictor"}, SettingsError, "'predictor'"),
        (None, {"dtype": torch.int8}, SettingsError, "int8"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    encoder, official, tiny, tmp_path, architecture, kwargs, error, named
):
    model = official if architecture is None else encoder(**architecture)
    if architecture is None:
        kwargs = {"model_name": "vit_tiny16_ijepa", **tiny, **kwargs}
    with pytest.raises(error, match=named):
        ijepa_zoo.export(model, tmp_path / "a", **kwargs)
    with pytest.raises(SettingsError, match="img_size"):
        ijepa_zoo.export(ijepa_zoo.create_model("vit_nano8_64_ijepa"), tmp_path / "b", img_size=32)
    with pytest.raises(SettingsError, match="Linear"):
        ijepa_zoo.export(torch.nn.Linear(2, 2), tmp_path / "a")
    with pytest.raises(CheckpointError, match="vit_base16_ijepa"):
        ijepa_zoo.export("vit_base16_ijepa", tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["native", "official"])
def test_existing_folder_is_replaced_whole_and_only_when_asked(source, tmp_path, to):
    folder = source("timm")
    (folder / "networks").mkdir()
    (folder / "networks" / "stale.safetensors").touch()
    (tmp_path / "link").symlink_to(folder)
    before = names(folder)
    with pytest.raises(RunError, match=str(folder)):
        source(to)
    assert names(folder) == before
    source(to, "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert names(folder) == names(source(to, "b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "link"]
    assert folder.stat().st_mode & 0o055 == 0o055
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.rglob("*"))


def test_other_files_and_the_source_are_never_overwritten(source, official, tmp_path):
    (tmp_path / "photo.jpg").touch()
    for target in (".", "photo.jpg"):
        with pytest.raises(RunError, match=r"photo\.jpg"):
            source("timm", target, overwrite=True)
    folder = source("native")
    shutil.copy(official, folder / OFFICIAL_FILE)
    (tmp_path / "link").symlink_to(folder)
    for given in (f"local-dir:{folder}", folder / OFFICIAL_FILE):
        with pytest.raises(RunError, match="source"):
            ijepa_zoo.export(given, tmp_path / "link", "timm", overwrite=True)


def test_interrupted_export_changes_nothing(source, tmp_path, monkeypatch):
    before = names(source("timm"))

    def half(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    for folder in ("a", "b"):
        with pytest.raises(KeyboardInterrupt):
            source("official", folder, overwrite=True)
    assert names(tmp_path) == ["a", *(f"a/{name}" for name in before)]


def test_an_interrupted_replacement_keeps_the_old_folder(source, tmp_path, monkeypatch):
    before = names(source("timm"))
    replace, calls = os.replace, []

    def second_fails(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(KeyboardInterrupt):
        source("timm", overwrite=True)
    assert names(tmp_path) == ["a", *(f"a/{name}" for name in before)]


def test_a_folder_that_appears_meanwhile_stays(tmp_path):
    with pytest.raises(RunError, match="overwrite"), write_folder(tmp_path / "a", (), False):
        (tmp_path / "a").mkdir()
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("to", FOLDERS)
def test_card_claims_what_is_known(source, encoder, create, official, tiny, tmp_path, to):
    torch.save(encoder().state_dict(), tmp_path / "bare.pth")
    size = {"model_name": "vit_tiny16_ijepa", **tiny}
    exports = {
        "bare": ijepa_zoo.export(tmp_path / "bare.pth", tmp_path / "bare", to, **size),
        "copy": ijepa_zoo.export(tmp_path / "bare", tmp_path / "copy", to),
        "in memory": ijepa_zoo.export(encoder(), tmp_path / "memory", to),
        "loaded": ijepa_zoo.export(create(official), tmp_path / "loaded", to),
        "told": ijepa_zoo.export(encoder(), tmp_path / "told", to, network="target_encoder"),
        "licensed": source(to, network="target_encoder", license="CC-BY-NC-4.0"),
    }
    for name, folder in exports.items():
        is_known = name in ("loaded", "told", "licensed")
        head, body = front_matter(folder)
        assert ("**target encoder**" in body) is is_known, name
        origin = ijepa_zoo.create_model(f"local-dir:{folder}").weights_origin
        assert origin.startswith("target encoder of ") is is_known, name
        assert head.get("license") == ("cc-by-nc-4.0" if name == "licensed" else None)
        assert head["library_name"] == ("transformers" if to == "transformers" else "timm")
        assert head["pipeline_tag"] == "image-feature-extraction"
        assert "vit_custom_ijepa" in body
        for text in (body, (folder / "config.json").read_text()):
            assert str(official.parent) not in text
    with pytest.raises(CheckpointError, match="'encoder'"):
        ijepa_zoo.create_model(f"local-dir:{folder}", network="encoder")
