"""Results: files, tables, and the report of several."""

import csv
import json
import math
from dataclasses import replace

import pytest

from ijepa_zoo.errors import DataError, SettingsError
from ijepa_zoo.eval.results import (
    Head,
    Result,
    find_results,
    markdown,
    read_result,
    wilson_interval,
    write_report,
)

MODEL = {"name": "a", "architecture": "vit", "weights": "w", "weights_hash": "abcdef012"}
RESULT = Result(
    task="count",
    method="linear",
    model=MODEL,
    value=80.0,
    chosen="h2",
    selection="a seeded 10 % of the training images",
    heads=[Head("h1", 50.0, None, 1.5), Head("h2", 79.0, 80.0, 0.5), Head("h3", 60.0, None, 0.7)],
    protocol={"features": "online", "epochs": 50},
    data={"train": {"name": "photos"}, "test": {"fingerprint": "f" * 9, "most_frequent": 12.5}},
    images={"train": 90, "val": 10, "test": 1000},
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


def test_a_result_comes_back_as_it_was_written(tmp_path):
    path = RESULT.write(tmp_path / "one")
    assert read_result(path) == RESULT
    assert find_results([tmp_path, path]) == [RESULT]


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    heads = [Head("h2", 79.0, 80.0, math.nan)]
    path = replace(RESULT, heads=heads, metrics={"x": math.inf}).write(tmp_path / "one")
    assert json.loads(path.read_text())["heads"][0]["loss"] is None
    assert read_result(path).metrics == {"x": None}


def test_results_csv_has_one_row_for_each_folder(tmp_path):
    RESULT.write(tmp_path / "one")
    replace(RESULT, value=81.0).write(tmp_path / "two")
    replace(RESULT, value=82.0).write(tmp_path / "one")
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["result"], row["value"]) for row in rows] == [
        ("two/result.json", "81.0"),
        ("one/result.json", "82.0"),
    ]
    assert (rows[0]["paper"], rows[0]["low"]) == ("86.7", "77.4")


@pytest.mark.parametrize("content", [b"my,own,table\n1,2,3\n", b"\xff\xfe\x00"])
def test_another_table_in_the_way_is_left_alone_and_costs_no_result(tmp_path, content):
    table = tmp_path / "results.csv"
    table.write_bytes(content)
    with pytest.raises(DataError, match=r"results\.csv"):
        RESULT.write(tmp_path / "one")
    assert table.read_bytes() == content
    assert read_result(tmp_path / "one" / "result.json") == RESULT


@pytest.mark.parametrize("content", ["{", "[]", '{"task": 1, "value": 2}', '{"heads": [], "x": 1}'])
def test_a_damaged_result_is_named(tmp_path, content):
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"result\.json"):
        find_results([tmp_path])


def test_places_without_results_are_named(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=str(place)):
            find_results([place])


def test_the_terminal_shows_the_best_heads_and_what_to_compare_with():
    heads = [Head(f"k{n}", float(n)) for n in range(30)]
    lines = replace(RESULT, heads=heads, chosen="k7", metrics={"top-5": 99.0}).table().splitlines()
    assert [line.split()[-2] for line in lines[2:7]] == ["k7", "k29", "k28", "k27", "k26"]
    assert lines[2].startswith("> k7")
    assert "25 more" in lines[7]
    values = {line.split("  ")[0].strip(): line.split("  ")[-1].strip() for line in lines[8:13]}
    assert values["chosen head"] == "80.0 (77.4-82.4)"
    assert values["paper"] == "86.7"
    assert values["raw pixels"] == "20.0"
    assert values["most frequent class"] == "12.5"


def test_the_report_groups_by_task_data_and_method_with_the_best_in_bold(tmp_path):
    best = replace(RESULT, model={**MODEL, "name": "b"}, value=85.0, paper=None, notes=["a note"])
    error = {"metric": "RMSE", "unit": "m", "higher_is_better": False, "interval": None}
    far = replace(RESULT, task="depth", **error, value=0.5, paper=None, baselines={})
    near = replace(far, model={**MODEL, "name": "b"}, value=0.25)
    cached = replace(RESULT, protocol={"features": "cached", "epochs": 50})
    for number, result in enumerate([RESULT, best, far, near, cached]):
        result.write(tmp_path / str(number))
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in write_report([tmp_path], tmp_path / "new" / "report.md").read_text().split("\n")
        if line.startswith("| count") or line.startswith("| depth")
    ]
    assert [(row[0], row[2], row[3], row[5]) for row in rows] == [
        ("count", "linear", "b", "**85.0** (77.4-82.4) [1]"),
        ("count", "linear", "a", "80.0 (77.4-82.4)"),
        ("count", "linear", "raw pixels", "20.0"),
        ("count", "linear", "most frequent class", "12.5"),
        ("count", "linear, cached", "a", "80.0 (77.4-82.4)"),
        ("count", "linear, cached", "raw pixels", "20.0"),
        ("count", "linear, cached", "most frequent class", "12.5"),
        ("depth", "linear", "b", "**0.25**"),
        ("depth", "linear", "a", "0.5"),
    ]
    assert rows[1][6] == "86.7"
    assert "- [1] a note" in markdown([best])


def test_the_report_overwrites_no_result(tmp_path):
    RESULT.write(tmp_path / "one")
    for out in (tmp_path, tmp_path / "results.csv", tmp_path / "one" / "result.json"):
        with pytest.raises(SettingsError, match=str(out)):
            write_report([tmp_path], out)
    assert find_results([tmp_path]) == [RESULT]
