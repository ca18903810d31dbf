"""Start several processes of one job, as torchrun would, for tests.

They are forked from a server that has imported everything once; importing takes longer than most
tests.
"""

import multiprocessing
import os
import socket
import sys
import tempfile
import textwrap
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_PRELOAD = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.nn.parallel",
    "ijepa_zoo.train",
    "ijepa_zoo.train.checkpoint",
    "several_processes",
]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def _child(script, arguments, environment, errors):
    descriptor = os.open(errors, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    sys.argv = ["script", *arguments]
    exec(compile(script, "script", "exec"), {"__name__": "__main__"})


def start(script, world, *arguments):
    """Start `world` processes of a script; each has a file `errors` for what it prints."""
    context, port = _context(), free_port()
    script, arguments = textwrap.dedent(script), [*map(str, arguments)]
    processes = []
    for rank in range(world):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        environment |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
        environment |= {"MASTER_ADDR": "127.0.0.1"}
        descriptor, errors = tempfile.mkstemp(suffix=f".rank{rank}")
        os.close(descriptor)
        process = context.Process(
            target=_child, args=(script, arguments, environment, errors), daemon=True
        )
        process.errors = Path(errors)
        process.start()
        processes.append(process)
    return processes


def finish(processes, seconds=100):
    """Exit status and output of every process; what still runs after `seconds` is killed."""
    limit = time.monotonic() + seconds
    results = []
    for process in processes:
        process.join(max(limit - time.monotonic(), 0.1))
        note = ""
        if process.is_alive():
            process.kill()
            process.join()
            note = "\nTEST: killed, it did not end"
        results.append((process.exitcode, process.errors.read_text() + note))
        process.errors.unlink()
    return results


def run(script, world, *arguments):
    """Run a script in `world` processes, all of which must succeed."""
    results = finish(start(script, world, *arguments))
    assert all(status == 0 for status, _ in results), "\n".join(text for _, text in results)
