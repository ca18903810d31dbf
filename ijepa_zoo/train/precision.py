"""The data type of matrix products: what a device multiplies natively, and autocast."""

from __future__ import annotations

import logging

import torch

from .config import Precision, PretrainConfig
from .settings import override

_log = logging.getLogger(__name__)


def has_native_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices itself and does not emulate it.

    CUDA GPUs do from compute capability 8.0 (A100), x86 CPUs with AVX512-BF16 or AMX.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return False


def resolve_precision(
    config: PretrainConfig, device: torch.device, before: PretrainConfig | None = None
) -> PretrainConfig:
    """Replace `optim.precision=auto` by the precision that a run uses.

    Args:
        config: Settings.
        device: Where a new run computes.
        before: Settings of the run that is resumed, whose precision stays on every device: another
            one would change the result.
    """
    if config.optim.precision != "auto":
        return config
    new: Precision = "bf16" if has_native_bf16(device) else "fp32"
    return override(config, **{"optim.precision": before.optim.precision if before else new})


def warn_of_emulated_bf16(precision: Precision, device: torch.device) -> None:
    """Log that the device is slow with this precision, if it is."""
    if precision == "bf16" and not has_native_bf16(device):
        _log.warning(
            "optim.precision=bf16 is slow on this device (%s), which emulates bfloat16 products; a "
            "new run with optim.precision=fp32 would be faster", device,
        )  # fmt: skip


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context of a forward pass: bfloat16 by autocast, unless in `fp32`.

    Args:
        device: Where the networks are.
        precision: See `OptimConfig`, not `auto`; with `fp8`, the layers that compute in it were
            replaced.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != "fp32")
