"""Code and commands of README and cookbook work as they stand, with the packaged model."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ijepa_zoo
from ijepa_zoo.cli import main

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "examples").rglob("*.md")))
}
README, COOKBOOK = PAGES["README.md"], PAGES["examples/README.md"]
SHELL = [
    re.split(r"\s#", line)[0].strip()
    for page in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", page.replace("\\\n", ""), re.DOTALL)
    for line in re.split(r"\n| && ", block)
]
COMMANDS = sorted(
    {found[1] for line in SHELL if (found := re.search(r"(?:ijepa-zoo|-m ijepa_zoo) (.*)", line))}
)
BLOCKS = re.findall(r"```python\n(.*?)```", README + COOKBOOK, re.DOTALL)


def block(word: str) -> str:
    (found,) = [text for text in BLOCKS if word in text]
    return found.replace("vit_huge14_ijepa", "vit_nano8_64_ijepa")


def command(start: str) -> list[str]:
    (found,) = [words for words in COMMANDS if words.startswith(start)]
    return shlex.split(re.sub(r"vit_huge14_ijepa(\.in1k)?", "vit_nano8_64_ijepa", found))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    photos = ROOT / "examples" / "images" / "photos"
    shutil.copy(photos / "cat.jpg", tmp_path / "photo.jpg")
    shutil.copytree(photos, tmp_path / "photos" / "cat")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_of_the_readme(folder: Path) -> None:
    names: dict = {}
    exec(block("model.encode("), names)
    assert names["tokens"].shape == (1, 64, 128)
    assert names["features"].shape == (1, 4 * 128)
    exec(block("import timm, ijepa_zoo"), names)
    assert names["model"].num_classes == 100
    assert len(names["backbone"].feature_info.channels()) == 3
    exec(block("MultiBlockMasks"), names)
    assert names["predicted"].shape[:2] == (1, 4)
    assert names["loss"].item() > 0


def test_own_weights(folder: Path) -> None:
    small = ijepa_zoo.create_ijepa("vit_small16_ijepa", pretrained=False)
    ijepa_zoo.export(small, "official", to="official")
    ijepa_zoo.export("vit_nano8_64_ijepa", "exported", to="timm")
    Path("official/ijepa-latest.pth.tar").rename("jepa-latest.pth.tar")
    custom = {"embed_dim": 512, "depth": 8, "num_heads": 8}
    encoder = ijepa_zoo.create_model("vit_base16_ijepa", pretrained=False, **custom)
    torch.save({"state_dict": encoder.state_dict()}, "run.pth.tar")
    exec(block("jepa-latest.pth.tar"), {"ijepa_zoo": ijepa_zoo})


def test_first_command_draws_the_picture(folder: Path) -> None:
    arguments = command("features examples/images/photos ")
    arguments[1] = str(ROOT / arguments[1])
    assert main([*arguments, "--workers", "0"]) == 0
    drawn, shown = (
        np.asarray(Image.open(path).convert("RGB"), dtype=float)
        for path in ("features.png", ROOT / "examples" / "features.png")
    )
    assert np.abs(drawn - shown).mean() < 8  # the committed file has a palette of 256 colors


def test_features_and_exports(folder: Path) -> None:
    assert main([*command("features photos/ "), "--workers", "0"]) == 0
    names: dict = {}
    exec(block("features.index.jsonl"), names)
    assert names["cats"].shape == (4, 4 * 128)
    exec(block("extract_features("), names)
    assert names["report"].shape == (4, 4 * 128)
    assert main(command("export vit_huge14_ijepa.in1k exported --to timm")) == 0
    assert main(command("export vit_huge14_ijepa.in1k official --to official")) == 0
    ijepa_zoo.create_model("local-dir:exported")
    ijepa_zoo.create_ijepa("vit_nano8_64_ijepa", checkpoint="official/ijepa-latest.pth.tar")


def test_pretrain(folder: Path) -> None:
    small = ("optim.duration=1 steps", "optim.warmup=0 steps", "optim.batch_size=4",
             "data.held_out=0")  # fmt: skip
    text = block("load_config").replace('"optim.duration=100 epochs"', str(small)[1:-1])
    names: dict = {}
    exec(text.replace("custom_small", "nano").replace("workers=4", "workers=0"), names)
    assert names["model"].embed_dim == 128


def test_tables_have_every_weight_and_the_measured_ratios() -> None:
    named = set(re.findall(r"`(vit_\w+_ijepa\.\w+)`", README))
    known = {n for n in ijepa_zoo.list_models(pretrained=True) if not n.endswith("_context")}
    assert known <= named
    measured = re.findall(r"\*\*([\d.]+)\*\* \(", PAGES["examples/benchmarks/README.md"])
    assert set(re.findall(r"\| \*\*([\d.]+)\*\* \|", README)) <= set(measured)


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_has_the_options_it_is_shown_with(words: str) -> None:
    from ijepa_zoo.cli import _parse

    assert callable(_parse(shlex.split(words)).run)


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page: str) -> None:
    text = PAGES[page]
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, link


@pytest.mark.parametrize(
    "line", [line for line in SHELL if re.match("(python|sbatch) .*[.]", line)]
)
def test_every_script_has_the_options_it_is_shown_with(line: str) -> None:
    script, *words = shlex.split(line.partition(" ")[2])
    path = ROOT / script if script.startswith("examples") else ROOT / "examples/benchmarks" / script
    shared = path.with_name("harness.py")  # options of all benchmarks
    text = path.read_text() + (shared.read_text() if shared.exists() else "")
    if path.suffix == ".py":
        assert all(f'"{word}"' in text for word in words if word.startswith("--")), line
