"""Progress where standard error is not a terminal."""

import re

from ijepa_zoo import progress


def test_lines_instead_of_a_bar_where_there_is_no_terminal(capsys, monkeypatch):
    for show in (True, False):
        with progress.progress_bar(show, 10, "features") as bar:
            bar.update(10)
    assert capsys.readouterr().err == ""  # of short or quiet work
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    with progress.progress_bar(True, 2000, "features", initial=20) as bar:
        progress.skip(bar, 30)
        assert (bar.n, bar.initial) == (50, 50)  # without a rate
        bar.set_postfix(loss="0.5", refresh=False)
        bar.update(450)
    errors = capsys.readouterr().err
    assert "\r" not in errors
    assert re.search(r"features: 500/2000 image, .*image/s, .* left.*loss=0.5", errors)
