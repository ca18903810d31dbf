"""Parallelize the networks over processes, from outside; their parameter names stay the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from ..distributed import Distributed
from ..models.jepa import IJepa
from .config import Precision, RuntimeConfig
from .precision import use_float8


def parallelize(
    model: IJepa,
    runtime: RuntimeConfig,
    distributed: Distributed,
    precision: Precision,
) -> nn.Module:
    """Move the networks to the device and parallelize them; make the optimizer afterwards.

    In this order: float8, activation checkpointing and compilation, the last two per block, then
    DDP or FSDP2, which shards the blocks and the rest of each of the three networks. Unless in
    `fp32`, FSDP2 gathers parameters in bfloat16 on GPUs and reduces gradients in float32; as with
    DDP the forward pass belongs under `autocast`, so that residuals stay in float32.
    """
    if precision != "fp32" and distributed.device.type == "cpu":
        _plain_attention(model)
    if precision == "fp8":
        use_float8(model)
    student = [*model.encoder.blocks, *model.predictor.predictor_blocks]
    if runtime.activation_checkpointing:
        for block in student:
            block.forward = partial(_recomputed, block.forward)
    if runtime.compile:
        _compile(student, model.target_encoder.blocks)
    if not in_group():
        return model.to(distributed.device)
    if runtime.parallel == "fsdp2":
        _shard(model, distributed, precision)
        return model
    from torch.nn.parallel import DistributedDataParallel

    with warnings.catch_warnings():
        # torch 2.15 renames broadcast_buffers, torch 2.11 does not know the new name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model.to(distributed.device),
            device_ids=[distributed.device] if distributed.device.type == "cuda" else None,
            broadcast_buffers=False,  # they are tables of positions
            gradient_as_bucket_view=True,
        )


def in_group() -> bool:
    """Whether there is a process group, even of this process alone."""
    return dist.is_available() and dist.is_initialized()


def choose_kernels(device: torch.device) -> None:
    """Choose the kernels of training on a GPU, for the whole process; does nothing elsewhere.

    Attention: flash, memory-efficient or plain. cuDNN's, which torch prefers on Hopper, builds a
    plan for every new pair of query and key lengths, and masks of ViT-H/14 have 207 pairs in 1,500
    steps. Products of float32 matrices, of which bf16 has few: TF32.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.set_float32_matmul_precision("high")


@contextmanager
def gradient_sync(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Reduce the gradients of a micro-batch over the processes, or only accumulate them."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    local: AbstractContextManager[None] = nullcontext()
    if isinstance(module, DistributedDataParallel):
        local = nullcontext() if enabled else module.no_sync()
    for network in module.children():
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(enabled)
    with local:
        yield


def own_part(tensors: Mapping[str, Tensor], distributed: Distributed) -> dict[str, Tensor]:
    """The tensors that this process saves: its shards, and its part of the replicated ones."""
    from torch.distributed.tensor import DTensor

    loads = [0] * distributed.world_size
    mine: dict[str, Tensor] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        if isinstance(tensor, DTensor):
            mine[name] = tensor
            continue
        owner = loads.index(min(loads))
        loads[owner] += tensor.nbytes
        if owner == distributed.rank:
            mine[name] = tensor
    return mine


def _plain_attention(model: nn.Module) -> None:
    """Attention as matrix products: in bf16 on a CPU, steps are 1.2 times as fast as with SDPA."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = False


def _recomputed(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`forward` without keeping its activations; nothing in the networks is random."""
    from torch.utils.checkpoint import checkpoint

    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _compile(student: list[nn.Module], target: Any) -> None:
    """Compile every block by itself; those of the student for any number of tokens."""
    # DDP would split graphs to overlap communication, which fails for recomputed blocks.
    torch._dynamo.config.optimize_ddp = False
    for block in student:
        block.forward = partial(_any_length, torch.compile(block.forward))
    for block in target:
        block.forward = torch.compile(block.forward)


def _any_length(forward: Callable[..., Tensor], tokens: Tensor, *args: Any) -> Tensor:
    # Contexts of ViT-H/14 have 57 lengths: one graph each would exceed the recompilation limit.
    # The batch is static: blocks of encoder and predictor share code, and dynamo would treat a
    # size that differs between two calls as dynamic.
    torch._dynamo.maybe_mark_dynamic(tokens, 1)
    torch._dynamo.mark_static(tokens, 0)
    for part in args:  # target blocks [B, M, L] or [B, M, L, C]
        if isinstance(part, Tensor) and part.ndim > 2:
            torch._dynamo.maybe_mark_dynamic(part, 2)
    return forward(tokens, *args)


def _shard(model: IJepa, distributed: Distributed, precision: Precision) -> None:
    """Shard on `meta`, then send every process its part of rank 0's weights."""
    from torch.distributed import fsdp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(distributed.device.type, (distributed.world_size,))
    policy = fsdp.MixedPrecisionPolicy()
    # Autocast on a CPU does not cover LayerNorm, which cannot mix the two types.
    if precision != "fp32" and distributed.device.type == "cuda":
        policy = fsdp.MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    weights = model.state_dict() if distributed.is_main else {}
    model.to("meta")
    networks = (
        (model.encoder, model.encoder.blocks, False),
        (model.predictor, model.predictor.predictor_blocks, False),
        (model.target_encoder, model.target_encoder.blocks, True),  # has no backward pass
    )
    for network, blocks, reshard in networks:
        for part in (*blocks, network):
            fsdp.fully_shard(part, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    model.to_empty(device=distributed.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    # The predictor's output is not changed in place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPPredictor\) returned a view")
    # Each network is an FSDP root: monitors call encode before and between updates.
    for encoder in (model.encoder, model.target_encoder):
        fsdp.register_fsdp_forward_method(encoder, "encode")
