"""Bring weights into a local cache: one network of an official file, or a file of the Hub.

The official files hold three networks and the optimizer's state; `fetch_official` moves only the
bytes of one network and keeps them as safetensors, which later calls map into memory.
"""

import errno
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from ..errors import FetchError
from .download import download

__all__ = ["FetchError", "cache_folder", "fetch_hub", "fetch_official"]

_log = logging.getLogger(__name__)
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The folder of fetched networks.

    It is ``cache_dir``, else ``$IJEPA_ZOO_CACHE``, else ``$XDG_CACHE_HOME/ijepa_zoo``, else
    ``~/.cache/ijepa_zoo``. It need not exist yet.
    """
    chosen = cache_dir or os.environ.get("IJEPA_ZOO_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ijepa_zoo"


def fetch_official(
    url: str,
    network: str,
    *,
    cache_dir: str | Path | None = None,
    size: int | None = None,
    sha256: str | None = None,
    progress: bool = True,
    workers: int = 8,
) -> Path:
    """Bring one network of a ``torch.save`` file at a URL into the cache.

    A file that is whole in the cache is returned without any request. An interrupted download goes
    on where it was; of several processes that want the same network one downloads, the others
    wait. Every storage is checked against the CRC-32 in the remote archive's directory.

    Args:
        url: Address of a zip-format ``torch.save`` file, on a server that answers range requests.
        network: Top-level key with a dict of tensors, such as ``target_encoder``.
        cache_dir: See `cache_folder`.
        size: Bytes that the remote file must have.
        sha256: Hash, in hex digits, that the network must have: SHA-256 of all bytes behind the
            header of the resulting file, which are the tensors' elements, little-endian, C order,
            tensors by dtype and name as safetensors files have them. ``safetensors.torch.save``
            of the same tensors has the same bytes there.
        progress: Show a bar.
        workers: Parallel requests.

    Returns:
        Path of a safetensors file; tensors are named as in the remote dict. Its metadata records
        ``url``, ``network``, ``etag``, ``size`` (bytes, remote) and ``sha256``.

    Raises:
        FetchError: The network cannot be had, or is not the one that was asked for.
    """
    path = cache_folder(cache_dir) / _file_name(url, network)
    with _clear_disk_errors(path.parent):
        if not path.exists():
            _refuse_offline(url, path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with _sole_process(path):
                if not path.exists():
                    download(url, network, path, size, sha256, progress, workers)
        _check_identity(path, size, sha256)
    return path


def fetch_hub(
    repo_id: str,
    filename: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Bring one file of a Hugging Face repository here; `huggingface_hub` does the work.

    Its cache, token, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` hold.

    Args:
        repo_id: Such as ``facebook/ijepa_vith14_1k``.
        filename: Path inside the repository.
        revision: Branch, tag or commit; None for the default branch.
        cache_dir: Instead of the Hub's own cache folder.

    Returns:
        Path of the file in the cache.

    Raises:
        FetchError: The file cannot be had; the message says why and what to do.
    """
    from huggingface_hub import errors, hf_hub_download

    transport: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # of its HTTP client
    try:
        return Path(hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir))
    except (
        *(transport, errors.EntryNotFoundError, errors.HFValidationError, OSError),
        RuntimeError,  # up to 1.32 it tries again over a client that it has closed
    ) as error:
        raise FetchError(
            f"{filename!r} of Hugging Face repository {repo_id!r} (revision {revision or 'main'}): "
            f"{_hub_advice(error)}"
        ) from error


def _hub_advice(error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return (
            "access is restricted. Ask for it on the repository's page, then log in with "
            f"'hf auth login' or set HF_TOKEN ({_first_line(error)})"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or it is private. Check the name; log in with 'hf auth login'"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision. Check it, or leave it out"
    if isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return (
            "it is not in the cache and HF_HUB_OFFLINE is set. Unset it, or run once with a "
            "network and take the cache folder along (HF_HOME)"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | RuntimeError):
        return (
            "it is not in the cache and the Hub cannot be reached. Check the network, proxy "
            f"settings and HF_ENDPOINT ({_first_line(error.__cause__ or error)})"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return "the repository has no such file"
    if isinstance(error, errors.HFValidationError):
        return "not a repository name; write OWNER/NAME"
    if isinstance(error, errors.HTTPError):  # type: ignore[attr-defined]
        return f"the transfer failed ({_first_line(error)}). Run again to resume"
    return f"cannot write it into the cache ({error}). Choose another folder with HF_HOME"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _file_name(url: str, network: str) -> str:
    base = url.split("?")[0].rsplit("/", 1)[-1].removesuffix(".tar").removesuffix(".pth")
    readable = re.sub(r"[^\w.-]", "_", f"{base}.{network}")[:150]
    digest = hashlib.sha256(f"{url}\n{network}".encode()).hexdigest()
    return f"{readable}-{digest[:12]}.safetensors"


def _refuse_offline(url: str, path: Path) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise FetchError(
            f"{url} is not in the cache and HF_HUB_OFFLINE is set. Unset it, or copy "
            f"{path.name} from a machine that has it into {path.parent}"
        )


@contextmanager
def _clear_disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the local disk into `FetchError` (those of the network already are)."""
    choose = "another cache folder with cache_dir=... or the variable IJEPA_ZOO_CACHE"
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise FetchError(
                f"the disk of the cache folder {folder} is full. Make room and run again to "
                f"resume, or choose {choose}"
            ) from error
        raise FetchError(
            f"the cache folder {folder} cannot be used ({error}). Choose {choose}"
        ) from error


@contextmanager
def _sole_process(path: Path) -> Iterator[None]:
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("another process fetches %s; waiting for it", path.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_identity(path: Path, size: int | None, sha256: str | None) -> None:
    """Compare a file of the cache with what the caller expects; reads its header only."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise FetchError(f"{path} is damaged ({error}). Delete it and run again") from error
    for key, expected in (("size", size), ("sha256", sha256)):
        if expected is not None and metadata.get(key) != str(expected).lower():
            raise FetchError(
                f"{path} holds other weights than expected: {key} is {metadata.get(key)}, not "
                f"{expected}. Correct the expected {key}, or delete the file and run again"
            )
