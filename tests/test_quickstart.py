"""The notebook runs offline, and finds what its text says."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cells = json.loads(Path("quickstart.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells)
    names: dict = {}
    for source in code:
        exec(source, names)
    photos = range(4)  # the others are rendered scenes
    assert all((neighbor in photos) == (i in photos) for i, neighbor in enumerate(names["nearest"]))
    assert names["picture"].size == (400, 808)
    assert names["accuracy"] > names["most_frequent"] + 0.15
