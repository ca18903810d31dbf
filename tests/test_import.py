"""What `import ijepa_zoo` does to a fresh process: register models, and nothing else."""

import json
import os
import subprocess
import sys

import pytest

PROBE = """
import hashlib, json, logging, os, random, signal, sys, warnings
import timm, torch, numpy

def state():
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    return {
        "handlers": {log.name: [str(h) for h in log.handlers] for log in loggers if log.handlers},
        "levels": {log.name: log.level for log in loggers if log.level},
        "environment": dict(os.environ),
        "torch random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "numpy random": hashlib.sha256(numpy.random.get_state()[1].tobytes()).hexdigest(),
        "python random": hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "interrupt": str(signal.getsignal(signal.SIGINT)),
        "folder": os.getcwd(),
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


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    run = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONWARNINGS": "ignore:Please use the new API",  # torch 2.9, of "precision" above
        },
    )
    assert run.returncode == 0, run.stderr
    assert not run.stderr, run.stderr
    return json.loads(run.stdout)


def test_models_are_registered(report):
    assert report["models"]


def test_process_is_left_as_it_was(report):
    assert report["after"] == report["before"]
    assert not report["filters"]
    assert not report["cuda"]


@pytest.mark.parametrize(
    "package",
    ["transformers", "pyarrow", "matplotlib", "datasets", "pandas", "scipy", "ray"],
)
def test_nothing_heavy_is_imported_beyond_what_timm_imports(report, package):
    assert not [name for name in report["new"] if name.partition(".")[0] == package]


def test_parts_that_few_need_are_not_imported(report):
    heavy = {"torch.distributed.fsdp", "torch._dynamo", "ijepa_zoo.cli", "ijepa_zoo.train"}
    assert not heavy & set(report["new"])
