"""Runs killed at random moments, and checkpoints damaged at random places.

The processes are forked from a server that has imported everything, because importing takes longer
than such a run. They call the function behind `python -m ijepa_zoo`, with the environment that
torchrun gives; `kill -9` is real. `test_torchrun.py` has kills under torchrun itself.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
import several_processes
from small_run import change, pictures, rows, same_state
from test_torchrun import CONFIG, STEPS

from ijepa_zoo.train.config import dump_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG = change(CONFIG, log={"save_every": "5 steps", "keep": 3})
COMMAND = """
import multiprocessing, os, sys
from ijepa_zoo.cli import main
multiprocessing.current_process()._config["daemon"] = False  # it may start workers
os.setpgrp()  # with its workers
if os.environ["WORLD_SIZE"] == "1":  # without torchrun
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
sys.exit(main(["pretrain", *sys.argv[1:]]))
"""
# What a kill is aimed at: how often it is drawn, every how many steps it is there, for how long.
AIMS = {"row ": (5, 1, 0.1), ".partial": (3, 5, 0.15), ".deleted": (2, 10, 0.002),
        ".export.": (1, STEPS, 0.004)}  # fmt: skip


def start(run, world, *options):
    files = {"config": "config.yaml", "data": "images.npy", "out": run}
    paths = [word for name, file in files.items() for word in (f"--{name}", run.parent / file)]
    return several_processes.start(COMMAND, world, *paths, "--quiet", *options)


def train(run, world, *options):
    results = several_processes.finish(start(run, world, *options))
    assert [status for status, _ in results] == [0] * world, "\n".join(text for _, text in results)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    np.save(folder / "images.npy", pictures())
    (folder / "config.yaml").write_text(dump_config(CONFIG))
    return folder


@pytest.fixture(scope="module")
def whole(work):
    """Uninterrupted runs by number of processes."""
    for world in (1, 2):
        train(work / f"whole{world}", world)
    return {world: work / f"whole{world}" for world in (1, 2)}


def contents(folder):
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_equal(run, expected):
    assert same_state(run, expected)
    assert rows(run) == rows(expected)
    assert contents(run / "export") == contents(expected / "export")
    assert {path.name for path in run.iterdir()} == {path.name for path in expected.iterdir()}
    assert not [path for path in run.rglob("*") if path.suffix in (".partial", ".deleted")]


def log_file(run):
    return (run / "log.csv").stat().st_ino if (run / "log.csv").exists() else None


def found(run):
    """Rows of the log, and names of files and folders."""
    rows = (run / "log.csv").read_bytes().count(b"\n") - 1
    checkpoints = run / "checkpoints"
    names = [*os.listdir(run), *(os.listdir(checkpoints) if checkpoints.is_dir() else ())]
    return {*(f"row {number}" for number in range(rows)), *names}


def wait_for(run, job, log, aim, chance):
    """Wait until a random one of its kind is there, then for a part of the time that it takes."""
    while log_file(run) == log and all(rank.is_alive() for rank in job):
        time.sleep(0.001)  # the job replaces the log before its first step
    known, seen = found(run), set()
    _, every, seconds = AIMS[aim]
    left = STEPS - sum("row " in name for name in known)
    number = chance.randint(int(aim != "row "), max(left // every, 1))
    while len(seen) < number and all(rank.is_alive() for rank in job):
        time.sleep(0.0003)
        seen |= {name for name in found(run) - known if aim in name}
    time.sleep(chance.uniform(0, seconds))


def kill(run, world, chance):
    """Start or resume, and kill one or all processes; what was hit, nothing if it was too late."""
    aim = chance.choices(list(AIMS), [often for often, _, _ in AIMS.values()])[0]
    victim = chance.choice(["all", chance.randrange(world)])
    log = log_file(run)
    job = start(run, world, f"runtime.workers={chance.randint(0, 1)}")
    wait_for(run, job, log, aim, chance)
    if victim == "all":
        for rank in job:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
    else:
        job[victim].kill()
        time.sleep(0.1)  # until torchrun notices, and asks the others to end
        for rank in job:
            rank.terminate()
    results = several_processes.finish(job, 30)
    assert not any("TEST: killed" in text for _, text in results)
    if results[0 if victim == "all" else victim][0] != -signal.SIGKILL:
        return []
    hit = [kind for kind in AIMS if kind != "row " and any(kind in name for name in found(run))]
    return [(world, aim.strip(), victim, *hit)]


@pytest.mark.parametrize(("world", "resumed", "least"), [(1, 1, 10), (2, 2, 10), (1, 2, 5)])
def test_killed_and_resumed_equals_uninterrupted(work, whole, world, resumed, least):
    """Also with another number of processes: a step is two micro-batches of 4 on any."""
    chance, kills, runs = random.Random(f"{world} {resumed}"), [], 0
    while len(kills) < least:
        run, runs = work / f"killed{world}{resumed}-{runs}", runs + 1
        for _ in range(chance.choice([1, 1, 2, 3])):
            kills += kill(run, world, chance)
        train(run, resumed)
        assert_equal(run, whole[resumed])
    print(f"\n{len(kills)} kills of {runs} runs:", *Counter(kills).items(), sep="\n")


def damage(file, other, how, chance):
    """Damage a file; a swap damages the other one, too."""
    before = after = bytearray(file.read_bytes())
    while after == before:
        after, place = before.copy(), chance.randrange(len(before))
        if how == "flip":
            after[place] ^= 1 << chance.randrange(8)
        elif how == "truncate":
            del after[place:]
        else:
            after = other.read_bytes()
            other.write_bytes(before)
    file.write_bytes(after)


FILES = ["__1_0.distcp", ".metadata", "state.json", "manifest.json"]


@pytest.mark.parametrize("how", ["flip", "truncate", "swap"])
@pytest.mark.parametrize(("world", "name"), [(2, name) for name in FILES])
def test_damaged_checkpoint_is_refused_or_left_out(work, whole, world, name, how):
    chance = random.Random(f"{world} {name} {how}")
    run = work / f"{how}{world}{name}"
    shutil.copytree(whole[world], run, ignore=shutil.ignore_patterns("export*"))
    *others, newest = sorted((run / "checkpoints").iterdir())
    damage(newest / name, chance.choice(others) / name, how, chance)
    before = contents(run)
    for status, text in several_processes.finish(start(run, world)):
        assert status == 1
        assert str(newest) in text
        assert "Traceback" not in text
    assert contents(run) == before
    train(run, world, "--resume-from", "previous")
    assert_equal(run, whole[world])
