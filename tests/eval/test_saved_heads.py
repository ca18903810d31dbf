"""The chosen head as a classifier folder: the same logits and accuracy, and other test sets."""

import json

import pytest
import torch
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
