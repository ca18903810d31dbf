"""Progress where standard error is not a terminal."""

import re

from ijepa_zoo import progress


def test_lines_instead_of_a_bar_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    with progress.progress_bar(True, 2000, "features", "image") as bar:
        bar.set_postfix(loss="0.5", refresh=False)
        for _ in range(5):
            bar.update(100)
    errors = capsys.readouterr().err
    assert "\r" not in errors
    lines = [line for line in errors.splitlines() if "500/2000 image" in line]
    assert re.search(r"features: 500/2000 image, .*image/s, .* left.*loss=0.5", lines[-1])


def test_short_and_quiet_work_prints_nothing(capsys):
    for show in (True, False):
        with progress.progress_bar(show, 10, "features") as bar:
            bar.update(10)
            bar.set_postfix(loss="1", refresh=False)
    assert capsys.readouterr().err == ""


def test_what_was_done_before_counts_without_a_rate():
    with progress.progress_bar(True, 100, "heads", "step", initial=20) as bar:
        progress.skip(bar, 30)
        assert (bar.n, bar.initial) == (50, 50)
    with progress.progress_bar(False, 100, "heads") as bar:
        progress.skip(bar, 30)
