"""Write weights so that timm, transformers or the published code loads them without this package.

Every layout is a folder, written under a temporary name and renamed when it is whole.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..models.encoder import IJepaEncoder
from ..models.jepa import IJepa
from . import writers
from .bundle import Bundle, from_module, from_source, local_source
from .layouts import some

WRITERS = {
    "native": writers.write_native,
    "timm": writers.write_timm,
    "transformers": writers.write_transformers,
    "official": writers.write_official,
}


def export(
    model: IJepa | IJepaEncoder | Bundle | str | Path,
    folder: str | Path,
    to: str = "native",
    *,
    network: str | None = None,
    dtype: torch.dtype | None = None,
    license: str | None = None,
    overwrite: bool = False,
    push_to: str | None = None,
    **source_kwargs: Any,
) -> Path:
    """Write a folder that another library loads.

    Args:
        model: A model in memory; or a name of released weights, a checkpoint file or folder, whose
            tensors are then copied without being changed.
        folder: Where to write; must not exist, unless ``overwrite``.
        to: 'native' (all networks at hand, also a timm folder), 'timm' (``timm.create_model(
            'local-dir:FOLDER')``), 'transformers' (``IJepaModel.from_pretrained``) or 'official'
            (the published code's .pth.tar; needs all three networks).
        network: Which network a single-network layout gets; default 'target_encoder'. For a single
            encoder in memory and for a file that does not say it: which network it is.
        dtype: Store tensors in this data type; None keeps theirs.
        license: Licence of the weights (SPDX), for the model card; default: what the source says.
        overwrite: Replace an existing folder, once the new one is whole.
        push_to: Also upload the folder to this repository of the Hugging Face Hub.
        **source_kwargs: For a checkpoint: ``model_name``, ``cache_dir`` and timm arguments of the
            encoder, see :func:`ijepa_zoo.weights.bundle.from_source`.

    Returns:
        The folder.

    Raises:
        ijepa_zoo.weights.layouts.CheckpointError: If the networks that the layout needs are not
            there, or cannot be expressed in it.
        FileExistsError: If ``folder`` exists and ``overwrite`` is false, or if it is no export or
            holds the source.
        OSError: If it cannot be written; an existing folder is as it was.
    """
    if to not in WRITERS:
        raise ValueError(f"to must be one of {', '.join(WRITERS)}, got {to!r}")
    if network not in (None, "target_encoder", "encoder"):
        raise ValueError(f"network must be 'target_encoder' or 'encoder', got {network!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists: choose another name, or overwrite it")
    if folder.exists():
        refuse_foreign(folder)
    if isinstance(model, Bundle):
        bundle = model
    elif isinstance(model, str | Path):
        _refuse_source(model, folder)
        name, single = source_kwargs.pop("model_name", None), to in ("timm", "transformers")
        bundle = from_source(model, name, network, single, **source_kwargs)
    else:
        if source_kwargs:
            raise TypeError(f"only for a checkpoint, not for a model: {', '.join(source_kwargs)}")
        bundle = from_module(model, network)
    if license is not None:
        bundle = replace(bundle, license=license)
    write = WRITERS[to]
    write_whole(folder, lambda part: write(bundle, part, network, dtype))
    if push_to is not None:
        push(folder, push_to)
    return folder


def refuse_foreign(folder: Path) -> None:
    """Overwriting replaces a whole folder, so it must hold nothing but an earlier export.

    Raises:
        FileExistsError: It holds something else.
    """
    foreign = (
        {item.name for item in folder.iterdir()} - writers.WRITTEN
        if folder.is_dir()
        else {"a file"}
    )
    if foreign:
        raise FileExistsError(
            f"{folder} is no export of this package, it holds {some(foreign)}: it is not "
            "overwritten, choose another name"
        )


def _refuse_source(source: str | Path, folder: Path) -> None:
    """The folder that is replaced must not hold what is being copied."""
    place = local_source(source)
    if place is not None and folder.exists():
        place, target = place.resolve(), folder.resolve()
        if place == target or target in place.parents:
            raise FileExistsError(
                f"{folder} holds the source {source} itself: it is not overwritten, choose another "
                "name"
            )


def push(folder: Path, repo_id: str) -> None:
    """Upload a folder to the Hugging Face Hub, creating the repository if need be."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=folder)


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder, then put it in the place of ``folder``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(part)
        part.chmod(0o755)
        for item in part.rglob("*"):  # safetensors makes files that only their owner reads
            item.chmod(0o755 if item.is_dir() else 0o644)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            aside = old / folder.name
            try:
                os.replace(folder, aside)
                os.replace(part, folder)
            finally:  # also after Ctrl-C: one of the two is at its place before anything is removed
                if aside.exists() and not folder.exists():
                    os.replace(aside, folder)
                shutil.rmtree(old)
        else:
            os.replace(part, folder)
    finally:
        if part.exists():
            shutil.rmtree(part)
