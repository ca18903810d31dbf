"""What results record, and the tables that are made of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ijepa_zoo.bench import BenchResult, DisagreementError
from ijepa_zoo.bench.result import agreed
from ijepa_zoo.bench.tables import fill, newest
from ijepa_zoo.bench.timing import Summary

ROOT = Path(__file__).parents[2]


def result(median=0.5, day="2026-01-02", model="vit_a", **settings):
    seconds = Summary(median, (median, median), (median, median), 3).as_json()
    ratio = Summary(1.25, (1.2, 1.3), (1.1, 1.4), 3).as_json()
    return BenchResult(
        "train",
        {"model": model, "compile": True, "vs": ("published",), "img_size": None, **settings},
        {
            "ijepa_zoo": {"seconds": seconds, "images_per_second": 16 / median},
            "published": {"seconds": seconds, "images_per_second": 16 / median},
        },
        {"published": ratio},
        {"published": agreed("losses", 1e-7, 1e-5)},
        machine={"cpu": "a CPU", "threads": 2},
        versions={"torch": "2.15"},
        date=day,
    )


def test_command_repeats_the_settings_and_tells_no_place():
    found = result(published_path=Path("/home/somebody/ijepa"), ranks=(1, 2), data=None)
    assert found.command == (
        "ijepa-zoo bench train --model vit_a --compile --vs published --published-path ijepa "
        "--ranks 1 2"
    )
    assert "somebody" not in json.dumps(found.as_json()) + str(found)


def test_file_holds_everything(tmp_path):
    found = result(published_path=Path("x/ijepa"))
    assert found.save(tmp_path).name == "bench-train-2026-01-02.json"
    content = json.loads(found.save(tmp_path / "own.json").read_text())
    assert content == json.loads(json.dumps(found.as_json()))
    assert content["settings"]["published_path"] == "ijepa"
    assert content["ratios"]["published"]["range"] == [1.1, 1.4]
    assert content["agreement"]["published"] == {
        "what": "losses", "difference": 1e-7, "tolerance": 1e-5,
    }  # fmt: skip


def test_text_names_ratio_and_agreement():
    text = str(result())
    assert "published takes 1.25 times as long as ijepa_zoo (1.1 to 1.4, 3 pairs)" in text
    assert "published agrees: losses differ by 1.0e-07 (at most 1.0e-05)" in text
    assert "500 ms" in text
    assert "32 images/s" in text


def test_text_warns_of_ratios_that_say_little():
    def line(low, high, pairs):
        ratio = Summary(1.25, (1.2, 1.3), (low, high), pairs).as_json()
        return str(replace(result(), ratios={"published": ratio})).splitlines()[-1]

    assert line(1.1, 1.4, 5).endswith("5 pairs)")
    assert line(1.1, 1.4, 4).endswith("4 pairs): few pairs")
    assert line(0.9, 1.4, 9).endswith("9 pairs): no clear difference")
    assert line(0.9, 1.4, 3).endswith("3 pairs): no clear difference, few pairs")


def test_header_says_what_auto_became():
    found = replace(result(device="auto"), resolved={"device": "cpu"})
    assert str(found).splitlines()[0].endswith("device cpu")
    assert "--device auto" in found.command
    assert str(found).splitlines()[1] == "on a CPU, 2 CPU threads"
    one = replace(found, machine={"cpu": "a CPU", "threads": 1})
    assert str(one).splitlines()[1] == "on a CPU, 1 CPU thread"


@pytest.mark.parametrize("difference", [2e-5, float("nan")])
def test_disagreement_is_an_error(difference):
    with pytest.raises(DisagreementError, match=r"losses differ by .*their times say nothing"):
        agreed("losses", difference, 1e-5)


def test_table_is_made_of_the_newest_results(tmp_path):
    result(0.9, "2026-01-01").save(tmp_path / "z.json")
    longer = result(0.5, "2026-01-02")
    replace(longer, settings={**longer.settings, "seconds": 300}).save(tmp_path / "a.json")
    result(0.7, "2025-12-31", model="vit_b").save(tmp_path / "b.json")
    (tmp_path / "other.json").write_text('{"date": "2026"}')
    assert [found["date"] for found in newest(tmp_path)] == ["2026-01-02", "2025-12-31"]
    text = "before\n<!-- bench:train -->\nold\n<!-- /bench -->\nafter\n"
    filled = fill(text, tmp_path)
    assert filled.startswith("before\n<!-- bench:train -->\n|")
    assert filled.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in filled
    row = "| vit_a, compile True | 500 ms, 32 images/s | published 500 ms, 32 images/s | **1.25** "
    assert f"{row}(1.1 to 1.4, 3 pairs) |" in filled
    assert "900 ms" not in filled
    assert "a CPU, threads: 2, torch 2.15, 2026-01-02" in filled
    assert "`ijepa-zoo bench train`, with the options that each result names" in filled
    assert fill(filled, tmp_path) == filled


def test_features_have_a_column_for_their_start(tmp_path):
    found = result()
    figures = {
        name: {**row, "start_seconds": 0.25 if name == "published" else 0.125}
        for name, row in found.results.items()
    }
    replace(found, bench="features", results=figures).save(tmp_path / "a.json")
    filled = fill("<!-- bench:features -->\n<!-- /bench -->", tmp_path)
    assert "(1.1 to 1.4, 3 pairs) | 125 ms, 250 ms |" in filled


def test_table_without_a_result_is_an_error(tmp_path):
    result().save(tmp_path / "a.json")
    with pytest.raises(ValueError, match="no result of `bench load`, only of train"):
        fill("<!-- bench:load -->\n<!-- /bench -->", tmp_path)
    for text in ("<!-- bench:train -->\n", "<!-- bench:train-x -->\n<!-- /bench -->"):
        with pytest.raises(ValueError, match=r"1 lines .*, but 0 tables"):
            fill(text, tmp_path)
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json is damaged"):
        newest(tmp_path)


@pytest.mark.parametrize("name", ["README.md", "examples/benchmarks/NOTES.md"])
def test_texts_are_what_the_results_make_them(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- bench:" in text
    assert fill(text, ROOT / "examples" / "benchmarks" / "results") == text
