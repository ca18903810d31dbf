"""Results: files, tables, the report of several, and the state of an unfinished evaluation."""

import csv
import math
from dataclasses import replace

import pytest
import torch
from filelock import FileLock
from small_probe import OPTIONS, TASK, encoder, the_one

from ijepa_zoo.errors import DataError, RunError, SettingsError
from ijepa_zoo.eval import Result, evaluate_knn, read_result, write_report
from ijepa_zoo.eval.results import Head
from ijepa_zoo.eval.runs import EpochState

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


def test_what_is_written_is_read_and_has_one_row_in_the_table(tmp_path):
    heads = [replace(RESULT.heads[0], loss=math.nan), *RESULT.heads[1:]]
    odd = replace(RESULT, value=math.nan, heads=heads, metrics={"x": math.inf})
    found = read_result(odd.write(tmp_path / "one"))
    assert math.isnan(found.value)
    assert (found.heads[0].loss, found.metrics) == (None, {"x": None})
    replace(RESULT, value=81.0).write(tmp_path / "two")
    assert read_result(RESULT.write(tmp_path / "one")) == RESULT
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = {row["result"]: (row["value"], row["low"]) for row in csv.DictReader(file)}
    assert rows == {"two/result.json": ("81.0", "77.4"), "one/result.json": ("80.0", "77.4")}


def test_another_table_is_not_overwritten_and_costs_no_result(tmp_path):
    table, content = tmp_path / "results.csv", b"my,own,table\n1,2,\xff\n"
    table.write_bytes(content)
    with pytest.raises(DataError, match=r"results\.csv"):
        RESULT.write(tmp_path / "one")
    assert table.read_bytes() == content
    assert read_result(tmp_path / "one" / "result.json") == RESULT


@pytest.mark.parametrize("content", ["{", "[]", '{"task": 1, "value": 2}', None])
def test_a_damaged_or_missing_result_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(DataError, match=str(tmp_path)):
        write_report([tmp_path], tmp_path / "report.md")


def test_the_terminal_shows_the_chosen_head_and_what_to_compare_with():
    lines = replace(RESULT, metrics={"top-5": 99.0}, notes=["why"]).table().splitlines()
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert ["h2", "79.0", "80.0 (77.4-82.4)"] in cells
    for row in (["top-5", "99"], ["paper", "86.7"], ["raw pixels", "20.0"], ["note: why"]):
        assert row in cells


def test_the_report_groups_by_task_data_and_method_with_the_best_in_bold(tmp_path):
    best = replace(RESULT, model={**MODEL, "name": "b"}, value=85.0, paper=None)
    error = {"metric": "RMSE", "unit": "m", "higher_is_better": False, "interval": None}
    far = replace(RESULT, task="depth", **error, value=0.5, paper=None, baselines={})
    near = replace(far, model={**MODEL, "name": "b"}, value=0.25)
    cached = replace(RESULT, protocol={"features": "cached", "epochs": 50})
    for number, result in enumerate([RESULT, best, far, near, cached]):
        result.write(tmp_path / str(number))
    text = write_report([tmp_path, tmp_path / "0"], tmp_path / "new" / "report.md").read_text()
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.split("\n")]
    assert [(row[0], row[2], row[3], row[5]) for row in rows if row[0] in ("count", "depth")] == [
        ("count", "linear", "b", "**85.0** (77.4-82.4)"),
        ("count", "linear", "a", "80.0 (77.4-82.4)"),
        ("count", "linear, cached", "a", "80.0 (77.4-82.4)"),
        ("depth", "linear", "b", "**0.25**"),
        ("depth", "linear", "a", "0.5"),
    ]
    assert "| 86.7 | raw pixels 20.0, most frequent class 12.5 |" in text
    with pytest.raises(SettingsError, match=str(tmp_path)):
        write_report([tmp_path], tmp_path / "results.csv")


def test_a_folder_that_another_process_has_locked_is_named(pictures, tmp_path):
    evaluate_knn(TASK, encoder(), pictures, tmp_path, **OPTIONS)
    folder = the_one(tmp_path, "*/result.json").parent
    with FileLock(folder / ".lock"), pytest.raises(RunError, match=str(folder)):
        evaluate_knn(TASK, encoder(), pictures, tmp_path, **OPTIONS)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_state_with_a_changed_byte_or_a_cut_is_refused(tmp_path, share):
    state, content = EpochState(tmp_path / "state.pt"), {"epoch": 2, "module": torch.ones(9999)}
    assert state.load() is None
    state.save(content)
    found = state.load()
    assert (found["epoch"], found["module"].sum()) == (2, 9999)
    whole = state.path.read_bytes()
    where = int(len(whole) * share)
    for damaged in (whole[:where] + bytes([whole[where] ^ 64]) + whole[where + 1 :], whole[:where]):
        state.path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"state\.pt"):
            state.load()
    state.save({"epoch": 2})
    with pytest.raises(RunError, match="another version"):
        state.load()
