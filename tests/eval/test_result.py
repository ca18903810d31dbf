"""Results: intervals, files, tables and the report of several."""

import csv
import json
import math
from dataclasses import replace

import pytest

from ijepa_zoo.distributed import Distributed
from ijepa_zoo.errors import DataError
from ijepa_zoo.eval.intervals import wilson_interval
from ijepa_zoo.eval.report import markdown, write_report
from ijepa_zoo.eval.result import Head, Result
from ijepa_zoo.eval.result_files import find_results, read_result
from ijepa_zoo.eval.runs import once

MODEL = {"name": "a", "architecture": "vit", "weights": "w", "weights_hash": "abcdef012"}
RESULT = Result(
    task="count",
    method="linear",
    model=MODEL,
    figure=80.0,
    chosen="h2",
    selection="a seeded 10 % of the training images",
    heads=[Head("h1", 50.0, None, 1.5), Head("h2", 79.0, 80.0, 0.5), Head("h3", 60.0, None, 0.7)],
    protocol={"fed": "online", "epochs": 50},
    data={},
    images={"fit": 90, "choose": 10, "test": 1000},
    seed=0,
    interval=(77.4, 82.4),
    paper=86.7,
    baselines={"raw pixels": 20.0},
    date="2026-01-01T00:00:00+00:00",
)


@pytest.mark.parametrize(
    ("right", "total"), [(0, 10), (10, 10), (1, 3), (867, 1000), (7500, 15000)]
)
def test_interval_holds_the_shares_that_the_answers_do_not_reject(right, total):
    """The ends solve (p - share)^2 = z^2 p (1 - p) / n, found here by bisection."""
    share, z = right / total, 1.959963984540054

    def rejected(p):
        return (p - share) ** 2 > z * z * p * (1 - p) / total

    def end(outside, inside):
        for _ in range(200):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if rejected(middle) else (outside, middle)
        return 100 * inside

    low, high = wilson_interval(right, total)
    inside = min(max(share, 1e-9), 1 - 1e-9)
    assert low == pytest.approx(0 if right == 0 else end(0, inside), abs=1e-6)
    assert high == pytest.approx(100 if right == total else end(1, inside), abs=1e-6)


@pytest.mark.parametrize(("right", "total"), [(2, 1), (-1, 3), (0, 0)])
def test_interval_of_impossible_counts_is_refused(right, total):
    with pytest.raises(ValueError, match="0 <= right <= total"):
        wilson_interval(right, total)


def test_a_result_comes_back_as_it_was_written(tmp_path):
    path = RESULT.write(tmp_path / "one")
    assert read_result(path) == RESULT
    assert find_results([tmp_path, path]) == [(path.resolve(), RESULT)]


def test_numbers_that_json_has_not_become_null(tmp_path):
    diverged = replace(RESULT, heads=[Head("h2", 79.0, 80.0, math.nan)])
    path = diverged.write(tmp_path / "one")
    assert json.loads(path.read_text())["heads"][0]["loss"] is None


def test_the_table_has_one_row_for_each_folder(tmp_path):
    RESULT.write(tmp_path / "one")
    replace(RESULT, figure=81.0).write(tmp_path / "two")
    replace(RESULT, figure=82.0).write(tmp_path / "one")
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["result"], row["figure"]) for row in rows] == [
        ("two/result.json", "81.0"),
        ("one/result.json", "82.0"),
    ]
    assert rows[0]["paper"] == "86.7"
    assert rows[0]["low"] == "77.4"


def test_a_strange_table_is_left_alone(tmp_path):
    (tmp_path / "results.csv").write_text("my,own,table\n1,2,3\n")
    with pytest.raises(DataError, match="move it away"):
        RESULT.write(tmp_path / "one")
    assert (tmp_path / "results.csv").read_text() == "my,own,table\n1,2,3\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "is damaged"), ("[]", "is no result"), ('{"task": 1, "figure": 2}', "is no result"),
     ('{"task": 1, "figure": 2, "heads": []}', "is no whole result")],
)  # fmt: skip
def test_a_damaged_result_is_named(tmp_path, content, words):
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(DataError, match=words) as found:
        find_results([tmp_path])
    assert str(path) in str(found.value)


def test_places_without_results_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no result\.json"):
        find_results([tmp_path])
    with pytest.raises(DataError, match="does not exist"):
        find_results([tmp_path / "nowhere"])


def test_the_terminal_shows_the_chosen_head_first_and_the_paper(tmp_path):
    lines = RESULT.table().splitlines()
    assert lines[2].split() == [">", "h2", "79.0", "80.0"]
    assert [line.split()[0] for line in lines[3:5]] == ["h3", "h1"]
    text = RESULT.table()
    assert "80.0  [77.4, 82.4]" in text
    assert "86.7" in next(line for line in lines if "paper" in line)
    assert "20.0" in next(line for line in lines if "raw pixels" in line)
    assert "10 % of the training images" in text


def test_report_compares_models_and_marks_the_best():
    other = replace(
        RESULT, model={**MODEL, "name": "b", "weights_hash": "1"}, figure=85.0, paper=None
    )
    older = replace(RESULT, figure=10.0, date="2025-01-01T00:00:00+00:00")
    depth = {"task": "depth", "measure": "RMSE", "unit": "m", "higher_is_better": False}
    far = replace(RESULT, **depth, figure=0.5, interval=None, paper=None)
    near = replace(other, **depth, figure=0.25, interval=None)
    head, _, *rows = markdown([RESULT, other, older, far, near]).splitlines()
    assert head.split(" | ")[1:] == [
        "count, linear: top-1 accuracy (%)",
        "depth, linear: RMSE (m), lower is better |",
    ]
    assert rows[0] == "| b | **85.0** (77.4-82.4) | **0.25** |"
    assert rows[1] == "| a | 80.0 (77.4-82.4), paper 86.7 | 0.5 |"


def test_report_tells_apart_weights_of_one_name():
    other = replace(RESULT, model={**MODEL, "weights_hash": "999999999"}, figure=70.0)
    rows = markdown([RESULT, other]).splitlines()[2:4]
    assert rows[0].startswith("| a (abcdef) | **80.0**")
    assert rows[1].startswith("| a (999999) | 70.0")


def test_report_tells_apart_image_sizes_of_one_model():
    models = [{**MODEL, "image_size": [size, size]} for size in (64, 96)]
    small, large = (replace(RESULT, model=model) for model in models)
    old = replace(RESULT, model={**models[1], "weights_hash": "999999999"}, figure=1.0)
    text = markdown([small, replace(large, figure=90.0), old])
    names = [row.split(" | ")[0] for row in text.splitlines()[2:5]]
    assert names == ["| a (96 x 96 px, abcdef)", "| a (64 x 64 px)", "| a (96 x 96 px, 999999)"]
    assert "| a |" in markdown([small, replace(small, task="depth")])


def test_lower_is_better_is_said_and_marked():
    depth = {"measure": "RMSE", "unit": "m", "higher_is_better": False, "interval": None}
    near, far = (replace(RESULT, **depth, model={**MODEL, "name": n}, figure=f, paper=None)
                 for n, f in (("near", 0.25), ("far", 0.5)))  # fmt: skip
    rows = markdown([far, near]).splitlines()
    assert "RMSE (m), lower is better" in rows[0]
    assert rows[2:4] == ["| near | **0.25** |", "| far | 0.5 |"]
    assert "RMSE (m), lower is better" in near.table()
    assert "lower is better" not in RESULT.table()


def test_report_writes_table_and_picture(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    RESULT.write(tmp_path / "runs" / "one")
    replace(RESULT, task="depth", figure=60.0).write(tmp_path / "runs" / "two")
    table, picture = write_report([tmp_path / "runs"], tmp_path / "new" / "report.md")
    assert table.read_text().startswith("| model |")
    with image.open(picture) as drawn:
        assert drawn.width > 500
        assert len(drawn.convert("RGB").getcolors(1 << 24)) > 20
    assert write_report([tmp_path / "runs"], table, picture=False) == (table, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"figure": None}, "the figure is None, not a number"),
        ({"figure": "80"}, "the figure is '80'"),
        ({"model": {"name": 3}}, "the model's name is no text"),
        ({"model": []}, "model is no table"),
        ({"heads": [{"name": "h", "test": "x"}]}, "the figures of head 'h' are no numbers"),
        ({"heads": 3}, "is no whole result"),
        ({"interval": [1]}, "the interval"),
        ({"interval": 4}, "is no whole result"),
        ({"others": [1]}, "is no whole result"),
        ({"images": {"test": "many"}}, "images are no whole numbers"),
        ({"notes": 1}, "notes are no texts"),
        ({"date": None}, "date is no text"),
    ],
)
def test_a_result_of_wrong_types_is_named(tmp_path, change, words):
    path = RESULT.write(tmp_path / "one")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=words) as found:
        read_result(path)
    assert str(path) in str(found.value)


def test_further_figures_that_are_not_finite_do_not_spoil_a_result(tmp_path):
    path = replace(RESULT, others={"x": math.inf}).write(tmp_path / "one")
    assert math.isnan(read_result(path).others["x"])


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"my,own\n1,2\n", b"", b"extra cells"])
def test_a_table_that_is_refused_costs_no_result(tmp_path, content):
    table = tmp_path / "results.csv"
    if content == b"extra cells":
        RESULT.write(tmp_path / "other")
        content = table.read_bytes() + b"," * 40 + b"\n"
    table.write_bytes(content)
    with pytest.raises(DataError, match="move it away") as found:
        RESULT.write(tmp_path / "one")
    assert str(table) in str(found.value)
    assert table.read_bytes() == content
    assert read_result(tmp_path / "one" / "result.json") == RESULT


def test_report_has_a_column_for_each_data_set():
    data = [{"train": {"fingerprint": a}, "test": {"fingerprint": "t"}} for a in "ab"]
    small, large = (replace(RESULT, data=part) for part in data)
    older = replace(small, figure=10.0, date="2025-01-01T00:00:00+00:00")
    tuned = replace(small, method="finetune", data={"train": "a", "test": "t"})
    text = markdown([small, replace(large, figure=90.0), older, tuned])
    head, _, row = text.splitlines()[:3]
    columns = [name.split(",")[0] for name in head.strip("| ").split(" | ")[1:]]
    assert len(columns) == 3
    assert len(set(columns)) == 2
    assert all(name.startswith("count (data ") for name in columns)
    assert "**80.0**" in row
    assert "**90.0**" in row
    assert "1 result is left out: for each there is a newer one of the same model" in text
    assert "left out" not in markdown([small, large])
    assert "(data" not in markdown([small])


def test_report_refuses_a_folder_and_a_picture_to_write(tmp_path):
    RESULT.write(tmp_path / "one")
    for out in (tmp_path, tmp_path / "report.PNG"):
        with pytest.raises(ValueError, match=r"name the Markdown file.*report\.md"):
            write_report([tmp_path], out, picture=False)


def test_the_row_that_a_strange_table_kept_out_comes_when_it_is_gone(tmp_path):
    table, alone = tmp_path / "results.csv", Distributed()

    def done():
        return once(tmp_path / "one", alone, "float32", lambda: RESULT)

    table.write_text("my,own\n1,2\n")
    for _ in range(2):
        with pytest.raises(DataError, match="move it away"):
            done()
    table.unlink()
    done()
    (row,) = csv.DictReader(table.open())
    assert float(row["figure"]) == RESULT.figure
    replace(RESULT, figure=1.0).write(tmp_path / "two")
    before = table.read_bytes()
    done()
    assert table.read_bytes() == before
