"""How the processes of a job find each other, and find out what became of a lost one.

Everything a wrong environment can do is refused here, within a minute and in words.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

_PATIENCE = 50.0  # seconds until all have come
_GRACE = 5.0  # seconds until the others have said what happened to them
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_START = "start with: torchrun --nproc-per-node=NUMBER_OF_GPUS -m ijepa_zoo.cli COMMAND ..."


@dataclass
class _Connection:
    """The store of a job, and how often its processes have met there."""

    store: Any
    meetings: int = 0


_known: dict[tuple[str, int], _Connection] = {}  # by address and port


class ProcessError(RuntimeError):
    """The processes of a job do not find each other, or one is lost; the message says which."""


@dataclass(frozen=True)
class Place:
    """This process's place in the job, from the environment."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0


def read_place(environment: Mapping[str, str]) -> Place:
    """The place that `torchrun` or a Slurm script wrote into the environment.

    Raises:
        ProcessError: Variables are missing or contradict each other.
    """
    given = [name for name in _NAMES if environment.get(name)]
    if not given:
        for name in _LAUNCHERS:
            if _integer(name, environment.get(name) or "1", f"correct or unset {name}") > 1:
                raise ProcessError(
                    f"{name}={environment[name]} processes were started, but RANK and WORLD_SIZE "
                    "are not set, so each would work alone: set them as examples/slurm does, or "
                    + _START
                )
        return Place()
    missing = [name for name in _NAMES if name not in given]
    if missing:
        raise ProcessError(
            f"{' and '.join(given)} set, but not {' and '.join(missing)}: {_START}; or unset "
            "them all to work in a single process"
        )
    numbers = {name: _integer(name, environment[name]) for name in _NAMES if name[-4:] != "ADDR"}
    place = Place(
        numbers["RANK"],
        numbers["WORLD_SIZE"],
        numbers["LOCAL_RANK"],
        environment["MASTER_ADDR"],
        numbers["MASTER_PORT"],
    )
    if place.world < 1:
        raise ProcessError(f"WORLD_SIZE={place.world} must be at least 1: {_START}")
    for name, value, end in (
        ("RANK", place.rank, place.world),
        ("LOCAL_RANK", place.local_rank, place.world),
        ("MASTER_PORT", place.port, 2**16),
    ):
        if not 0 <= value < end:
            raise ProcessError(
                f"{name}={value} must be 0 to {end - 1} (WORLD_SIZE={place.world}): {_START}"
            )
    return place


def _integer(name: str, text: str, advice: str = _START) -> int:
    try:
        return int(text)
    except ValueError:
        raise ProcessError(f"{name}={text!r} is no whole number: {advice}") from None


def choose_device(name: str, place: Place) -> torch.device:
    """The device of this process; a GPU is made the current one.

    Raises:
        ProcessError: There is no such device, or too few.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ProcessError(
            f"the device {name!r} is unknown to torch: use auto, cuda or cpu"
        ) from error
    if device.type != "cuda":
        if place.world > 1 and device.type != "cpu":
            raise ProcessError(f"the device {name} works in a single process only")
        _try(device)
        return device
    if not torch.cuda.is_available():
        raise ProcessError(
            f"device {name}: torch {torch.__version__} finds no usable CUDA GPU: look at "
            "nvidia-smi and CUDA_VISIBLE_DEVICES, or use the device cpu"
        )
    count = torch.cuda.device_count()
    index = place.local_rank if device.index is None else device.index
    if count == 1 and device.index is None:
        index = 0  # Slurm may show each process its own GPU only; meet() finds a shared one
    if index >= count or (place.world > 1 and device.index is not None):
        raise ProcessError(
            f"device {name} in process LOCAL_RANK={place.local_rank}, but this machine shows "
            f"{count} GPUs: use the device cuda and torchrun --nproc-per-node={count}"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _try(device: torch.device) -> None:
    """See that torch can compute on a device that is no CUDA GPU."""
    reason = "tensors there have no values"
    if device.type != "meta":
        try:
            torch.zeros(1, device=device)
            return
        except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
            reason = re.split(r"\n|\. ", str(error))[0].rstrip(" .")
    raise ProcessError(f"the device {device} cannot be used here ({reason}): use auto, cuda or cpu")


class Survey:
    """A store that all processes see: who has come, and what those that left said."""

    def __init__(self, place: Place, store: Any) -> None:
        self.place, self.store = place, store

    def part(self, name: str) -> Any:
        """A store of its own on the same connection."""
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        return PrefixStore(name, self.store)

    def come(self) -> None:
        """Wait until every process has come.

        Raises:
            ProcessError: Some have not within the time, or two are the same.
        """
        place = self.place
        told = self.store.compare_set("world", "", str(place.world)).decode()
        if told != str(place.world):
            raise ProcessError(
                f"WORLD_SIZE={place.world} here, but {told} in another process of the job: give "
                "all nodes the same numbers"
            )
        came = f"come/{place.rank}"
        if self.store.add(came, 1) > 1:
            self.store.add(came, -1)
            raise ProcessError(
                f"two processes have RANK={place.rank}: every process needs its own; {_START}"
            )
        self.store.add("count", 1)
        limit = time.monotonic() + _PATIENCE
        while self.store.add("count", 0) < place.world:
            if time.monotonic() > limit:
                missing = [r for r in range(place.world) if not self.store.add(f"come/{r}", 0)]
                for mine in (came, "count"):  # the others shall not meet one who has left
                    self.store.add(mine, -1)
                raise ProcessError(
                    f"process {_list(missing)} of {place.world} did not come to "
                    f"{place.address}:{place.port} within {_PATIENCE:g} s: see that every node "
                    f"was started, and look at its output (WORLD_SIZE={place.world})"
                )
            time.sleep(0.02)

    def end(self, text: str) -> None:
        """Tell the others why this process leaves; wait a little until they have read it."""
        import torch.distributed as dist

        try:
            self.store.set(f"end/{self.place.rank}", text)
            if self.place.rank == 0:  # the store ends with its host
                self._ends()
                time.sleep(0.5)
        except dist.DistError:
            return  # the host of the store has left before: nobody is there to be told

    def explain(self, what: str, timeout: float, cause: str) -> str:
        """The message for a process that lost the others while it waited for `what`."""
        import torch.distributed as dist

        place = self.place
        try:
            self.store.set(f"end/{place.rank}", "")
            ends = self._ends()
        except dist.DistError:
            ends = {}
        texts = [f"process {r} ended with {text}" for r, text in sorted(ends.items()) if text]
        silent = [r for r in range(place.world) if r not in ends and r != place.rank]
        if silent:
            texts.append(
                f"process {_list(silent)} gave no sign of life: killed, or hanging "
                f"(limit: {timeout:g} s)"
            )
        found = "; ".join(texts) or "the connection broke"
        return (
            f"process {place.rank} of {place.world} waited for {what} and lost the others: {found}."
            " The same command goes on where it was. "
            f"[{cause.splitlines()[0] if cause else 'no further word'}]"
        )

    def _ends(self) -> dict[int, str]:
        """What the others said when they left, as far as they have said it in time."""
        others = [r for r in range(self.place.world) if r != self.place.rank]
        limit = time.monotonic() + _GRACE
        while True:
            ended = [r for r in others if self.store.check([f"end/{r}"])]
            if len(ended) == len(others) or time.monotonic() > limit:
                return {r: self.store.get(f"end/{r}").decode() for r in ended}
            time.sleep(0.05)


def meet(place: Place, device: torch.device) -> tuple[Survey, int]:
    """Find the other processes and see that their places fit together.

    Returns:
        What connects them, and how many of them are on this machine.

    Raises:
        ProcessError: They do not find each other, or do not fit.
    """
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    if dist.is_initialized():
        raise ProcessError(
            "torch.distributed is initialised already: leave that to ijepa_zoo, or call "
            "torch.distributed.destroy_process_group() before"
        )
    known = _connect(place)
    attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{known.meetings}"
    survey = Survey(place, PrefixStore(f"ijepa_zoo/{attempt}", known.store))
    survey.come()
    known.meetings += 1  # keys must differ the next time
    return survey, _compare(survey, device)


def _connect(place: Place) -> _Connection:
    """The store of the job, hosted by process 0 unless torchrun does.

    It is kept while the process lives. A second meeting with a store of its own would fail when one
    process still leaves the first meeting: the others would reach the old store, which then ends.
    """
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    key = (place.address, place.port)
    try:
        if key in _known and _known[key].store.add("alive", 1):
            return _known[key]
    except dist.DistError:
        del _known[key]  # its host has left; a new job may have this address
    where = f"MASTER_ADDR={place.address}, MASTER_PORT={place.port}"
    # torchrun's agent keeps the store itself
    host = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=_PATIENCE)
    try:
        socket.getaddrinfo(place.address, place.port)
        store = TCPStore(
            place.address, place.port, None, host, limit, wait_for_workers=False, multi_tenant=True
        )
    except socket.gaierror as error:
        raise ProcessError(f"no machine has this name ({error}): {where}") from error
    except dist.DistError as error:
        hint = "is the port taken by another job?" if host else "is process 0 there and reachable?"
        raise ProcessError(
            f"cannot {'listen at' if host else 'reach'} {where}: {hint} "
            f"[{str(error).splitlines()[0]}]"
        ) from error
    _known[key] = _Connection(store)
    return _known[key]


def _compare(survey: Survey, device: torch.device) -> int:
    """See that the processes can exchange data, use the same devices, and share no GPU."""
    import torch.distributed as dist

    place, limit = survey.place, timedelta(seconds=_PATIENCE)
    mine = (place.rank, socket.gethostname(), device.type, _gpu(device))
    found: list[Any] = [None] * place.world
    try:
        dist.init_process_group(
            "gloo",
            store=survey.part("trial"),
            rank=place.rank,
            world_size=place.world,
            timeout=limit,
        )
        dist.all_gather_object(found, mine)
        dist.destroy_process_group()
    except RuntimeError as error:
        raise ProcessError(
            f"process {place.rank} of {place.world} found the others at {place.address}:"
            f"{place.port}, but cannot exchange data with them: name the network interface between "
            f"the nodes in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME [{str(error).splitlines()[0]}]"
        ) from error
    if len({kind for _, _, kind, _ in found}) > 1:
        kinds = ", ".join(f"process {r} on {host}: {kind}" for r, host, kind, _ in found)
        raise ProcessError(f"processes on different devices ({kinds}): name one for all")
    for rank, host, _, gpu in found:
        if gpu and gpu == mine[3] and rank != place.rank:
            raise ProcessError(
                f"processes {_list(sorted([rank, place.rank]))} share one GPU of {host}: start no "
                f"more processes there than it has GPUs ({torch.cuda.device_count()} are visible)"
            )
    return sum(host == mine[1] for _, host, _, _ in found)


def _gpu(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _list(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
