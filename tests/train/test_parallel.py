"""Equality of processes, sharding, recomputing, precision and compilation."""

import pytest
import several_processes
import torch
from small_run import CONFIG, change, pictures

from ijepa_zoo.data import open_images
from ijepa_zoo.train import Trainer

# Three updates with batch 8; masks are cut per group of two images
TRAIN = """
import sys
import torch
import ijepa_zoo
from ijepa_zoo.masks import MultiBlockMasks
from ijepa_zoo.train.config import RuntimeConfig
from ijepa_zoo.train.optim import (
    clip_gradients,
    gradient_norms,
    make_optimizer,
    set_rates,
    step_if_finite,
)
from ijepa_zoo.train.parallel import gradient_sync, parallelize
from ijepa_zoo.train.precision import autocast
from ijepa_zoo.distributed import Distributed, init_distributed

NETWORK = dict(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=4,
               predictor_embed_dim=32, predictor_depth=3)

def make():
    torch.manual_seed(0)
    return ijepa_zoo.create_ijepa("vit_nano8_64_ijepa", pretrained=False, **NETWORK)

def train(distributed, precision="fp32", limit=None, ruined=False, **runtime):
    model = make().train()
    module = parallelize(model, RuntimeConfig(**runtime), distributed, precision)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in make().named_parameters()]
    optimizer = make_optimizer(model.encoder, model.predictor)
    masks = MultiBlockMasks(model.predictor.grid_size, min_keep=3)
    share = 8 // distributed.world_size
    losses, norms = [], []
    for step in range(3):
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        first = distributed.rank * share
        total = torch.zeros(())
        optimizer.zero_grad()
        for start in range(first, first + share, 2):
            part = slice(start, start + 2)
            context, targets = masks.sample(8, seed=0, step=step, part=part, group_size=2)
            with gradient_sync(module, start + 2 == first + share):
                with autocast(distributed.device, precision):
                    loss = module(images[part], context, targets)
                (loss * 2 / share).backward()
            total += loss.detach() * 2 / 8
        set_rates(optimizer, lr=1e-3, weight_decay=0.1)
        if ruined and step == 1 and distributed.rank == distributed.world_size - 1:
            gradient = model.encoder.blocks[0].attn.qkv.weight.grad
            getattr(gradient, "to_local", lambda: gradient)().fill_(torch.nan)
        norm = gradient_norms(optimizer)
        if limit:
            clip_gradients(optimizer, limit, norm)
        norms.append(gradient_norms(optimizer).norm())
        step_if_finite(optimizer, norm)
        model.update_target(0.9)
        losses.append(distributed.all_reduce(total).item())
    tensors = {n: p.full_tensor() if hasattr(p, "full_tensor") else p
               for n, p in model.named_parameters()}
    first = {"loss": torch.tensor(losses), "norm": torch.stack(norms).nan_to_num()}
    return {**first, **{n: p.detach().clone() for n, p in tensors.items()}}
"""
TRAIN_MANY = (
    TRAIN
    + """
VARIANTS = {
    "ddp": {},
    "fsdp2": {"parallel": "fsdp2", "activation_checkpointing": True},
    "ddp bf16": {"precision": "bf16"},
    "fsdp2 bf16": {"precision": "bf16", "parallel": "fsdp2"},
    "fsdp2 ruined": {"parallel": "fsdp2", "limit": 0.01, "ruined": True},
}
with init_distributed("cpu", 60) as distributed:
    results = {name: train(distributed, **options) for name, options in VARIANTS.items()}
    if distributed.rank == 0:
        torch.save(results, sys.argv[1])
"""
)


def alone(**arguments):
    space, threads = {}, torch.get_num_threads()
    exec(TRAIN, space)
    torch.set_num_threads(1)  # as in several processes: sums depend on their number
    try:
        return space["train"](space["Distributed"](), **arguments)
    finally:
        torch.set_num_threads(threads)


def largest_difference(a, b):
    names = a.keys() - {"norm"}
    assert names == b.keys() - {"norm"}
    return max((a[name] - b[name]).abs().max().item() for name in names)


@pytest.fixture(scope="module")
def one():
    return alone()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "results.pt"
    several_processes.run(TRAIN_MANY, 2, path)
    return torch.load(path)


def test_two_processes_equal_one(one, two):
    assert not torch.equal(one["loss"][0], one["loss"][2])
    assert largest_difference(two["ddp"], one) < 3e-7
    assert largest_difference(alone(activation_checkpointing=True), one) == 0


def test_sharding_and_recomputing_change_nothing(one, two):
    assert largest_difference(two["fsdp2"], two["ddp"]) == 0
    assert largest_difference(two["fsdp2 bf16"], two["ddp bf16"]) == 0
    assert 1e-5 < largest_difference(two["ddp bf16"], one) < 1e-2


def test_gradients_are_clipped_and_one_that_is_not_finite_updates_no_process(one, two):
    clipped = alone(limit=0.01, ruined=True)
    assert clipped["norm"].tolist() == pytest.approx([0.01, 0, 0.01], rel=1e-3)
    assert two["fsdp2 ruined"]["norm"].tolist() == pytest.approx([0.01, 0, 0.01], rel=1e-3)
    assert largest_difference(two["fsdp2 ruined"], clipped) < 3e-7


def test_the_first_steps_make_all_graphs(monkeypatch):
    """Monitors and other lengths add no graph; nothing breaks one, and no batch size varies."""
    compiled, batches = torch.compile, []

    def backend(module, inputs):
        inputs = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
        batches.append({x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.ndim > 2})
        return module.forward

    monkeypatch.setattr(torch, "compile", lambda f: compiled(f, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses = []
    for compile in (False, True):
        config = change(CONFIG, model={"predictor_depth": 3}, runtime={"compile": compile})
        trainer = Trainer(config, open_images(pictures()))
        steps = list(trainer.batches())[:6]
        losses.append([trainer.train_step(step).metrics["loss"] for step in steps])
        graphs = len(batches)
        monitor, _ = trainer.monitor()
        monitor.measure(trainer.model, trainer.distributed)
    assert losses[0] == losses[1]
    lengths = {(part.context.shape[1], part.targets.shape[2]) for step in steps for part in step}
    assert len(lengths) > 3
    # target, context, and the predictor's three; its last has a second one for any target length
    assert len(batches) == graphs == 6
    assert all(type(size) is int for sizes in batches for size in sizes)
    assert not torch._dynamo.utils.counters["graph_break"]
