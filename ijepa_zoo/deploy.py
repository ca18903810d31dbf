"""Export a model for servers as ONNX or torch.export: uint8 pixels in, float32 features out."""

import copy
import io
import json
import re
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from math import floor, inf
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.layers import Format
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from .data.transforms import transform_config
from .encode import DTYPES, class_names, model_name, weights_fingerprint
from .errors import MissingPackageError, RunError, SettingsError
from .features import FeatureExtractor, Layers
from .progress import progress_bar
from .weights.export import check_destination, write_folder

FILES = {"onnx": "model.onnx", "torch-export": "model.pt2"}
RECORD = "serving.json"
WRITTEN = (*FILES.values(), "model.onnx.data", RECORD)
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_OPSET = 18  # the lowest that torch writes and that has an antialiased Resize
_ONE_FILE = 1_900_000_000  # bytes of weights inside model.onnx; protobuf ends at 2 GiB
_BATCHES = (1, 2, 5)  # images of the checks
# Largest |file - model in float32| / |model in float32|: well above rounding, below real errors.
_LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "int8": 1e-1}


def export_graph(
    model: nn.Module,
    folder: str | Path,
    to: str = "onnx",
    *,
    layers: Layers = "last",
    pool: str | None = "auto",
    output: Literal["auto", "features", "logits"] = "auto",
    dtype: str = "float32",
    quantize: str | None = None,
    dynamic_size: bool = False,
    license: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Export a model as a file that a server runs without this package; returns the folder.

    The graph takes uint8 RGB pixels ``images [B, 3, H, W]`` for any ``B``, normalizes them and
    returns float32 ``features``: ``[B, nD]`` for n blocks, or maps ``[B, nD, h, w]``. A classifier
    returns ``logits``: ``[B, classes]``, or maps ``[B, classes, H, W]``. ``serving.json`` beside it
    has the preceding resize and crop, the shapes, the model, its license and the error of the file
    against the model in float32. A file with a large error is not kept.

    Args:
        model: A timm model, for example from :func:`ijepa_zoo.create_model`.
        folder: Output folder; must not exist unless ``overwrite``.
        to: 'onnx' (``model.onnx``, and ``model.onnx.data`` for weights beyond 1.9 GB) or
            'torch-export' (``model.pt2`` for ``torch.export.load``).
        layers: See :class:`ijepa_zoo.FeatureExtractor`.
        pool: See there.
        output: 'features', 'logits' of a classifier, or 'auto': logits if the model has them.
        dtype: 'float32', 'float16' or, for 'torch-export', 'bfloat16': of weights and computation.
        quantize: 'int8' for linear layers in 8 bits, for 'onnx' on CPUs. Activations are scaled by
            the range of each batch, so features depend a little on the other images of the batch.
        dynamic_size: Accept any ``H`` and ``W`` that are multiples of the patch size, at least two
            patches each; positions are resampled as by timm's ``dynamic_img_size``.
        license: License of the weights (SPDX); default: that of the model's ``pretrained_cfg``.
        overwrite: Replace an earlier export of this kind.
        progress: Show a progress bar.
    """
    folder = Path(folder)
    check_request(folder, to, dtype=dtype, quantize=quantize, overwrite=overwrite)
    if dynamic_size and to == "torch-export" and not hasattr(timm.layers, "is_exporting"):
        raise SettingsError(
            f"dynamic_size with torch-export needs a newer timm than {timm.__version__}, which "
            "resamples positions at every size: pip install -U timm, or use onnx"
        )
    names = class_names(model)
    if output == "auto":
        output = "features" if names is None else "logits"
    if output == "logits" and names is None:
        raise SettingsError("the model has no classifier: export its features")
    computed = None if output == "logits" else (layers, pool)
    reference = _Graph(model, computed, torch.float32, dynamic_size)
    graph = _Graph(model, computed, DTYPES[dtype], dynamic_size)
    precision = quantize or dtype
    packages = ("torch", "timm", *(_ONNX_PACKAGES if to == "onnx" else ()))
    record: dict[str, Any] = {
        "format": 1,
        "file": FILES[to],
        "preprocessing": _preprocessing(model),
        **_description(model, license),
        "precision": precision,
        "versions": {name: version(name) for name in packages},
    }
    if computed is None:
        record["classes"] = names
    else:
        record |= {"layers": graph.computed.layers, "pool": graph.computed.pool}
    with (
        progress_bar(progress, 3, "export", "step") as bar,
        write_folder(folder, WRITTEN, overwrite) as part,
    ):
        pairs = [(images, _features(reference, images)) for images in _some_pixels(reference)]
        program = _trace(graph)
        bar.update()
        _write(program, part, to, quantize, output)
        bar.update()
        record |= _shapes(graph, pairs[0][1])
        record["checked"] = _check(_load(part, to), pairs, precision)
        bar.update()
        (part / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return folder


def check_request(
    folder: str | Path, to: str, *, dtype: str, quantize: str | None, overwrite: bool
) -> None:
    """Raise the errors of `export_graph` for its arguments, before weights are downloaded."""
    if to not in FILES or dtype not in DTYPES or quantize not in (None, "int8"):
        raise SettingsError(f"to={to!r}, dtype={dtype!r} or quantize={quantize!r} does not exist")
    if to == "onnx" and dtype == "bfloat16":
        raise SettingsError("onnxruntime has no bfloat16 convolution on CPUs: use dtype float16")
    if quantize and (to, dtype) != ("onnx", "float32"):
        raise SettingsError(f"quantize={quantize!r} needs onnx and dtype float32: leave it out")
    check_destination(Path(folder), WRITTEN, overwrite)
    missing = [name for name in _ONNX_PACKAGES if to == "onnx" and find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"export to ONNX needs {', '.join(missing)}: pip install {' '.join(_ONNX_PACKAGES)}"
        )


class _Graph(nn.Module):
    """uint8 pixels ``[B, C, H, W]`` to float32 ``features`` (layers, pool), or logits if None."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        model: nn.Module,
        features: tuple[Layers, str | None] | None,
        dtype: torch.dtype,
        dynamic_size: bool,
    ) -> None:
        super().__init__()
        config = transform_config(model)
        self.size: tuple[int, int] = tuple(config["input_size"][1:])
        self.dtype = dtype
        self.register_buffer("pixel_mean", torch.tensor(config["mean"]).view(-1, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(config["std"]).view(-1, 1, 1))
        own: Any = _copy(model, dtype)
        encoder = getattr(own, "encoder", own)  # of a classifier
        self.patch_size = _accept_other_sizes(encoder) if dynamic_size else None
        self.output = "features" if features else "logits"
        self.computed: Any = FeatureExtractor(encoder, *features) if features else own
        self.computed.eval()

    def forward(self, images: Tensor) -> Tensor:
        normalized = images.float().div(255).sub(self.pixel_mean).div(self.pixel_std)
        outputs: Tensor = self.computed(normalized.to(self.dtype))
        return outputs.float()


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy to change; it shares the weights of a model on the CPU in that data type."""
    tensors = [*model.parameters(), *model.buffers()]
    kinds = {(t.device.type, t.dtype) for t in tensors if t.is_floating_point()}
    shared = {id(t): t for t in tensors} if kinds == {("cpu", dtype)} else {}
    return copy.deepcopy(model, shared).to("cpu", dtype)


def _accept_other_sizes(model: Any) -> tuple[int, int]:
    """Do what timm's constructor does for ``dynamic_img_size``; returns the patch size."""
    if not isinstance(model, VisionTransformer):  # rotary positions are traced for one size only
        raise SettingsError(
            f"dynamic_size needs a VisionTransformer of timm, not {type(model).__name__}: leave it "
            "out and export once for each image size"
        )
    model.dynamic_img_size = True
    model.patch_embed.strict_img_size = False
    model.patch_embed.flatten = False
    model.patch_embed.output_fmt = Format.NHWC
    return model.patch_embed.patch_size


def _trace(graph: _Graph) -> ExportedProgram:
    height, width = graph.size
    dynamic: dict[int, Any] = {0: Dim("batch", min=1, max=2**31 - 1)}
    if graph.patch_size is not None:
        patch_height, patch_width = graph.patch_size
        dynamic |= {2: patch_height * Dim("rows", min=2), 3: patch_width * Dim("columns", min=2)}
        # Not the model's own size, for which older versions of timm skip the resampling.
        height, width = height + patch_height, width + 2 * patch_width
    example = torch.zeros(2, len(graph.pixel_mean), height, width, dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(
            graph, (example,), dynamic_shapes={"images": dynamic}, strict=False
        )
    for node in program.graph.nodes:  # remove local file names
        node.meta.pop("stack_trace", None)
    return program


def _write(
    program: ExportedProgram, folder: Path, to: str, quantize: str | None, output: str
) -> None:
    path = folder / FILES[to]
    if to == "torch-export":
        content = io.BytesIO()  # given a path, torch aborts the process if it cannot write
        torch.export.save(program, content)
        path.write_bytes(content.getbuffer())
        return
    onnx_program = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=_OPSET,
        input_names=["images"],
        output_names=[output],
        dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}},
        verbose=False,
    )
    assert onnx_program is not None  # only torch's older exporter returns None
    external = sum(t.nbytes for t in program.state_dict.values()) > _ONE_FILE
    if quantize is None:
        onnx_program.save(path, external_data=external)
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # The quantizer warns unless constants are folded; torch has folded them.
    onnx_program.model.metadata_props["onnx.quant.pre_process"] = "onnxruntime.quant"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        onnx_program.save(Path(scratch) / path.name, external_data=external)
        quantize_dynamic(
            Path(scratch) / path.name,
            path,
            op_types_to_quantize=["MatMul"],  # those with constant weights; attention stays float
            per_channel=True,
            weight_type=QuantType.QInt8,
        )


def _load(folder: Path, to: str) -> Callable[[Tensor], Tensor]:
    """Open the written file as a server does."""
    path = folder / FILES[to]
    if to == "torch-export":
        return torch.export.load(path).module()
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _some_pixels(graph: _Graph) -> list[Tensor]:
    """Batches of random pixels of several numbers and, if they are free, sizes."""
    shapes = [(count, len(graph.pixel_mean), *graph.size) for count in _BATCHES]
    if graph.patch_size is not None:
        (height, width), (patch_height, patch_width) = graph.size, graph.patch_size
        shapes.append((2, len(graph.pixel_mean), height + 2 * patch_height, width))
        shapes.append((2, len(graph.pixel_mean), 2 * patch_height, width + 3 * patch_width))
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, s, dtype=torch.uint8, generator=generator) for s in shapes]


@torch.inference_mode()
def _features(reference: _Graph, images: Tensor) -> Tensor:
    features: Tensor = reference(images)
    if not features.isfinite().all() or not features.any():
        raise RunError(
            "the features of the model itself are NaN, infinite or all zero: export other "
            "weights, such as an earlier checkpoint"
        )
    return features


@torch.inference_mode()
def _check(
    run: Callable[[Tensor], Tensor], pairs: list[tuple[Tensor, Tensor]], precision: str
) -> dict[str, Any]:
    """Compare the file with the model; raise RunError above the limit of the precision."""
    limit, errors, cosines = _LIMITS[precision], [], []
    for images, expected in pairs:
        got = run(images)
        same_shape = got.shape == expected.shape
        error = float((got - expected).norm() / expected.norm()) if same_shape else inf
        if not error <= limit:  # also NaN
            raise RunError(
                f"the exported file differs from the model by {error:.2g} (relative) for "
                f"{list(images.shape)}, more than {limit:g}, the limit for {precision}: it is not "
                "kept; try another precision, or newer versions of torch and onnxscript"
            )
        errors.append(error)
        cosines.append(F.cosine_similarity(got.flatten(1), expected.flatten(1)).min().item())
    return {"limit": limit, "relative_error": max(errors), "lowest_cosine": min(cosines)}


def _shapes(graph: _Graph, features: Tensor) -> dict[str, Any]:
    """Input and output of the graph; free sizes have names."""
    size: list[Any] = list(graph.size)
    maps: list[Any] = list(features.shape[2:])
    multiple = {}
    if graph.patch_size is not None:
        size = ["height", "width"]
        maps = (size if graph.output == "logits" else ["rows", "columns"])[: len(maps)]
        multiple = {"multiple_of": list(graph.patch_size)}
    source, result = ["batch", len(graph.pixel_mean), *size], ["batch", features.shape[1], *maps]
    return {
        "input": {"name": "images", "dtype": "uint8", "shape": source, **multiple},
        "output": {"name": graph.output, "dtype": "float32", "shape": result},
    }


def _preprocessing(model: nn.Module) -> dict[str, Any]:
    """Resize and crop before the graph; ``resize`` is the short side, or ``[height, width]``."""
    config = transform_config(model)
    height, width = config["input_size"][1:]
    mode = config["crop_mode"]
    if mode not in ("center", "squash") or (mode == "center" and height != width):
        raise SettingsError(
            f"serving.json cannot describe the crop mode {mode!r} to {height}x{width} pixels: use "
            "a square img_size and the crop mode 'center'"
        )
    scaled = [floor(side / config["crop_pct"]) for side in (height, width)]
    return {
        "color": {1: "L", 3: "RGB"}.get(config["input_size"][0]),
        "resize": scaled[0] if mode == "center" else scaled,
        "interpolation": config["interpolation"],
        "antialias": True,
        "center_crop": [height, width],
        "normalization": "inside the graph",
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }


def _description(model: nn.Module, license: str | None) -> dict[str, Any]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    weights = getattr(model, "weights_origin", "not from a checkpoint")
    return {
        "model": model_name(model),
        "weights": re.sub(r"(^| of )/.*/", r"\1", weights),  # leave out local folders
        "weights_hash": weights_fingerprint(model),
        "license": license or cfg.get("license"),
    }
