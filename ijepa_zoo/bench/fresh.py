"""Measurements that need processes of their own: memory peaks, times from nothing, ranks.

    python -m ijepa_zoo.bench.fresh MODULE FUNCTION ARGUMENTS

calls a function with the JSON object ARGUMENTS as keywords, and prints its result as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any


class FreshProcessError(RuntimeError):
    """A measurement's process ended with an error."""


def in_fresh_process(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a module's function in a new Python process.

    Args:
        function: At the top level of an importable module.
        arguments: Its keywords, of JSON's types.

    Returns:
        Its result, of JSON's types.

    Raises:
        FreshProcessError: It failed; the message ends with its last words.
    """
    return _call([sys.executable], function, arguments)


def in_ranks(function: Callable[..., Any], world: int, **arguments: Any) -> Any:
    """Call a module's function in `world` processes at once, as torchrun starts them.

    Args:
        function: As for `in_fresh_process`; it joins the processes itself.
        world: How many.
        arguments: Its keywords.

    Returns:
        The result of rank 0.

    Raises:
        FreshProcessError: One failed.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return _call([sys.executable, *launcher], function, arguments)


def _call(launcher: list[str], function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    words = [function.__module__, function.__qualname__, json.dumps(arguments)]
    run = subprocess.run(
        [*launcher, "-m", __name__, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if run.returncode:
        last = [line for line in run.stderr.splitlines() if line.strip()] or [run.stdout]
        raise FreshProcessError(f"the process of {function.__qualname__} failed: {last[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


def _main(module: str, function: str, arguments: str) -> None:
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
