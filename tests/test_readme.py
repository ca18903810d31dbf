"""README's Python runs as it stands, with the packaged model instead of the large one."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import ijepa_zoo
from ijepa_zoo.cli import main

ROOT = Path(__file__).parent.parent
COMMANDS = re.findall(r"^ijepa-zoo (.*?)(?: +#.*)?$", (ROOT / "README.md").read_text(), re.M)
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def block(word: str) -> str:
    (found,) = [text for text in BLOCKS if word in text]
    return found.replace("vit_huge14_ijepa", "vit_nano8_64_ijepa")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    photos = ROOT / "examples" / "images" / "photos"
    shutil.copy(photos / "cat.jpg", tmp_path / "photo.jpg")
    shutil.copytree(photos, tmp_path / "photos" / "cat")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_use(folder: Path) -> None:
    names: dict[str, object] = {}
    exec(block("FeatureExtractor("), names)
    assert list(names["tokens"].shape) == [1, 64, 128]
    assert list(names["features"].shape) == [1, 4 * 128]
    exec(block("import timm, ijepa_zoo"), names)
    assert names["model"].num_classes == 100
    assert len(names["backbone"].feature_info.channels()) == 3
    exec(block("MultiBlockMasks"), names)
    assert names["predicted"].shape[:2] == (1, 4)
    assert names["loss"].item() > 0


def test_features_and_back(folder: Path) -> None:
    command = re.search(r"^ijepa-zoo (features photos/.*)$", (ROOT / "README.md").read_text(), re.M)
    assert command is not None
    arguments = command[1].replace("vit_huge14_ijepa", "vit_nano8_64_ijepa").split()
    assert main([*arguments, "--workers", "0"]) == 0
    names: dict[str, object] = {}
    exec(block("features.index.jsonl"), names)
    assert list(names["cats"].shape) == [4, 4 * 128]


def test_export_to_other_libraries(folder: Path) -> None:
    commands = [words for words in COMMANDS if re.match("export .* --to (timm|official)", words)]
    assert len(commands) == 2
    for words in commands:
        assert main(words.replace("vit_huge14_ijepa.in1k", "vit_nano8_64_ijepa").split()) == 0
    ijepa_zoo.create_model("local-dir:exported")
    ijepa_zoo.create_ijepa("vit_nano8_64_ijepa", checkpoint="official/ijepa-latest.pth.tar")


def test_names_in_the_table_are_those_of_the_catalogue() -> None:
    named = set(re.findall(r"`(vit_\w+_ijepa\.\w+)`", (ROOT / "README.md").read_text()))
    known = {n for n in ijepa_zoo.list_models(pretrained=True) if not n.endswith("_context")}
    assert known <= named


def test_pretrain(folder: Path) -> None:
    small = ("optim.duration=1 steps", "optim.warmup=0 steps", "optim.batch_size=4")
    text = block("load_config").replace('"optim.duration=100 epochs"', str(small)[1:-1])
    names: dict[str, object] = {"ijepa_zoo": ijepa_zoo}
    exec(text.replace("custom_small", "nano_scenes").replace("workers=4", "workers=0"), names)
    assert names["model"].embed_dim == 128


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_options_it_is_shown_with(command: str) -> None:
    from ijepa_zoo.cli import _parse

    assert callable(_parse(shlex.split(command)).run)
