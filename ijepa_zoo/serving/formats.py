"""The two file formats: how each is written, and how it runs again."""

import importlib
import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..errors import MissingPackageError, SettingsError
from .graph import INPUT, OUTPUT

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

FILES = {"onnx": "model.onnx", "torch-export": "model.pt2"}
WEIGHTS_FILE = "model.onnx.data"
_ONE_FILE = 1_900_000_000  # bytes of weights; protobuf, ONNX's format, ends at 2 GiB
_OPSET = 18  # the lowest that torch writes; newer ones were not faster
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Run = Callable[[Tensor], Tensor]


def require_onnx() -> None:
    """Refuse before any work where a package is missing.

    Raises:
        ImportError: With what to install, or why an installed package cannot be loaded.
    """
    missing = []
    for name in _ONNX_PACKAGES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            missing.append(name)
        except (ImportError, OSError) as error:  # such as a missing system library
            raise MissingPackageError(
                f"writing ONNX needs {name}, which is installed but cannot be loaded ({error}): "
                "install what is missing there, or use torch-export"
            ) from error
    if missing:
        raise MissingPackageError(
            f"writing ONNX needs {', '.join(missing)}: pip install 'ijepa-zoo[onnx]'"
        )


def write(program: ExportedProgram, folder: Path, to: str, quantize: str | None) -> None:
    """Write the program into a folder, as `FILES` names it.

    Raises:
        OSError: If it cannot be written.
    """
    path = folder / FILES[to]
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    _check_space(folder, 3 * weights if quantize else weights)
    if to == "torch-export":
        content = io.BytesIO()  # given a path, torch ends the process where it cannot write
        torch.export.save(program, content)
        path.write_bytes(content.getbuffer())
        return
    made = _to_onnx(program)
    if quantize is None:
        made.save(path, external_data=weights > _ONE_FILE)
        return
    # The quantizer asks on the root logger for constants to be folded; torch has folded them.
    made.model.metadata_props["onnx.quant.pre_process"] = "onnxruntime.quant"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made.save(Path(scratch) / path.name, external_data=weights > _ONE_FILE)
        _quantize(Path(scratch) / path.name, path)


def _check_space(folder: Path, size: int) -> None:
    """Refuse before a long work."""
    free = shutil.disk_usage(folder).free
    if free < 1.1 * size:
        raise OSError(f"{free:,} bytes free, and {size:,} are to be written")


def _to_onnx(program: ExportedProgram) -> "ONNXProgram":
    made = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=_OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes={INPUT: {0: "batch"}},
        verbose=False,
    )
    if made is None:  # torch's type, for its older exporter
        raise SettingsError("torch.onnx.export gave no program")
    return made


def _quantize(source: Path, path: Path) -> None:
    """Linear layers in int8: weights by output channel, activations by the range of each batch."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        path,
        op_types_to_quantize=["MatMul"],  # those with constant weights; attention stays float
        per_channel=True,
        weight_type=QuantType.QInt8,
    )


def reopen(folder: Path, to: str) -> Run:
    """The written file as a server opens it: from uint8 images to features."""
    path = folder / FILES[to]
    if to == "torch-export":
        return torch.export.load(path).module()
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def versions(to: str) -> dict[str, str]:
    """The packages that made the file and checked it."""
    from importlib.metadata import version

    names = ("torch", "timm", *(_ONNX_PACKAGES if to == "onnx" else ()))
    return {name: version(name) for name in names}
