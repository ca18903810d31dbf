"""`ijepa-zoo bench`: the words of the command line are those of Python."""

import argparse
import inspect
import json

import pytest

from ijepa_zoo import bench
from ijepa_zoo.bench import loading, timing
from ijepa_zoo.cli.bench import _LEAST_ROUNDS, add_bench
from ijepa_zoo.cli.status import DONE, INTERRUPTED, USAGE

KINDS = ("train", "scaling", "features", "load", "masks", "data", "checkpoint", "eval")


def parse(*words):
    parser = argparse.ArgumentParser()
    add_bench(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("kind", KINDS)
def test_words_and_defaults_are_those_of_python(kind):
    given = vars(parse(kind))
    python = inspect.signature(getattr(bench, kind)).parameters
    assert given.keys() - {"bench", "run", "out", "quiet"} == python.keys() - {"progress"}
    for name, parameter in python.items():
        if name != "progress":
            assert given[name] == parameter.default, name


def test_result_is_printed_and_written(tmp_path, capsys):
    file = tmp_path / "masks.json"
    args = parse("masks", "--batch-size", "2", "--seconds", "0.05", "--out", str(file), "--quiet")
    assert args.run(args) == DONE
    out = capsys.readouterr().out
    assert "ijepa_zoo" in out
    assert f"written: {file}" in out
    assert json.loads(file.read_text())["settings"]["batch_size"] == 2


def test_wrong_use_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = parse("masks", "--vs", "published")
    assert args.run(args) == USAGE
    assert "--published-path ijepa" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        parse("train", "--vs", "timm")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rounds", "2"), "argument --rounds: must be at least 3"),
        (("--seconds", "0"), "argument --seconds: must be more than 0"),
    ],
)
def test_numbers_are_refused_at_once(words, message, capsys):
    with pytest.raises(SystemExit):
        parse("masks", *words)
    assert message in capsys.readouterr().err
    assert _LEAST_ROUNDS == timing._LEAST_ROUNDS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--device", "banana"), "the device 'banana' is unknown to torch"),
        (("eval", "--device", "banana"), "the device 'banana' is unknown to torch"),
        (("masks", "--published-path", "ijepa"), "is used with --vs published only"),
        (("masks", "--out", "none/a.json"), "--out none/a.json: none is no folder: make it"),
        (("masks", "--out", "."), "--out . is a folder: name a file in it"),
        (("masks", "--out", "file/a.json"), "file is no folder"),
        (("data", "--data", "file"), "--data file is no folder: name one"),
    ],
)
def test_wrong_words_measure_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    args = parse(*words)
    assert args.run(args) == USAGE
    assert message in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_missing_library_is_named(monkeypatch, capsys):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    args = parse("load", "--vs", "transformers")
    assert args.run(args) == USAGE
    assert "pip install transformers" in capsys.readouterr().err


def test_interrupt_keeps_nothing(monkeypatch, capsys):
    def stop(**words):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "masks", stop)
    args = parse("masks")
    assert args.run(args) == INTERRUPTED
    assert "a bench keeps nothing" in capsys.readouterr().err
