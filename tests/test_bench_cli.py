"""`ijepa-zoo bench`: the words of the command line are those of Python."""

import argparse
import inspect
import json

import pytest

from ijepa_zoo import bench
from ijepa_zoo.cli.bench import add_bench
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
    args = parse("masks", "--rounds", "1")
    assert args.run(args) == USAGE
    assert "rounds 1; use" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        parse("train", "--vs", "timm")


def test_interrupt_keeps_nothing(monkeypatch, capsys):
    def stop(**words):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "masks", stop)
    args = parse("masks")
    assert args.run(args) == INTERRUPTED
    assert "a bench keeps nothing" in capsys.readouterr().err
