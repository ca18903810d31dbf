"""Joining the processes of a run: environments, devices, exchanges."""

import os
import subprocess
import sys

import pytest
import several_processes
import torch

from ijepa_zoo.distributed import (
    Distributed,
    choose_device,
    init_distributed,
    read_environment,
    refuse_shared_gpu,
)
from ijepa_zoo.errors import DistributedError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_PROCID": "9"}
SLURM |= {"SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[07-08],gpu11"}
SLURM |= {"SLURM_JOB_ID": "123456"}


def test_environments():
    assert read_environment({}) is None
    assert read_environment(dict(TORCHRUN)) == (1, 2, 1, 2)
    slurm = dict(SLURM)
    assert read_environment(slurm) == (9, 16, 1, 8)
    assert (slurm["MASTER_ADDR"], slurm["MASTER_PORT"]) == ("gpu07", "23456")
    second = {**SLURM, "SLURM_STEP_ID": "1"}
    read_environment(second)
    assert second["MASTER_PORT"] == "24465"
    assert read_environment({"SLURM_STEP_NUM_TASKS": "1"}) is None
    with init_distributed("cpu") as distributed:
        assert distributed == Distributed(0, 1, 0, 1, torch.device("cpu"))
        assert distributed.is_main


@pytest.mark.parametrize(
    ("environment", "change", "named"),
    [
        (TORCHRUN, {"RANK": ""}, "RANK=,"),
        (TORCHRUN, {"MASTER_ADDR": ""}, "MASTER_ADDR=,"),
        (TORCHRUN, {"RANK": "2"}, "RANK=2"),
        (TORCHRUN, {"RANK": "one"}, "RANK=one"),
        (TORCHRUN, {"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        (TORCHRUN, {"LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        (TORCHRUN, {"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        (SLURM, {"SLURM_LOCALID": ""}, "LOCAL_RANK=,"),
    ],
)
def test_wrong_environments_are_refused(environment, change, named):
    with pytest.raises(DistributedError, match=named):
        read_environment({**environment, **change})


def test_devices(monkeypatch):
    assert choose_device("cpu", 0, 2) == torch.device("cpu")
    for name in ("cuda:7", "gpu", "meta"):
        with pytest.raises(DistributedError, match=name):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DistributedError, match="GPU 0"):
        choose_device("cuda")
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_device() == torch.device("cuda", 0)
    assert choose_device("auto", 1, 2) == torch.device("cuda", 1)
    assert choose_device("cuda:0", 1, 2) == torch.device("cuda", 0)
    assert current == [0, 1, 0]
    with pytest.raises(DistributedError, match="GPU 2"):
        choose_device("cuda", 2, 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as Slurm shows each task its own
    assert choose_device("cuda", 3, 4) == torch.device("cuda", 0)
    with pytest.raises(DistributedError, match="GPU 1"):
        choose_device("cuda:1", 1, 4)


def test_processes_do_not_share_a_gpu():
    store = torch.distributed.HashStore()
    for uuid in ("GPU-a", "GPU-b"):
        refuse_shared_gpu(store, uuid)
    with pytest.raises(DistributedError, match="GPU-a"):
        refuse_shared_gpu(store, "GPU-a")


EXCHANGE = """
import time
import torch
from ijepa_zoo.distributed import init_distributed
from ijepa_zoo.errors import RunError

def main_only():
    raise RunError(f"only rank {distributed.rank}")

for _ in range(2):  # a job may evaluate twice
    with init_distributed("auto", 30) as distributed:
        rank = distributed.rank
        assert (distributed.world_size, distributed.local_world_size) == (2, 2)
        assert distributed.device.type == "cpu"
        own = torch.tensor([1.0, rank])
        assert distributed.all_reduce(own).tolist() == [2, 1] and own.tolist() == [1, rank]
        rows = distributed.all_gather(torch.full((2, 3), rank))
        assert rows[:, 0].tolist() == [0, 0, 1, 1] and rows.shape == (4, 3)
        rows = distributed.all_gather_rows(torch.full((3 * rank, 2), 1 + rank))
        assert rows[:, 1].tolist() == [2, 2, 2]
        rows = distributed.all_gather_rows(torch.full((2 - rank, 2), 1 + rank))
        assert rows[:, 1].tolist() == [1, 1, 2]
        assert distributed.broadcast(torch.tensor([rank])).tolist() == [0]
        assert distributed.broadcast_object({"from": rank}) == {"from": 0}
        assert distributed.all_gather_object(str(rank)) == ["0", "1"]
        assert distributed.run_on_main(lambda: rank + 5) == 5
        try:
            distributed.run_on_main(main_only)
        except RunError as error:
            assert str(error) == "only rank 0"
        else:
            raise AssertionError
        distributed.barrier()
        print("rank", rank, "done")
    assert not torch.distributed.is_initialized()
    time.sleep(rank)  # the other one must not take the addresses of the group before
"""
DIES = """
import os, signal
import torch
from ijepa_zoo.distributed import init_distributed

with init_distributed("cpu") as distributed:
    if distributed.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()
"""


@pytest.mark.parametrize(("script", "succeeds"), [(EXCHANGE, True), (DIES, False)])
def test_jobs_of_torchrun(tmp_path, script, succeeds):
    """Exchanges; a killed process ends the job."""
    path = tmp_path / "script.py"
    path.write_text(script)
    port = f"--master-port={several_processes.free_port()}"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", port, path],
        env={**os.environ, "PYTHONPATH": str(several_processes.ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert (done.returncode == 0) == succeeds, done.stderr
    assert done.stdout.count("done") == (4 if succeeds else 0)
