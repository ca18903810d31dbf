"""Precision of matrix products: what a device multiplies natively, autocast, and float8.

Products in float8 are those of the Linear layers of the encoders' blocks, by torchao. Every tensor
is scaled dynamically (one scale each), so there is no state: checkpoints are those of any run, and
resuming is exact. Outputs and gradients of inputs are products of float8 matrices; gradients of
weights are products of bfloat16 matrices, as is everything else under autocast. The predictor
stays in bfloat16: at a width of 384 rounding its tensors costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

from ..errors import MissingPackageError, SettingsError
from ..models.jepa import IJepa
from .config import Precision, PretrainConfig, override

_MIN_TORCHAO = 0, 18  # older ones miscompile with torch from 2.14 on: values that are not finite
_MIN_CAPABILITY = 8, 9  # Ada; Hopper is 9.0
_MULTIPLE = 16  # sizes that the kernels take; other layers stay as they are


def has_native_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices itself and does not emulate it.

    CUDA GPUs do from compute capability 8.0 (A100), x86 CPUs with AVX512-BF16 or AMX.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        if not hasattr(torch.cpu, "get_capabilities"):  # older torch
            return bool(torch.cpu._is_avx512_bf16_supported())  # CPUs with AMX have it too
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return False


def resolve_precision(
    config: PretrainConfig, device: torch.device, before: PretrainConfig | None = None
) -> PretrainConfig:
    """Replace `optim.precision=auto` by the precision that a run uses."""
    if config.optim.precision != "auto":
        return config
    new: Precision = "bf16" if has_native_bf16(device) else "fp32"
    return override(config, **{"optim.precision": before.optim.precision if before else new})


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context of a forward pass: bfloat16 by autocast, unless in `fp32`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != "fp32")


def require_float8(device: torch.device) -> None:
    """Check that float8 products work here, before anything is built."""
    try:
        found = tuple(int(part) for part in version("torchao").split(".")[:2])
    except PackageNotFoundError:
        found = (0, 0)
    if found < _MIN_TORCHAO:
        raise MissingPackageError(
            "optim.precision=fp8 needs torchao 0.18: pip install 'torchao>=0.18' 'torch>=2.11', or "
            "use optim.precision=bf16"
        )
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < _MIN_CAPABILITY:
        raise SettingsError(
            f"{device} has no float8 products, which need a GPU of compute capability 8.9 or more: "
            "use optim.precision=bf16"
        )


def use_float8(model: IJepa) -> None:
    """Let the Linear layers of the encoders' blocks multiply in float8; names stay."""
    from torchao import float8

    off = float8.ScalingType.DISABLED
    config = float8.Float8LinearConfig(
        cast_config_input_for_grad_weight=float8.CastConfig(scaling_type=off),
        cast_config_grad_output_for_grad_weight=float8.CastConfig(scaling_type=off),
    )
    for encoder in (model.encoder, model.target_encoder):
        if not any(_fits(module, "") for module in encoder.blocks.modules()):
            raise SettingsError(
                f"optim.precision=fp8 needs layers whose sizes are multiples of {_MULTIPLE}, and "
                f"model.embed_dim={encoder.embed_dim} has none: use optim.precision=bf16"
            )
        float8.convert_to_float8_training(encoder.blocks, module_filter_fn=_fits, config=config)


@contextmanager
def without_float8(network: nn.Module) -> Iterator[None]:
    """Let a network multiply as it would without `use_float8`; the layers stay the same objects.

    For metrics of features: rounding is noise in all directions, which adds a tenth to the
    effective rank of the features of a small random network.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Linear) and type(m) is not nn.Linear]
    kinds = [type(layer) for layer in layers]
    for layer in layers:
        layer.__class__ = nn.Linear
    try:
        yield
    finally:
        for layer, kind in zip(layers, kinds):
            layer.__class__ = kind


def _fits(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and all(s % _MULTIPLE == 0 for s in module.weight.shape)
