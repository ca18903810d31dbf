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


def classifier(head=LinearHead, names=NAMES, *options) -> Classifier:
    encoder = ijepa_zoo.create_model(NANO)
    made = head(encoder.embed_dim, len(names), *options)
    return Classifier(encoder, made, class_names=names).eval()


def logits_of(model, folder: Path) -> torch.Tensor:
    """Logits of the readable images, one image at a time."""
    transform = ijepa_zoo.create_transform(model)
    opened = [Image.open(folder / f"{name}.png") for name in "ac"]
    with torch.no_grad():
        return torch.cat([model(transform(image)[None]) for image in opened])


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_has_the_likeliest_classes_and_the_errors(images, tmp_path):
    model = classifier()
    report = ijepa_zoo.predict(images, model, tmp_path / "p.csv", topk=3, **QUIET)
    rows = read_csv(tmp_path / "p.csv")
    assert [row["path"] for row in rows] == [f"{images}/{name}.png" for name in "abc"]
    assert report.failed == [(rows[1]["path"], rows[1]["error"])]
    assert not rows[1]["label"]
    for row, expected in zip((rows[0], rows[2]), logits_of(model, images).softmax(dim=1)):
        values, places = expected.sort(descending=True)
        endings = ["", "_2", "_3"]
        assert [row[f"label{end}"] for end in endings] == [NAMES[i] for i in places]
        found = [float(row[f"probability{end}"]) for end in endings]
        assert found == pytest.approx(values.tolist(), rel=1e-4)
        assert row["error"] == ""
    ijepa_zoo.predict(images, model, tmp_path / "p2.parquet", topk=3, **QUIET)
    table = parquet.read_table(tmp_path / "p2.parquet").to_pylist()
    for name in ("path", "label", "label_3", "error"):
        assert [row[name] or "" for row in table] == [row[name] for row in rows]
    model.multi_label = True
    ijepa_zoo.predict(images, model, tmp_path / "p3.csv", **QUIET)
    highest = logits_of(model, images)[0].sigmoid().max()
    found = float(read_csv(tmp_path / "p3.csv")[0]["probability"])
    assert found == pytest.approx(float(highest), rel=1e-4)


def test_a_run_resumes_and_is_not_repeated(images, tmp_path, monkeypatch):
    model = classifier()

    def predict(name, **options):
        given = {**QUIET, "batch_size": 1, **options}
        return ijepa_zoo.predict(images, model, tmp_path / name, **given)

    predict("whole.csv")
    with monkeypatch.context() as patch:
        patch.setattr("ijepa_zoo.extract.merge", None)
        with pytest.raises(TypeError):
            predict("killed.csv")
    assert len(list((tmp_path / "killed.csv.parts").glob("*.safetensors"))) == 3
    predict("killed.csv")
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert predict("killed.csv").already_done
    with pytest.raises(RunError, match="topk"):
        predict("killed.csv", topk=2)


@pytest.mark.parametrize("names", [NAMES, ["depth"]])
def test_a_dense_head_writes_maps(images, tmp_path, names):
    model = classifier(DenseHead, names)
    with pytest.raises(SettingsError, match="inside its images"):
        ijepa_zoo.predict(images, model, images / "maps", **QUIET)
    if len(names) > 1:
        (images / "a.png").rename(images / f"a{'ä' * 125}.png")  # the longest name
    ijepa_zoo.predict(images, model, tmp_path / "maps", **QUIET)
    if len(names) > 1:
        (images / f"a{'ä' * 125}.png").rename(images / "a.png")
    rows = read_csv(tmp_path / "maps" / "maps.csv")
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    for row, expected in zip((rows[0], rows[2]), logits_of(model, images)):
        found = torch.tensor(np.asarray(Image.open(tmp_path / "maps" / row["map"])).astype(int))
        if len(names) > 1:
            assert (found == expected.argmax(dim=0)).float().mean() > 0.999
        else:
            assert (found - 1000 * expected[0].clamp(min=0)).abs().max() < 2


@pytest.mark.parametrize(
    ("head", "out", "options", "named"),
    [
        (None, "p.csv", {}, "no classifier"),
        (LinearHead, "p.csv", {"topk": 4}, "topk"),
        (LinearHead, "p.txt", {}, r"p\.txt"),
        (DenseHead, "p.csv", {}, r"p\.csv"),
    ],
)
def test_what_cannot_be_predicted(images, tmp_path, head, out, options, named):
    model = classifier(head) if head else classifier().encoder
    with pytest.raises(SettingsError, match=named):
        ijepa_zoo.predict(images, model, tmp_path / out, **options)


def test_a_fine_tuned_model_has_equal_logits_everywhere(images, tmp_path, capsys):
    """timm, this package, a graph for servers and the command `predict`."""
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
    words = ["export", str(folder), str(tmp_path / "graph"), "--to", "torch-export", "--quiet"]
    assert main(words) == 0
    transform = ijepa_zoo.create_transform(stock, normalize=False)
    pixels = torch.stack([transform(Image.open(images / f"{name}.png")) for name in "ac"])
    graph = torch.export.load(tmp_path / "graph" / "model.pt2").module()
    torch.testing.assert_close(graph(pixels), expected)
    out = tmp_path / "p.csv"
    command = ["predict", str(images), "--model", source, "--out", str(out), "--topk", "2"]
    assert main([*command, "--device", "cpu", "--workers", "0"]) == 3  # one image is broken
    for row, logits in zip((row for row in read_csv(out) if not row["error"]), expected):
        probabilities = dict(zip(("bright", "dark"), logits.softmax(dim=0).tolist()))
        assert float(row["probability"]) == pytest.approx(probabilities[row["label"]], rel=1e-4)
        assert float(row["probability_2"]) == pytest.approx(probabilities[row["label_2"]], rel=1e-4)
    assert "1 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "shape"), [((AttentiveHead, NAMES, 4), [3]), ((DenseHead,), [3, 64, 64])]
)
def test_a_probe_is_exported_with_its_logits(options, shape, tmp_path):
    save_classifier(tmp_path / "probe", classifier(*options), encoder=NANO)
    opened = ijepa_zoo.create_model(f"local-dir:{tmp_path / 'probe'}")
    export_graph(opened, tmp_path / "served", "torch-export")
    record = json.loads((tmp_path / "served" / "serving.json").read_text())
    assert record["classes"] == NAMES
    assert record["output"]["name"] == "logits"
    assert record["output"]["shape"][1:] == shape
