"""Predictions of classifiers as tables, and their logits in every form."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pyarrow import parquet

import ijepa_zoo
from ijepa_zoo.cli import main
from ijepa_zoo.deploy import export_graph
from ijepa_zoo.errors import RunError, SettingsError
from ijepa_zoo.eval.finetune import FULL, evaluate_finetune
from ijepa_zoo.models.classifier import (
    AttentiveHead,
    Classifier,
    DenseHead,
    LinearHead,
    save_classifier,
)

NANO, NAMES = "vit_nano8_64_ijepa", ["bright", "dark", "striped"]
QUIET = {"device": "cpu", "workers": 0}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images in name order, the second one broken."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, seed in (("a", 0), ("c", 1)):
        pixels = np.random.default_rng(seed).integers(0, 255, (70, 90, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "b.png").write_bytes(b"not an image")
    return folder


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    encoder = ijepa_zoo.create_model(NANO)
    head = LinearHead(encoder.embed_dim, 3)
    return Classifier(encoder, head, class_names=NAMES).eval()


def logits_of(model, folder: Path) -> torch.Tensor:
    """Logits of the readable images, one image at a time."""
    transform = ijepa_zoo.create_transform(model)
    opened = [Image.open(folder / f"{name}.png") for name in "ac"]
    with torch.no_grad():
        return torch.cat([model(transform(image)[None]) for image in opened])


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_has_the_likeliest_classes_and_the_errors(images, classifier, tmp_path):
    report = ijepa_zoo.predict(images, classifier, tmp_path / "p.csv", topk=3, **QUIET)
    rows = read_csv(tmp_path / "p.csv")
    assert [row["path"] for row in rows] == [f"{images}/{name}.png" for name in "abc"]
    assert report.failed[0][0] == rows[1]["path"]
    assert rows[1]["error"]
    assert not rows[1]["label"]
    probabilities = logits_of(classifier, images).softmax(dim=1)
    for row, expected in zip((rows[0], rows[2]), probabilities):
        values, places = expected.sort(descending=True)
        endings = ["", "_2", "_3"]
        assert [row[f"label{end}"] for end in endings] == [NAMES[i] for i in places]
        found = [float(row[f"probability{end}"]) for end in endings]
        assert found == pytest.approx(values.tolist(), rel=1e-4)
        assert row["error"] == ""
    ijepa_zoo.predict(images, classifier, tmp_path / "p2.parquet", topk=3, **QUIET)
    table = parquet.read_table(tmp_path / "p2.parquet").to_pylist()
    for name in ("path", "label", "label_3", "error"):
        assert [row[name] or "" for row in table] == [row[name] for row in rows]


def test_a_run_resumes_and_is_not_repeated(images, classifier, tmp_path, monkeypatch):
    options = {**QUIET, "batch_size": 1}
    ijepa_zoo.predict(images, classifier, tmp_path / "whole.csv", **options)
    with monkeypatch.context() as patch:
        patch.setattr("ijepa_zoo.extract.merge", None)
        with pytest.raises(TypeError):
            ijepa_zoo.predict(images, classifier, tmp_path / "killed.csv", **options)
    assert len(list((tmp_path / "killed.csv.parts").glob("*.safetensors"))) == 3
    ijepa_zoo.predict(images, classifier, tmp_path / "killed.csv", **options)
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    again = ijepa_zoo.predict(images, classifier, tmp_path / "killed.csv", **options)
    assert again.already_done
    with pytest.raises(RunError, match="topk"):
        ijepa_zoo.predict(images, classifier, tmp_path / "killed.csv", topk=2, **options)


def test_a_dense_head_writes_maps(images, tmp_path):
    torch.manual_seed(0)
    encoder = ijepa_zoo.create_model(NANO)
    model = Classifier(encoder, DenseHead(encoder.embed_dim, 3), class_names=NAMES).eval()
    ijepa_zoo.predict(images, model, tmp_path / "maps", **QUIET)
    rows = read_csv(tmp_path / "maps" / "maps.csv")
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    for row, expected in zip((rows[0], rows[2]), logits_of(model, images)):
        found = np.asarray(Image.open(tmp_path / "maps" / row["map"]))
        assert (found == expected.argmax(dim=0).numpy()).mean() > 0.999


def test_what_cannot_be_predicted(images, classifier, tmp_path):
    with pytest.raises(SettingsError, match="no classifier"):
        ijepa_zoo.predict(images, classifier.encoder, tmp_path / "p.csv")
    with pytest.raises(SettingsError, match="topk"):
        ijepa_zoo.predict(images, classifier, tmp_path / "p.csv", topk=4)
    with pytest.raises(SettingsError, match=r"p\.txt"):
        ijepa_zoo.predict(images, classifier, tmp_path / "p.txt")


def run_onnx(folder: Path, images: Path) -> torch.Tensor:
    from onnxruntime import InferenceSession

    session = InferenceSession(folder / "model.onnx")
    size = session.get_inputs()[0].shape[-1]
    config = json.loads((folder / "serving.json").read_text())["preprocessing"]
    model = ijepa_zoo.create_model(NANO, img_size=size)
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_pct": size / config["resize"]}
    transform = ijepa_zoo.create_transform(model, normalize=False)
    pixels = [transform(Image.open(images / f"{name}.png")) for name in "ac"]
    (logits,) = session.run(["logits"], {"images": torch.stack(pixels).numpy()})
    return torch.from_numpy(logits)


def test_a_fine_tuned_model_has_equal_logits_everywhere(images, tmp_path, capsys):
    """timm, this package, ONNX and the command `predict`."""
    for split in ("train", "test"):
        for name, level in (("dark", 30), ("bright", 200)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for n in range(6):
                image = Image.new("RGB", (64, 64), (level + n, level, level))
                image.save(tmp_path / "data" / split / name / f"{n}.png")
    recipe = replace(FULL, epochs=1, batch_size=6, lr=0.05, warmup_epochs=0)
    evaluate_finetune("classes", NANO, tmp_path / "data", tmp_path / "r", recipe=recipe, **QUIET)
    (folder,) = (tmp_path / "r").glob("*/model")
    source = f"local-dir:{folder}"
    stock = timm.create_model(source, pretrained=True).eval()
    expected = logits_of(stock, images)
    torch.testing.assert_close(logits_of(ijepa_zoo.create_model(source).eval(), images), expected)
    assert main(["export", str(folder), str(tmp_path / "onnx"), "--to", "onnx", "--quiet"]) == 0
    torch.testing.assert_close(run_onnx(tmp_path / "onnx", images), expected, rtol=1e-4, atol=1e-5)
    out = tmp_path / "p.csv"
    command = ["predict", str(images), "--model", source, "--out", str(out), "--topk", "2"]
    assert main([*command, "--device", "cpu", "--workers", "0"]) == 3  # one image is broken
    for row, logits in zip((row for row in read_csv(out) if not row["error"]), expected):
        probabilities = dict(zip(("bright", "dark"), logits.softmax(dim=0).tolist()))
        assert float(row["probability"]) == pytest.approx(probabilities[row["label"]], rel=1e-4)
        assert float(row["probability_2"]) == pytest.approx(probabilities[row["label_2"]], rel=1e-4)
    assert "1 failed" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["attentive", "dense"])
def test_a_probe_is_exported_with_its_logits(kind, classifier, tmp_path):
    width = classifier.encoder.embed_dim
    head = AttentiveHead(width, 3, 4) if kind == "attentive" else DenseHead(width, 3)
    classifier = Classifier(classifier.encoder, head, class_names=NAMES).eval()
    save_classifier(tmp_path / "probe", classifier, encoder=NANO)
    opened = ijepa_zoo.create_model(f"local-dir:{tmp_path / 'probe'}")
    export_graph(opened, tmp_path / "served", "torch-export")
    record = json.loads((tmp_path / "served" / "serving.json").read_text())
    assert record["classes"] == NAMES
    assert record["output"]["name"] == "logits"
    assert record["output"]["shape"][1:] == [3, *((64, 64) if kind == "dense" else ())]
    assert record["checked"]["lowest_cosine"] > 0.999
