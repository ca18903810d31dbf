"""Products of the encoders' blocks in float8, by torchao.

Scales are taken anew from every tensor (one each), so there is no state: checkpoints are those of
any run, and resuming is exact. Outputs and gradients of the inputs are products of float8
matrices, gradients of the weights of bfloat16 ones, as is everything else under autocast. The
predictor stays in bfloat16: at a width of 384 rounding its tensors costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MissingPackageError, SettingsError
from ..models.jepa import IJepa

_LEAST_TORCHAO = 0, 18  # older ones miscompile with torch from 2.14 on: values that are not finite
_MULTIPLE = 16  # sizes that the kernels take
_LEAST_CAPABILITY = 8, 9  # Ada; Hopper is 9.0


def require_float8(device: torch.device) -> None:
    """Refuse what cannot work before anything is built.

    Raises:
        ImportError: torchao is missing or too old.
        ValueError: The device has no float8 products and is no CPU, where they are emulated.
    """
    remedy = "pip install 'ijepa-zoo[fp8]', or use the precision bf16"
    try:
        import torchao.float8  # noqa: F401

        found = version("torchao")
    except ImportError as error:
        raise MissingPackageError(f"the precision fp8 needs torchao: {remedy}") from error
    if tuple(int(part) for part in found.split(".")[:2]) < _LEAST_TORCHAO:
        least = ".".join(map(str, _LEAST_TORCHAO))
        raise MissingPackageError(f"the precision fp8 needs torchao {least}, not {found}: {remedy}")
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise SettingsError(f"the device {device} has no float8 products: use the precision bf16")
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        raise SettingsError(
            f"{torch.cuda.get_device_name(device)} has no float8 products (compute capability "
            f"{capability[0]}.{capability[1]}, they need {_LEAST_CAPABILITY[0]}."
            f"{_LEAST_CAPABILITY[1]}): use the precision bf16"
        )


def float8_remark(device: torch.device, compiled: bool) -> str:
    """What a user should know about a run in fp8 before it starts; empty when all is well."""
    if device.type == "cpu":
        return " (emulated on a CPU: slower than bf16, for trials)"
    return "" if compiled else " (meant for runtime.compile=true)"


def use_float8(model: IJepa, device: torch.device) -> None:
    """Let the Linear layers of the encoders' blocks multiply in float8.

    The layers are replaced, their parameters and names stay. Those whose sizes are no multiples of
    16 stay as they are.

    Args:
        model: The networks; changed in place.
        device: Where they will run; on a CPU the products are emulated.

    Raises:
        ValueError: No layer has such sizes.
    """
    from torchao.float8 import (
        CastConfig,
        Float8LinearConfig,
        ScalingType,
        convert_to_float8_training,
    )

    config = Float8LinearConfig(
        cast_config_input_for_grad_weight=CastConfig(scaling_type=ScalingType.DISABLED),
        cast_config_grad_output_for_grad_weight=CastConfig(scaling_type=ScalingType.DISABLED),
        emulate=device.type == "cpu",
    )
    for encoder in (model.encoder, model.target_encoder):
        before = set(encoder.blocks.modules())
        convert_to_float8_training(encoder.blocks, module_filter_fn=_fits, config=config)
        changed = set(encoder.blocks.modules()) - before
        if not changed:
            raise SettingsError(
                f"the precision fp8 needs layers whose sizes are multiples of {_MULTIPLE}; "
                f"model.embed_dim={encoder.embed_dim} has none: use the precision bf16"
            )
        if device.type == "cpu":
            for layer in changed:
                layer.register_forward_pre_hook(_autocast_on_cpu)


@contextmanager
def without_float8(network: nn.Module) -> Iterator[None]:
    """Let a network multiply as it would without `use_float8`; the layers stay the same objects.

    For what is measured of features: rounding is noise in all directions, which adds a tenth to the
    effective rank of those of a small random network.

    Args:
        network: Changed or not, sharded or not, compiled or not.
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
    return isinstance(module, nn.Linear) and not any(
        size % _MULTIPLE for size in module.weight.shape
    )


def _autocast_on_cpu(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """torchao's layers ask whether CUDA is under autocast, and do not see that a CPU is."""
    if torch.is_autocast_enabled("cpu"):
        return tuple(x.to(torch.get_autocast_dtype("cpu")) for x in inputs)
    return None
