"""What `import ijepa_zoo` does to a fresh process: register models, and nothing else."""

import json
import os
import subprocess
import sys

PROBE = """
import json, logging, os, random, signal, sys, warnings
import timm, torch, numpy

def state():
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    return {
        "handlers": {log.name: [str(h) for h in log.handlers] for log in loggers if log.handlers},
        "levels": {log.name: log.level for log in loggers if log.level},
        "environment": dict(os.environ),
        "torch random": torch.get_rng_state().tolist(),
        "numpy random": numpy.random.get_state()[1].tolist(),
        "python random": repr(random.getstate()),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "interrupt": str(signal.getsignal(signal.SIGINT)),
        "path": list(sys.path),
    }

before, loaded = state(), set(sys.modules)
filters = list(warnings.filters)
import ijepa_zoo
print(json.dumps({
    "before": before,
    "after": state(),
    "filters": [str(item) for item in warnings.filters if item not in filters],
    "cuda": torch.cuda.is_initialized(),
    "new": sorted(set(sys.modules) - loaded),
    "models": timm.is_model("vit_huge14_ijepa"),
}))
"""
HEAVY = {
    *("transformers", "pyarrow", "matplotlib", "datasets", "pandas", "scipy", "ray"),
    *("torch.distributed.fsdp", "torch._dynamo", "ijepa_zoo.cli", "ijepa_zoo.train"),
}


def test_import_registers_models_and_changes_nothing_else(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONWARNINGS": "ignore:Please use the new API",  # torch 2.9, of "precision" above
        },
    )
    assert (run.returncode, run.stderr) == (0, "")
    report = json.loads(run.stdout)
    assert report["models"]
    assert report["after"] == report["before"]
    assert not report["filters"]
    assert not report["cuda"]
    assert not HEAVY & set(report["new"])
