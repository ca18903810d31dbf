"""The Slurm scripts, with stand-ins for Slurm's commands."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)
SCRIPTS = Path(__file__).parents[2] / "examples" / "slurm"
COMMANDS = {
    # two tasks on each of two nodes; the status of srun is the highest of its tasks'
    "srun": """
        while [[ "$1" == --* ]]; do shift; done
        worst=0
        for rank in 0 1 2 3; do
            SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) SLURM_STEP_NUM_TASKS=4 \\
                SLURM_STEP_TASKS_PER_NODE="2(x2)" SLURM_STEP_NODELIST="node[7-8]" "$@"
            status=$?; ((status > worst)) && worst=$status
        done
        exit $worst""",
    "scontrol": """
        echo "scontrol $*" >> "$RECORD"
        exit 0""",
    "ijepa-zoo": """
        echo "$SLURM_PROCID $SLURM_STEP_NUM_TASKS $SLURM_LOCALID: $*" >> "$RECORD"
        exit "$STATUS" """,
}


def stand_ins(folder):
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)


@pytest.mark.parametrize("status", [0, 1, 75])
def test_sbatch_starts_every_process_and_queues_again_what_was_saved(tmp_path, status):
    stand_ins(tmp_path)
    record = tmp_path / "record"
    done = subprocess.run(
        ["bash", str(SCRIPTS / "pretrain.sbatch"), "vith14_in1k", "--data", "a folder",
         "optim.duration=3 epochs"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record),
             "STATUS": str(status), "SLURM_JOB_ID": "123456"},
        cwd=tmp_path, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == (0 if status == 75 else status), done.stderr
    lines = record.read_text().splitlines()
    arguments = "pretrain --quiet vith14_in1k --data a folder optim.duration=3 epochs"
    assert lines[:4] == [f"{rank} 4 {rank % 2}: {arguments}" for rank in range(4)]
    assert lines[4:] == (["scontrol requeue 123456"] if status == 75 else [])
    assert not list(tmp_path.glob(".requeue*"))


FILES = """
import sys
from pathlib import Path
import numpy as np
from small_run import CONFIG, change, pictures
from ijepa_zoo.train.config import dump_config
folder = Path(sys.argv[1])
np.save(folder / "images.npy", pictures())
(folder / "small.yaml").write_text(dump_config(change(CONFIG, optim={"duration": sys.argv[2]})))
"""
ONE_TASK = """
import runpy, sys
runpy.run_path(sys.argv[1])["Pretraining"](sys.argv[2:])()
"""


@pytest.fixture
def environment(tmp_path):
    """Slurm's commands, and a package that subprocesses find."""
    stand_ins(tmp_path)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SUBMITIT_"))}
    paths = [tmp_path, os.environ["PATH"]], [Path(__file__).parent, Path(__file__).parents[2]]
    names = [os.pathsep.join(map(str, path)) for path in paths]
    own = {"PATH": names[0], "PYTHONPATH": names[1], "RECORD": str(tmp_path / "record")}
    return {**kept, **own, "OMP_NUM_THREADS": "1"}


def arguments(folder, environment, duration):
    """Arguments of a small run in a folder, whose files are made."""
    subprocess.run(
        [sys.executable, "-c", FILES, str(folder), duration], env=environment, check=True
    )
    return ["--config", str(folder / "small.yaml"), "--data", str(folder / "images.npy"),
            "--out", str(folder / "run")]  # fmt: skip


def test_submitit_starts_processes_that_train_together(tmp_path, environment):
    pytest.importorskip("submitit")
    run = arguments(tmp_path, environment, "3 steps")
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "submitit_launch.py"), "--cluster", "local", "--gpus", "2",
         "--logs", str(tmp_path / "logs"), "--", *run],
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "export" / "config.json").exists()
    assert len(list((tmp_path / "logs").glob("*_log.out"))) == 2


def test_submitit_queues_again_what_was_saved(tmp_path, environment):
    pytest.importorskip("submitit")
    run = arguments(tmp_path, environment, "1e6 steps")
    slurm = {"JOB_ID": "4242", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    slurm |= {"JOB_NUM_NODES": "1", "JOB_NODELIST": "localhost"}
    task = subprocess.Popen(
        [sys.executable, "-c", ONE_TASK, str(SCRIPTS / "submitit_launch.py"), *run],
        env={**environment, **{f"SLURM_{k}": v for k, v in slurm.items()},
             "SUBMITIT_EXECUTOR": "slurm"},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    limit = time.monotonic() + 200
    while not list(tmp_path.glob("run/checkpoints/step-*[0-9]")) and time.monotonic() < limit:
        time.sleep(0.1)
    task.send_signal(signal.SIGUSR2)  # submitit's: Slurm sends it before the time limit
    errors = task.communicate(timeout=200)[1]
    assert task.returncode == 0, errors
    assert "run the same command again" in errors
    assert (tmp_path / "record").read_text() == "scontrol requeue 4242\n"
