"""Progress where standard error is no terminal."""

import io

from tqdm import tqdm

from ijepa_zoo.progress import ProgressLines, progress_bar, skip


def _lines(steps, **kwargs):
    now, file = [0.0], io.StringIO()
    with ProgressLines(clock=lambda: now[0], file=file, **kwargs) as bar:
        for seconds, count in steps:
            now[0] += seconds
            bar.update(count)
    return file.getvalue().splitlines()


def test_lines_come_at_most_every_half_minute():
    steps = [(10, 100)] * 12
    assert _lines(steps, total=2000, what="features, test") == [
        "features, test: 300 of 2,000 img, 10 img/s, 0:02:50 left",
        "features, test: 600 of 2,000 img, 10 img/s, 0:02:20 left",
        "features, test: 900 of 2,000 img, 10 img/s, 0:01:50 left",
        "features, test: 1,200 of 2,000 img, 10 img/s, 0:01:20 left",
    ]


def test_rates_leave_out_what_was_done_before_and_unknown_totals_have_no_time_left():
    (line,) = _lines([(40, 20)], total=100, what="heads", unit="step", done=40)
    assert line == "heads: 60 of 100 step, 0.5 step/s, 0:01:20 left"
    assert _lines([(40, 20)], total=0, what="neighbours") == ["neighbours: 20 img, 0.5 img/s"]


def test_what_is_skipped_counts_without_a_rate():
    now, file = [0.0], io.StringIO()
    bar = ProgressLines(100, "x", clock=lambda: now[0], file=file)
    skip(bar, 50)
    now[0] = 30
    bar.update(30)
    assert file.getvalue() == "x: 80 of 100 img, 1 img/s, 0:00:20 left\n"
    with tqdm(total=100, disable=False, file=file) as plain:
        skip(plain, 50)
        assert plain.n == 50


def test_short_work_prints_nothing():
    assert _lines([(1, 5)] * 20, total=100, what="x") == []


def test_pipes_get_lines_and_quiet_gets_nothing(capsys):
    assert isinstance(progress_bar(True, 10, "x"), ProgressLines)
    with progress_bar(False, 10, "x") as bar:
        bar.update(10)
        bar.set_postfix(loss="1")
    assert capsys.readouterr().err == ""
