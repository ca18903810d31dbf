"""config.json of folders that come from anybody."""

import json
import shutil

import pytest

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError


@pytest.fixture
def native(official, tiny, tmp_path):
    """Makes a native folder and lets a function change its config.json."""

    def make(change):
        folder = tmp_path / "native"
        ijepa_zoo.export(official, folder, "native", model_name="vit_tiny16_ijepa", **tiny)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/tmp/secret.safetensors",
        "networks/../../secret.safetensors",
        "",
        ".",
        "secret.pth",
        "..\\secret.safetensors",
        "C:secret.safetensors",
        5,
        None,
    ],
)
def test_files_outside_the_folder_are_not_opened(native, tmp_path, name):
    folder = native(lambda c: c["ijepa_zoo"]["networks"].update(target_encoder=name))
    shutil.copy(folder / "model.safetensors", tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file inside the folder"):
        ijepa_zoo.create_model(f"local-dir:{folder}")


def test_names_of_networks_never_become_paths(native, tmp_path):
    def add(config):
        config["ijepa_zoo"]["networks"]["../../../evil"] = "model.safetensors"

    with pytest.raises(CheckpointError, match="networks cannot be"):
        ijepa_zoo.export(native(add), tmp_path / "out", "native")
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model_args", "depth", 10**9),
        ("model_args", "depth", 2.5),
        ("model_args", "embed_dim", True),
        ("model_args", "num_heads", 0),
        ("model_args", "patch_size", [0, 0]),
        ("model_args", "img_size", [1, 2, 3]),
        ("model_args", "mlp_ratio", float("nan")),
        ("model_args", "checkpoint_path", "/etc/passwd"),
        ("model_args", "device", "cuda"),
        ("pretrained_cfg", "mean", "abc"),
        ("pretrained_cfg", "std", [1, 0, 1]),
        ("pretrained_cfg", "input_size", [3]),
        ("pretrained_cfg", "interpolation", "evil"),
        ("pretrained_cfg", "crop_pct", 0),
        ("ijepa_zoo", "norm_eps", -1),
        ("ijepa_zoo", "networks", {}),
        ("ijepa_zoo", "predictor", {"depth": 10**9}),
        ("ijepa_zoo", "model", 5),
        ("ijepa_zoo", "license", "mit\n---"),
    ],
)
def test_values_that_no_network_has_are_refused(native, section, key, value):
    folder = native(lambda c: c[section].update({key: value}))
    with pytest.raises(CheckpointError, match=key):
        ijepa_zoo.create_ijepa(f"local-dir:{folder}")


@pytest.mark.parametrize("section", ["model_args", "pretrained_cfg", "ijepa_zoo"])
def test_sections_of_another_type_are_refused(native, section):
    folder = native(lambda c: c.update({section: [1]}))
    with pytest.raises(CheckpointError, match=section):
        ijepa_zoo.create_model(f"local-dir:{folder}")


def test_deeply_nested_text_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        ijepa_zoo.create_model(f"local-dir:{tmp_path}")
