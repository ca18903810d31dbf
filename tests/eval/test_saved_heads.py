"""The chosen head as a classifier folder: the same logits and accuracy, and other test sets."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_probe import OPTIONS, TASK, encoder, normalized, pixels_of, the_one, write_pictures

import ijepa_zoo
from ijepa_zoo.errors import CheckpointError, DataError
from ijepa_zoo.eval import evaluate_attentive, evaluate_head, evaluate_linear, evaluate_logreg

HEADS = {"epochs": 2, "lrs": (0.5,), "wds": (0.0,)}
PROBES = [
    (evaluate_linear, HEADS),
    (evaluate_attentive, {"cached": True, **HEADS}),
    (evaluate_logreg, {"cs": (1.0,)}),
]


def opened(out):
    folder = the_one(out, "*/model")
    return folder, ijepa_zoo.create_model(f"local-dir:{folder}").eval()


@pytest.mark.parametrize(("probe", "options"), PROBES)
def test_the_saved_classifier_has_the_accuracy_of_the_result(pictures, tmp_path, probe, options):
    result = probe(TASK, encoder(), pictures, tmp_path, **options, **OPTIONS)
    folder, model = opened(tmp_path)
    images, answers = pixels_of(pictures, "test")
    with torch.inference_mode():
        logits = model(normalized(images))
    assert json.loads((folder / "config.json").read_bytes())["chosen"] == result.chosen
    assert model.class_names == ["class0", "class1", "class2"]
    right = (logits.argmax(1) == answers).double().mean()
    assert result.value == pytest.approx(100 * float(right))
    again = evaluate_head(folder, pictures, tmp_path, **OPTIONS)
    assert (again.value, again.chosen) == (result.value, result.chosen)
    evaluate_head(folder, pictures, tmp_path, precision="bfloat16", **OPTIONS)
    tensors = {name: -tensor for name, tensor in load_file(folder / "head.safetensors").items()}
    save_file(tensors, folder / "head.safetensors")
    evaluate_head(folder, pictures, tmp_path, **OPTIONS)
    assert len(list(tmp_path.glob("*saved-head*"))) == 3  # another head has another result
    (folder / "head.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"head\.safetensors"):
        evaluate_head(folder, pictures, tmp_path)


def test_predict_has_the_transform_that_the_probe_measured(tmp_path):
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
        **{"cs": (1.0,), **OPTIONS},
    )
    folder, model = opened(tmp_path / "out")
    table = tmp_path / "table.csv"
    ijepa_zoo.predict([tmp_path / "photos" / "test"], model, table, **OPTIONS)
    rows = list(csv.DictReader(table.open()))
    right = sum(row["label"] == Path(row["path"]).parent.name for row in rows)
    assert result.value == pytest.approx(100 * right / 45)
    config = ijepa_zoo.create_transform(model)
    assert "73" in repr(config)
    assert json.loads((folder / "config.json").read_bytes())["preprocessing"]["crop_pct"] == 0.875


@pytest.mark.parametrize("with_encoder", [False, True])
def test_a_named_encoder_is_saved_as_a_reference(pictures, tmp_path, with_encoder):
    options = {"cs": (1.0,), "with_encoder": with_encoder, **OPTIONS}
    evaluate_logreg("classes", "vit_nano8_64_ijepa", pictures, tmp_path, **options)
    folder, model = opened(tmp_path)
    assert (folder / "encoder").is_dir() is with_encoder
    assert model.encoder.patch_embed.img_size == (64, 64)


def test_other_classes_are_left_out_of_another_test_set(pictures, tmp_path):
    evaluate_logreg(TASK, encoder(), pictures, tmp_path, cs=(1.0,), **OPTIONS)
    folder, _ = opened(tmp_path)
    other = write_pictures(tmp_path / "other", train=1, test=4, classes=5)
    result = evaluate_head(folder, other / "test", tmp_path, **OPTIONS)
    assert result.images == {"test": 12}
    assert "8 of 20" in " ".join(result.notes)
    for kind in range(5):
        (other / "test" / f"class{kind}").rename(other / "test" / f"other{kind}")
    with pytest.raises(DataError, match="class0"):
        evaluate_head(folder, other / "test", tmp_path, **OPTIONS)
    with pytest.raises(CheckpointError, match="other"):
        evaluate_head(other, pictures, tmp_path)
