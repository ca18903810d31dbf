"""The Slurm scripts, with stand-ins for Slurm's commands."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import several_processes
from small_run import CONFIG, change, pictures

from ijepa_zoo.train import describe_config

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "slurm"
COMMANDS = {
    # two tasks on each of two nodes, which end with the same status
    "srun": """
        while [[ "$1" == --* ]]; do shift; done
        for rank in 0 1 2 3; do
            SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) SLURM_STEP_NUM_TASKS=4 "$@"
            status=$?
        done
        exit $status""",
    "scontrol": 'echo "scontrol $*" >> "$RECORD"',
    "ijepa-zoo": """
        echo "$SLURM_PROCID $SLURM_STEP_NUM_TASKS $SLURM_LOCALID: $*" >> "$RECORD"
        exit "$STATUS" """,
}


@pytest.fixture
def record(tmp_path, monkeypatch):
    """The file in which Slurm's commands write their arguments."""
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "record"


@pytest.mark.parametrize("status", [0, 1, 75])
def test_sbatch_starts_every_process_and_queues_again_what_was_saved(record, monkeypatch, status):
    monkeypatch.setenv("STATUS", str(status))
    monkeypatch.setenv("SLURM_JOB_ID", "123456")
    words = ["vith14_in1k", "--data", "a folder", "optim.duration=3 epochs"]
    done = subprocess.run(["bash", SCRIPTS / "pretrain.sbatch", *words], cwd=record.parent)
    assert done.returncode == (0 if status == 75 else status)
    lines = record.read_text().splitlines()
    arguments = "pretrain --quiet vith14_in1k --data a folder optim.duration=3 epochs"
    assert lines[:4] == [f"{rank} 4 {rank % 2}: {arguments}" for rank in range(4)]
    assert lines[4:] == (["scontrol requeue 123456"] if status == 75 else [])


def arguments(folder, duration):
    """Arguments of a small run in a folder, whose files are made."""
    np.save(folder / "images.npy", pictures())
    config = describe_config(change(CONFIG, optim={"duration": duration, "warmup": "0 steps"}))
    (folder / "small.yaml").write_text(config)
    options = {"--config": "small.yaml", "--data": "images.npy", "--out": "run"}
    return [word for name, file in options.items() for word in (name, str(folder / file))]


def test_submitit_starts_a_run(tmp_path, monkeypatch, record):
    pytest.importorskip("submitit")
    words = ["--cluster", "local", "--gpus", "1", "--logs", str(tmp_path / "logs"), "--"]
    monkeypatch.setattr(sys, "argv", ["launch", *words, *arguments(tmp_path, "1 steps")])
    runpy.run_path(str(SCRIPTS / "submitit_launch.py"), run_name="__main__")
    assert (tmp_path / "run" / "export" / "config.json").exists()


TASK = """
    import os, runpy, sys
    slurm = {"JOB_ID": "4242", "NTASKS": "2", "JOB_NUM_NODES": "1", "NODEID": "0",
             "JOB_NODELIST": "localhost"}
    slurm["PROCID"] = slurm["LOCALID"] = os.environ["RANK"]
    os.environ |= {f"SLURM_{name}": value for name, value in slurm.items()}
    os.environ |= {"SUBMITIT_EXECUTOR": "slurm", "PATH": sys.argv[2], "RECORD": sys.argv[3]}
    runpy.run_path(sys.argv[1])["Pretraining"](sys.argv[4:])()
"""


def test_submitit_queues_again_what_was_saved(tmp_path, record):
    pytest.importorskip("submitit")
    words = [SCRIPTS / "submitit_launch.py", os.environ["PATH"], record]
    tasks = several_processes.start(TASK, 2, *words, *arguments(tmp_path, "1e6 steps"))
    limit = time.monotonic() + 100
    while not list(tmp_path.glob("run/checkpoints/step-*[0-9]")) and time.monotonic() < limit:
        time.sleep(0.05)
    for task in tasks:
        os.kill(task.pid, signal.SIGUSR2)  # submitit's: Slurm sends it before the time limit
    for status, output in several_processes.finish(tasks):
        assert status == 0, output
        assert "run the same command again" in output
    assert record.read_text() == "scontrol requeue 4242\n"
