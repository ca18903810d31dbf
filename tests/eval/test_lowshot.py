import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_zoo.errors import DataError
from ijepa_zoo.eval.lowshot import evaluate_lowshot, listed_rows
from ijepa_zoo.eval.models import Subject
from ijepa_zoo.eval.sets import open_task
from ijepa_zoo.eval.tasks import find_task
from ijepa_zoo.models.factory import create_model

CLASSES = {"n01": (200, 60, 60), "n02": (60, 200, 60), "n03": (60, 60, 200)}


@pytest.fixture
def folder(tmp_path):
    """Class folders in ImageNet's layout; one in five training images is of another class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 8)):
        for name, colour in CLASSES.items():
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for n in range(count):
                other = split == "train" and n % 5 == 4
                mean = np.array((128, 128, 128) if other else colour)
                pixels = np.clip(mean + rng.normal(0, 40, (32, 32, 3)), 0, 255)
                file = place / (f"{name}_{n}.png" if split == "train" else f"{n}.png")
                Image.fromarray(pixels.astype(np.uint8)).save(file)
    return tmp_path / "data"


@pytest.fixture
def subject():
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 4, "num_heads": 2, "img_size": 32}
    return Subject(create_model("vit_nano8_64_ijepa", pretrained=False, **sizes), "small")


def _list(tmp_path, lines):
    path = tmp_path / "list.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def _names(each=6, classes=CLASSES):
    return [f"{name}_{n}.png" for name in classes for n in range(each)]


def _train(folder):
    return open_task(find_task("classes"), folder, 0)[0]


def test_a_list_names_images_with_or_without_their_folders(folder, tmp_path):
    train = _train(folder)
    rows = listed_rows(train, _list(tmp_path, ["n02_3.png", "", "n01_0.png ", "n02_3.png"]))
    assert [train.images.name(row).split("/")[-1] for row in rows] == ["n01_0.png", "n02_3.png"]
    assert list(rows) == list(listed_rows(train, _list(tmp_path, ["n01/n01_0.png", "n02_3.png"])))


def test_lists_that_do_not_fit_are_refused(folder, tmp_path):
    train = _train(folder)
    with pytest.raises(DataError, match=r"2 of the 3 images .* n01_99\.png, n02/n01_0\.png; those"):
        listed_rows(train, _list(tmp_path, ["n01_1.png", "n01_99.png", "n02/n01_0.png"]))
    with pytest.raises(DataError, match="is empty"):
        listed_rows(train, _list(tmp_path, ["", " "]))
    with pytest.raises(DataError, match="cannot be read"):
        listed_rows(train, tmp_path / "nothing.txt")
    tested = open_task(find_task("classes"), folder, 0)[1]
    with pytest.raises(DataError, match=r"mean several images \(3\.png: .*CLASS/NAME"):
        listed_rows(tested, _list(tmp_path, ["3.png"]))
    assert len(listed_rows(tested, _list(tmp_path, ["n02/3.png"]))) == 1


def test_regression_sees_the_listed_images_alone(folder, tmp_path, subject):
    """The same again with scikit-learn, from features by timm."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    files = _list(tmp_path, _names())
    result = evaluate_lowshot("classes", subject, folder, files, tmp_path / "out", workers=0)
    assert result.images == {"fit": 16, "choose": 2, "test": 24}
    assert len(result.heads) == 16
    assert result.interval[0] < result.figure < 100.1
    assert "18 of 60 training images, 6 of a class" in " ".join(result.notes)

    def features(paths):
        cfg = subject.model.pretrained_cfg
        pixels = np.stack([np.array(Image.open(path).resize((36, 36), 3)) for path in paths])
        x = torch.from_numpy(pixels[:, 2:34, 2:34]).permute(0, 3, 1, 2) / 255
        x = (x - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)
        n = 1 if result.chosen.startswith("last ") else 4
        with torch.no_grad():
            maps = subject.model.get_intermediate_layers(x, n=n, norm=True)
        return torch.cat([tokens.mean(1) for tokens in maps], dim=1).numpy()

    train = [folder / "train" / name.split("_")[0] / name for name in _names()]
    test = [folder / "val" / name / f"{n}.png" for name in CLASSES for n in range(8)]
    x, labels = features(train), [path.parent.name for path in train]
    mean, scale = x.mean(0), x.std(0)
    l2 = float(result.chosen.split("l2=")[1])
    other = linear_model.LogisticRegression(C=1 / (18 * l2), max_iter=10000, tol=1e-8)
    other.fit((x - mean) / scale, labels)
    accuracy = other.score((features(test) - mean) / scale, [path.parent.name for path in test])
    assert result.figure == pytest.approx(100 * accuracy, abs=100 / 24 + 1e-6)


def test_fine_tuning_takes_the_recipe_for_few_labels(folder, tmp_path, subject):
    files = _list(tmp_path, _names(4))
    result = evaluate_lowshot(
        "classes", subject, folder, files, tmp_path / "out",
        finetune=True, epochs=2, batch_size=6, workers=0, device="cpu",
    )  # fmt: skip
    assert result.method == "lowshot-finetune"
    assert result.images == {"fit": 12, "test": 24}
    protocol = result.protocol
    assert (protocol["weight_decay"], protocol["mixup"], protocol["warmup_epochs"]) == (
        0.05,
        0,
        0.2,
    )
    assert protocol["lr"] == pytest.approx(3e-5 * 6 / 512)
    assert protocol["batch_size"] == 6


def test_classes_without_a_listed_image_are_told(folder, tmp_path, subject):
    files = _list(tmp_path, _names(6, ["n01", "n03"]))
    result = evaluate_lowshot("classes", subject, folder, files, tmp_path / "out", workers=0)
    assert "1 of 3 classes have no listed image" in " ".join(result.notes)
    assert result.figure <= 100 * 16 / 24
    with pytest.raises(DataError, match="all of one class"):
        evaluate_lowshot(
            "classes", subject, folder, _list(tmp_path, _names(6, ["n01"])), tmp_path / "out"
        )


def test_arguments_of_fine_tuning_need_it(folder, tmp_path, subject):
    files = _list(tmp_path, _names())
    for given, words in (
        ({"epochs": 3, "micro": 2}, r"epochs \(--epochs\), micro \(--micro\): for"),
        ({"grad_checkpointing": True}, r"^grad_checkpointing \(--grad-checkpointing\): for"),
    ):
        with pytest.raises(ValueError, match=rf"{words} fine-tuning alone, use finetune \(--fine"):
            evaluate_lowshot("classes", subject, folder, files, tmp_path, **given)


def test_one_image_of_a_class_is_enough_to_fine_tune_and_not_to_choose(folder, tmp_path, subject):
    files = _list(tmp_path, _names(1))
    common = "classes", subject, folder, files, tmp_path / "out"
    with pytest.raises(DataError, match=r"names 3 images, too few to choose a penalty by"):
        evaluate_lowshot(*common, workers=0)
    result = evaluate_lowshot(*common, finetune=True, epochs=1, workers=0, device="cpu")
    assert result.data["train"]["images"] == 3
    assert result.notes[0] == "1 epoch in the place of the recipe's 50"
