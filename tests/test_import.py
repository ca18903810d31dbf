"""What `import ijepa_zoo` does to a fresh process: register models, and nothing else."""

import os
import subprocess
import sys

PROBE = """
import logging, os, random, signal, sys, warnings
import timm, torch, numpy

def state():
    return {
        "handlers": [str(handler) for handler in logging.root.handlers],
        "level": logging.root.level,
        "filters": list(warnings.filters),
        "environment": dict(os.environ),
        "torch random": torch.get_rng_state().tolist(),
        "numpy random": numpy.random.get_state()[1].tolist(),
        "python random": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "interrupt": signal.getsignal(signal.SIGINT),
        "path": list(sys.path),
    }

before, loaded = state(), set(sys.modules)
import ijepa_zoo
after = state()
assert after == before, [name for name in after if after[name] != before[name]]
assert timm.is_model("vit_huge14_ijepa")
assert not torch.cuda.is_initialized()
heavy = {
    *("transformers", "pyarrow", "matplotlib", "datasets", "pandas", "scipy", "ray"),
    *("torch.distributed.fsdp", "torch._dynamo", "ijepa_zoo.cli", "ijepa_zoo.train"),
}
assert not heavy & (set(sys.modules) - loaded)
"""


def test_import_registers_models_and_changes_nothing_else(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command, error = [sys.executable, "-c", PROBE], subprocess.PIPE
    run = subprocess.run(command, cwd=tmp_path, env=environment, stderr=error, text=True)
    assert (run.returncode, run.stderr) == (0, "")
