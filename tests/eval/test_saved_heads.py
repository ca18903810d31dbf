"""The chosen head as a classifier folder: the same logits and accuracy, and other test sets."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_probe import TASK, encoder, pixels_of, write_pictures

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError, DataError
from ijepa_zoo.eval import evaluate_attentive, evaluate_head, evaluate_linear, evaluate_logreg

HEADS = {"lrs": (0.5,), "wds": (0.0,)}
PROBES = [
    (evaluate_linear, {"epochs": 2, **HEADS}),
    (evaluate_linear, {"epochs": 2, "cached": True, **HEADS}),
    (evaluate_attentive, {"epochs": 2, **HEADS}),
    (evaluate_logreg, {"cs": (1.0,)}),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def opened(out):
    (folder,) = out.glob("*/model")
    return folder, ijepa_zoo.create_model(f"local-dir:{folder}").eval()


@pytest.mark.parametrize(("probe", "options"), PROBES)
def test_the_saved_classifier_has_the_accuracy_of_the_result(pictures, tmp_path, probe, options):
    result = probe(TASK, encoder(), pictures, tmp_path, device="cpu", workers=0, **options)
    folder, model = opened(tmp_path)
    images, answers = pixels_of(pictures, "test")
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.inference_mode():
        logits = model((images - mean) / std)
    assert json.loads((folder / "config.json").read_bytes())["chosen"] == result.chosen
    assert model.class_names == ["class0", "class1", "class2"]
    right = (logits.argmax(1) == answers).double().mean()
    assert result.value == pytest.approx(100 * float(right))
    again = evaluate_head(folder, pictures, tmp_path, device="cpu", workers=0)
    assert again.value == result.value
    assert again.chosen == result.chosen
    half = {"precision": "bfloat16", "device": "cpu", "workers": 0}
    assert evaluate_head(folder, pictures, tmp_path, **half).value >= 0
    tensors = {name: -tensor for name, tensor in load_file(folder / "head.safetensors").items()}
    save_file(tensors, folder / "head.safetensors")
    other = evaluate_head(folder, pictures, tmp_path, device="cpu", workers=0)
    assert other.images == again.images
    assert len(list(tmp_path.glob("*saved-head*"))) == 3  # another head has another result
    (folder / "head.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"head\.safetensors"):
        evaluate_head(folder, pictures, tmp_path)


def test_predict_has_the_view_that_the_probe_measured(tmp_path):
    """Photographs of another size: resized to 8/7 of the model's size, then cut."""
    rng, size = np.random.default_rng(0), (90, 120)
    for part, count in (("train", 20), ("test", 15)):
        for kind in range(3):
            folder = tmp_path / "photos" / part / f"class{kind}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 190 + 30 * kind, (*size, 3)).astype(np.uint8)
                image = Image.fromarray(pixels).resize((30, 22)).resize(size[::-1])
                image.save(folder / f"{number}.png")
    result = evaluate_logreg(
        *("classes", "vit_nano8_64_ijepa", tmp_path / "photos", tmp_path / "out"),
        **{"cs": (1.0,), "device": "cpu", "workers": 0},
    )
    folder, model = opened(tmp_path / "out")
    table = tmp_path / "table.csv"
    ijepa_zoo.predict([tmp_path / "photos" / "test"], model, table, device="cpu", workers=0)
    rows = list(csv.DictReader(table.open()))
    right = sum(row["label"] == Path(row["path"]).parent.name for row in rows)
    assert result.value == pytest.approx(100 * right / 45)
    config = ijepa_zoo.create_transform(model)
    assert "73" in repr(config)
    assert json.loads((folder / "config.json").read_bytes())["preprocessing"]["crop_pct"] == 0.875


@pytest.mark.parametrize("with_encoder", [False, True])
def test_a_named_encoder_is_stored_as_a_reference(pictures, tmp_path, with_encoder):
    evaluate_logreg(
        *("classes", "vit_nano8_64_ijepa", pictures, tmp_path),
        **{"cs": (1.0,), "with_encoder": with_encoder, "device": "cpu", "workers": 0},
    )
    folder, model = opened(tmp_path)
    assert (folder / "encoder").is_dir() is with_encoder
    assert model.encoder.patch_embed.img_size == (64, 64)


def test_other_classes_are_left_out_of_another_test_set(pictures, tmp_path):
    evaluate_logreg(TASK, encoder(), pictures, tmp_path, cs=(1.0,), device="cpu", workers=0)
    folder, _ = opened(tmp_path)
    other = write_pictures(tmp_path / "other", train=1, test=4, classes=5)
    result = evaluate_head(folder, other / "test", tmp_path, device="cpu", workers=0)
    assert result.images == {"test": 12}
    assert "8 of 20 images are of other classes" in " ".join(result.notes)
    for kind in range(5):
        (other / "test" / f"class{kind}").rename(other / "test" / f"other{kind}")
    with pytest.raises(DataError, match="class0"):
        evaluate_head(folder, other / "test", tmp_path, device="cpu", workers=0)
    with pytest.raises(CheckpointError, match="other"):
        evaluate_head(other, pictures, tmp_path)
