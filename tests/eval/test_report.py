"""What a report puts side by side, and what it says of it."""

import re
from dataclasses import replace

import pytest
from test_result import MODEL, RESULT

from ijepa_zoo.eval.report import markdown
from ijepa_zoo.eval.report_picture import draw, figure_class
from ijepa_zoo.eval.report_table import compare

RANDOM = {**MODEL, "name": "a, random weights", "weights_hash": "f" * 9}
PIXELS = {**MODEL, "name": "raw pixels", "weights_hash": "none"}
PLAIN = replace(RESULT, paper=None, baselines={}, interval=None)
DATA = {
    name: {"name": "photos", "fingerprint": name, "most_frequent": 12.5}
    for name in ("train", "test")
}
DEPTH = replace(
    PLAIN, task="dense depth, rendered scenes", method="dense depth", measure="RMSE", unit="m",
    higher_is_better=False, figure=0.5,
    baselines={"rmse of the mean depth map": 0.25, "delta_1 of the mean depth map": 0.9},
)  # fmt: skip


def _rows(results):
    lines = markdown(results).splitlines()
    return [line.strip("| ").split(" | ") for line in lines[2 : lines.index("")]]


@pytest.mark.parametrize(
    ("change", "mark"),
    [
        ({"protocol": {"fed": "online", "epochs": 2}}, "2 epochs"),
        ({"protocol": {"fed": "online", "epochs": 1}}, "1 epoch"),
        ({"images": {"fit": 40, "choose": 10, "test": 1000}}, "40 images to fit"),
        ({"machine": {"precision": "bfloat16"}}, "bfloat16"),
        ({"protocol": {"fed": "online", "epochs": 50, "batch_size": 8}}, "batches of 8"),
    ],
)
def test_other_settings_have_a_row_of_their_own(change, mark):
    protocol = {"fed": "online", "epochs": 50, "batch_size": 64}
    usual = replace(PLAIN, protocol=protocol, machine={"precision": "float32"})
    change = {**change, "protocol": {**protocol, **change.get("protocol", {})}}
    random = replace(usual, model=RANDOM, figure=30.0)
    later = replace(random, figure=20.0, date="2027-01-01T00:00:00+00:00", **change)
    results = [usual, random, later]
    assert _rows(results) == [
        ["a", "**80.0**"],
        ["a, random weights", "30.0"],
        [f"a, random weights ({mark})", "20.0"],
    ]
    assert "left out" not in markdown(results)


def test_cached_features_have_a_column_of_their_own():
    cached = replace(PLAIN, protocol={"fed": "cached", "epochs": 50}, figure=70.0)
    assert _rows([PLAIN, cached]) == [["a", "70.0", "80.0"]]


def test_models_stand_first_then_baselines():
    best = replace(PLAIN, model=PIXELS, figure=99.0, data=DATA)
    worse = replace(PLAIN, model={**MODEL, "name": "b"}, figure=60.0, data=DATA)
    random = replace(PLAIN, model=RANDOM, figure=90.0, data=DATA)
    rows = _rows([best, random, worse, replace(PLAIN, data=DATA)])
    assert rows == [
        ["a", "80.0"],
        ["b", "60.0"],
        ["a, random weights", "90.0"],
        ["raw pixels", "**99.0**"],
        ["most frequent class", "12.5"],
    ]


def test_baselines_stand_in_the_table_alone():
    text = markdown([replace(PLAIN, baselines={"raw pixels": 20.0}), DEPTH])
    assert "| raw pixels | 20.0 |  |" in text
    assert "| the mean depth map |  | 0.25 |" in text
    assert text.count("raw pixels") == text.count("mean depth map") == 1
    assert "| count, linear: top-1 accuracy (%) | dense depth, rendered scenes: RMSE (m)" in text


def test_bold_needs_two_and_is_explained():
    alone = markdown([replace(PLAIN, data=DATA), DEPTH])
    assert "**" not in alone
    assert "Bold: the best figure of a column" in alone
    assert "| **80.0** |" in markdown([PLAIN, replace(PLAIN, model=RANDOM, figure=1.0)])


def test_shared_notes_are_printed_once():
    first = replace(PLAIN, notes=["of all", "of the first"])
    second = replace(PLAIN, model=RANDOM, figure=1.0, notes=["of all"])
    third = replace(PLAIN, model=PIXELS, figure=2.0, notes=["of all"])
    text = markdown([first, second, third])
    for once in ("of all", "of the first", "1,000 test", "seed 0", "chosen: h2"):
        assert text.count(once) == 1
    assert "    - `a`: of the first\n" in text


def test_data_are_told_apart_by_their_names():
    other = {name: {**part, "name": "flowers", "fingerprint": "x"} for name, part in DATA.items()}
    again = {name: {**part, "fingerprint": "y"} for name, part in DATA.items()}
    columns = compare([replace(PLAIN, data=data) for data in (DATA, other)]).columns
    assert [column.split(",")[0] for column in columns] == ["count (photos)", "count (flowers)"]
    columns = compare([replace(PLAIN, data=data) for data in (DATA, other, again)]).columns
    names = [column.split(",")[0] for column in columns]
    hashed = [name for name in names if re.fullmatch(r"count \(photos [0-9a-f]{6}\)", name)]
    assert len(set(hashed)) == 2
    assert "count (flowers)" in names


def test_older_results_have_the_name_that_a_newer_one_gives_their_data():
    older = [
        {name: {"fingerprint": name} for name in DATA},
        {name: name for name in DATA},  # still older
    ]
    other = {name: {"name": "flowers", "fingerprint": "x"} for name in DATA}
    unknown = {name: {"fingerprint": "y"} for name in DATA}
    named = [replace(PLAIN, data=data) for data in (*older, DATA, other, unknown)]
    columns = compare(named).columns
    assert [column.split(",")[0] for column in columns] == [
        "count (photos)",
        "count (flowers)",
        "count (other data)",
    ]
    assert compare([*named[:2], named[3]]).columns[0].startswith("count (other data), ")


def test_the_terminal_shows_five_heads_chance_level_and_no_name_twice():
    heads = [replace(RESULT.heads[0], name=f"k{n}") for n in range(30)]
    named = {**MODEL, "weights": "target encoder of a"}
    table = replace(PLAIN, method="knn", heads=heads, chosen="k7", model=named, data=DATA).table()
    lines = table.splitlines()
    assert lines[0] == "count, knn: a (target encoder)"
    assert [line.strip("> ")[:1] for line in lines[2:7]] == ["k"] * 5
    assert lines[2].startswith("> k7")
    assert lines[7] == "  and 25 more in result.json"
    assert lines[8].startswith("test figure of the chosen setting ")
    assert lines[9].split() == ["most", "frequent", "class", "12.5"]


def test_a_panel_has_its_own_rows_and_labels_above(tmp_path):
    pytest.importorskip("matplotlib")
    figures = []

    def kind(**kwargs):
        figures.append(figure_class()(**kwargs))
        return figures[0]

    random = replace(PLAIN, model=RANDOM, figure=1.0, data=DATA)
    draw(compare([replace(PLAIN, data=DATA), random, DEPTH]), kind, tmp_path / "x.png")
    counting, depth = figures[0].axes
    assert [label.get_text() for label in counting.get_yticklabels()] == [
        "a",
        "a,\nrandom weights",
    ]
    assert [label.get_text() for label in depth.get_yticklabels()] == ["a"]
    for panel, line in ((counting, "most frequent class 12.5"), (depth, "the mean depth map 0.25")):
        (label,) = (text for text in panel.texts if text.get_text() == line)
        assert label.xyann[1] > 0
        assert label.xy[1] == 1
        assert label.get_rotation() == 0
        assert [list(drawn.get_xdata()) for drawn in panel.lines if drawn.get_linestyle() == "--"]
