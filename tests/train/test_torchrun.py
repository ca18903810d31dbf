"""Whole runs of two processes: killed and stopped under torchrun, and resumed in other ways."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import several_processes
from small_run import CONFIG, change, pictures, rows, same_state, state, train

from ijepa_zoo.train import describe_config

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
CONFIG = change(
    CONFIG,
    # Shards of widths that fill vector registers: the CPU's kernels round their last, odd elements
    # differently, and with 24 channels sharded and whole tensors have other odd elements.
    model={"embed_dim": 64, "predictor_embed_dim": 32},
    optim={"duration": "40 steps", "warmup": "9 steps"},
    log={"save_every": "5 steps", "monitor_every": 20},
)
COMMAND = """
    import sys
    from ijepa_zoo.cli import main
    sys.exit(main(["pretrain", *sys.argv[1:]]))
"""


def arguments(work, run):
    return ["--config", work / "config.yaml", "--data", work / "images.npy", "--out", run]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    np.save(folder / "images.npy", pictures())
    (folder / "config.yaml").write_text(describe_config(CONFIG))
    return folder


@pytest.fixture(scope="module")
def two(work):
    """A run of two processes without interruption."""
    several_processes.run(COMMAND, 2, *arguments(work, work / "two"))
    return work / "two"


def assert_close(one, two):
    """Rows of the log, with metrics of the monitors, and weights, but for rounding."""
    for mine, theirs in zip(rows(one), rows(two)[-len(rows(one)) :], strict=True):
        numbers = [float(value or 0) for value in theirs.values()]
        assert [float(value or 0) for value in mine.values()] == pytest.approx(numbers, rel=1e-3)
    (a, _), (b, _) = state(one), state(two)
    distance = sum((a[n] - b[n]).double().square().sum() for n in a if "encoder" in n)
    assert distance.sqrt() < 1e-3


def test_two_processes_equal_one(two, tmp_path):
    train(tmp_path, CONFIG)
    assert_close(tmp_path, two)


def wait_for(run, steps):
    """Until the run has logged so many steps; the first two lines are names and initial metrics."""
    log = run / "log.csv"
    limit = time.monotonic() + 200  # on a busy machine a start takes a minute
    while not log.exists() or len(log.read_text().splitlines()) <= steps + 1:
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_killed_stopped_and_resumed_equals_uninterrupted(work, two):
    """Replicated, then sharded, then replicated."""
    run = work / "parts"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, "-m", "ijepa_zoo", "pretrain", *arguments(work, run)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    job = subprocess.Popen([*command, "runtime.workers=1"], env=environment, **pipes)
    wait_for(run, 6)
    ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)  # a rank is lost: the job ends, and says so
    assert "Signal 9" in job.communicate(timeout=250)[0]
    assert job.returncode != 0
    job = several_processes.start(COMMAND, 2, *arguments(work, run), "runtime.parallel=fsdp2")
    wait_for(run, 25)
    job[1].terminate()  # it tells the other one
    for status, output in several_processes.finish(job):
        assert status == 75, output
    assert not (run / "export").exists()
    several_processes.run(COMMAND, 2, *arguments(work, run))
    assert same_state(run, two)
    assert [(row["step"], row["loss"]) for row in rows(run)] == [
        (row["step"], row["loss"]) for row in rows(two)
    ]
    checkpoint = run / "checkpoints" / "step-000000035"
    small, large = sorted(file.stat().st_size for file in checkpoint.glob("*.distcp"))
    assert large < 2 * small  # every process writes a part
    train(work / "branch", CONFIG, init=checkpoint, resume_optimizer=True)  # with one process
    assert_close(work / "branch", two)
