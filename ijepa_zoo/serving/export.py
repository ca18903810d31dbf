"""Write a model for servers, and keep the file only if it computes what the model computes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.scenes import SPLIT_STARTS, render_scenes
from ..errors import RunError, SettingsError
from ..extract import model_name, weights_fingerprint
from ..features import Layers
from ..progress import progress_bar
from ..weights.export import write_whole
from . import formats
from .graph import INPUT, OUTPUT, PixelsToFeatures, evaluating, preprocessing, trace

RECORD = "serving.json"
_WRITTEN = {*formats.FILES.values(), formats.WEIGHTS_FILE, RECORD}
_DTYPES = {dtype: getattr(torch, dtype) for dtype in ("float32", "float16", "bfloat16")}
_BATCHES = (1, 2, 5)  # images of the checks
# Largest |file - model in float32| / |model in float32|: rounding stays well below, errors do not.
_LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "int8": 1e-1}


def export_graph(
    model: nn.Module,
    folder: str | Path,
    to: str = "onnx",
    *,
    layers: Layers = "last",
    pool: str | None = "avg",
    dtype: str = "float32",
    quantize: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write a model as a file that a server runs without this package.

    The graph takes uint8 RGB pixels ``images [B, 3, H, W]`` for any ``B``, normalises them and
    returns float32 ``features``: ``[B, nD]`` for n blocks, or maps ``[B, nD, h, w]``. How a
    photograph becomes such pixels is in ``serving.json`` beside it, with the model, its licence and
    how far the file is from the model. It is read back and compared with the model in float32 on
    rendered scenes, in batches of 1, 2 and 5 images; a file that disagrees is not kept.

    Args:
        model: A timm ViT, such as :func:`ijepa_zoo.create_model` makes.
        folder: Where to write; must not exist, unless ``overwrite``.
        to: 'onnx' (``model.onnx``, with the weights in ``model.onnx.data`` where they are more than
            a protobuf file holds) or 'torch-export' (``model.pt2`` for ``torch.export.load``).
        layers: 'last', 'last4' or block indices, see :class:`ijepa_zoo.FeatureExtractor`.
        pool: 'avg' for the mean over patches, None for maps.
        dtype: 'float32', 'float16' or, for 'torch-export', 'bfloat16': of weights and computation.
        quantize: 'int8' for linear layers in 8 bits, for 'onnx' on CPUs. Activations are scaled by
            the range of each batch, so features depend a little on the other images of the batch.
        license: Licence of the weights (SPDX), for the record; default: what the model says.
        overwrite: Replace an earlier file of this kind, once the new one is whole.
        progress: Show progress: a bar in a terminal, a line every 30 s elsewhere.

    Returns:
        The folder.

    Raises:
        RunError: If the written file disagrees with the model, if the model's own features are not
            finite, or all zero, if ``folder`` exists and ``overwrite`` is false or holds something
            else, or if it cannot be written; an existing folder is as it was.
        ImportError: If a package for ONNX is missing.
        ValueError: If the options do not fit each other or the model.
    """
    folder = Path(folder)
    check_request(folder, to, dtype=dtype, quantize=quantize, overwrite=overwrite)
    reference = PixelsToFeatures(model, layers, pool, torch.float32)
    graph = PixelsToFeatures(model, layers, pool, _DTYPES[dtype])
    record = {
        "format": 1,
        "file": formats.FILES[to],
        "preprocessing": preprocessing(model),
        **_description(model, license),
        "layers": graph.extractor.layers,
        "pool": pool,
        "precision": quantize or dtype,
    }

    with evaluating(reference):
        expected = _expected(reference)

    def fill(part: Path) -> None:
        steps = 2 + len(_BATCHES)
        with progress_bar(progress, steps, "trace", "step") as bar, evaluating(graph):
            program = trace(graph)
            bar.update()
            bar.set_description("write", refresh=False)
            formats.write(program, part, to, quantize)
            bar.update()
            bar.set_description("check", refresh=False)
            run = formats.reopen(part, to)
            checked = _compare(run, expected, str(record["precision"]), bar)
        _write_record(part / RECORD, {**record, **checked, "versions": formats.versions(to)})

    write_whole(folder, fill)
    return folder


def check_request(
    folder: str | Path, to: str, *, dtype: str, quantize: str | None, overwrite: bool
) -> None:
    """Refuse what `export_graph` would, before a model is fetched.

    Raises:
        ValueError: If the options do not fit each other.
        RunError: If ``folder`` is not to be written.
        ImportError: If a package for ONNX is missing.
    """
    if to not in formats.FILES:
        raise SettingsError(f"no format {to!r}: use one of {', '.join(formats.FILES)}")
    if dtype not in _DTYPES:
        raise SettingsError(f"no data type {dtype!r}: use one of {', '.join(_DTYPES)}")
    if quantize not in (None, "int8"):
        raise SettingsError(f"no quantization {quantize!r}: there is int8")
    if to == "onnx" and dtype == "bfloat16":
        raise SettingsError(
            "onnxruntime has no bfloat16 convolution on CPUs: use float16 or int8 for onnx, or "
            "torch-export"
        )
    if quantize and (to, dtype) != ("onnx", "float32"):
        raise SettingsError(
            f"int8 is made from onnx in float32, not from {to} in {dtype}; the fast precision of "
            "torch-export is bfloat16"
        )
    _check_place(Path(folder), overwrite)
    if to == "onnx":
        formats.require_onnx()


def _check_place(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not overwrite:
        raise RunError(
            f"{folder} exists: choose another name, or replace it, overwrite=True (--overwrite)"
        )
    held = {item.name for item in folder.iterdir()} if folder.is_dir() else {"a file"}
    if held - _WRITTEN:
        raise RunError(
            f"{folder} is no earlier file for servers, it holds {min(held - _WRITTEN)}: it is not "
            "overwritten, choose another name"
        )


def _description(model: nn.Module, license: str | None) -> dict[str, Any]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    network, _, origin = getattr(model, "weights_origin", "not from a checkpoint").partition(" of ")
    return {
        "model": model_name(model),
        "weights": f"{network} of {Path(origin).name}" if origin else network,
        "weights_hash": weights_fingerprint(model),
        "license": license or cfg.get("license"),
    }


def _expected(reference: PixelsToFeatures) -> list[tuple[Tensor, Tensor]]:
    """Batches of images and the model's features of them, which a file is compared with.

    Raises:
        RunError: If the features are good for no comparison, nor for anything else.
    """
    with torch.inference_mode():
        batches = [(images, reference(images)) for images in _check_images(reference.size)]
    for _, features in batches:
        if not features.isfinite().all():
            raise RunError(_useless("not finite (NaN or infinite)"))
        if not features.any():
            raise RunError(_useless("all zero"))
    return batches


def _useless(what: str) -> str:
    return (
        f"the model's own features are {what} in float32, before any export: nothing is written; "
        "use other weights, such as an earlier checkpoint"
    )


def _compare(
    run: formats.Run, expectations: list[tuple[Tensor, Tensor]], precision: str, bar: Any
) -> dict[str, Any]:
    """Input, output and agreement of a written file.

    Raises:
        RunError: If it is further from the model than its precision explains.
    """
    checks, cosines = [], []
    for images, expected in expectations:
        with torch.inference_mode():
            got = run(images)
        if got.shape != expected.shape or got.dtype != torch.float32:
            raise RunError(
                f"the file gives {got.dtype} {list(got.shape)} for {len(images)} images, the model "
                f"float32 {list(expected.shape)}: it is not kept"
            )
        if not got.isfinite().all():
            raise RunError(
                f"the file's features are not finite in {precision}, the model's in float32 are: "
                f"it is not kept{'' if precision == 'float32' else '; use float32'}"
            )
        error = float((got - expected).norm() / expected.norm())
        limit = _LIMITS[precision]
        if error > limit:
            raise RunError(
                f"the file differs from the model by {error:.2g} of the features' size for "
                f"{len(images)} images, more than {precision} explains ({limit:g}): it is not "
                f"kept{'' if precision == 'float32' else '; use float32'}"
            )
        checks.append({"images": len(images), "relative_error": error})
        cosines.append(F.cosine_similarity(got.flatten(1), expected.flatten(1)).min().item())
        bar.update()
    checked = {"on": "rendered scenes", "limit": _LIMITS[precision], "batches": checks}
    return {
        "input": _tensor(INPUT, "uint8", images),
        "output": _tensor(OUTPUT, "float32", expected),
        "checked": {**checked, "lowest_cosine": min(cosines)},
    }


def _tensor(name: str, dtype: str, example: Tensor) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": ["batch", *example.shape[1:]]}


def _check_images(size: tuple[int, int]) -> Iterator[Tensor]:
    """uint8 batches ``[B, 3, H, W]`` of the sizes of `_BATCHES`."""
    scenes = render_scenes(0, SPLIT_STARTS["test"], sum(_BATCHES))
    images = torch.from_numpy(scenes["images"]).permute(0, 3, 1, 2).float()
    resized = F.interpolate(images, size, mode="bilinear", align_corners=False)
    yield from torch.split(resized.round().to(torch.uint8), list(_BATCHES))


def _write_record(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
