import pytest
import several_processes
import torch
from small_run import CONFIG, change, pictures

from ijepa_zoo.data import open_images
from ijepa_zoo.distributed import Distributed, copy_to_host
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

def train(distributed, precision="fp32", micro=2, limit=None, ruined=False, **runtime):
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
        for start in range(first, first + share, micro):
            part = slice(start, start + micro)
            context, targets = masks.sample(8, seed=0, step=step, part=part, group_size=micro)
            with gradient_sync(module, start + micro == first + share):
                with autocast(distributed.device, precision):
                    loss = module(images[part], context, targets)
                (loss * micro / share).backward()
            total += loss.detach() * micro / 8
        set_rates(optimizer, lr=1e-3, weight_decay=0.1)
        if ruined and step == 1 and distributed.rank == distributed.world_size - 1:
            gradient = model.encoder.blocks[0].attn.qkv.weight.grad
            getattr(gradient, "to_local", lambda: gradient)().fill_(torch.nan)
        norm = gradient_norms(optimizer)
        assert norm.isfinite().all() == (not ruined or step != 1)
        if limit:
            clip_gradients(optimizer, limit, norm)
        norms.append(gradient_norms(optimizer).norm() if limit else torch.zeros(()))
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
    "fsdp2": {"parallel": "fsdp2"},
    "fsdp2 recomputed": {"parallel": "fsdp2", "activation_checkpointing": True},
    "ddp bf16": {"precision": "bf16"},
    "fsdp2 bf16": {"precision": "bf16", "parallel": "fsdp2"},
    "fsdp2 clipped": {"parallel": "fsdp2", "limit": 0.01},
    "fsdp2 ruined": {"parallel": "fsdp2", "limit": 0.01, "ruined": True},
}
with init_distributed("cpu", 60) as distributed:
    results = {name: train(distributed, **options) for name, options in VARIANTS.items()}
    whole, model = make(), make()
    if distributed.rank:  # rank 0 has the weights
        model.to("meta")
    parallelize(model, RuntimeConfig(parallel="fsdp2"), distributed, "fp32")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # as a monitor does, before the first update
        assert torch.equal(model.target_encoder.encode(images), whole.target_encoder.encode(images))
    if distributed.rank == 0:
        torch.save(results, sys.argv[1])
"""
)


def alone(**arguments):
    space, threads = {}, torch.get_num_threads()
    exec(TRAIN, space)
    torch.set_num_threads(1)  # as in several processes: sums depend on their number
    try:
        return space["train"](Distributed(), **arguments)
    finally:
        torch.set_num_threads(threads)


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


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


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2 recomputed"])
def test_sharding_and_recomputing_change_nothing(two, name):
    assert largest_difference(two[name], two["ddp"]) == 0


def test_bf16_is_the_same_sharded(one, two):
    assert largest_difference(two["fsdp2 bf16"], two["ddp bf16"]) == 0
    assert 1e-5 < largest_difference(two["ddp bf16"], one) < 1e-2


def test_gradients_are_clipped_by_their_norm_over_all_processes(one, two):
    clipped = alone(limit=0.01)
    assert largest_difference(clipped, one) > 1e-5
    assert clipped["norm"].tolist() == pytest.approx([0.01] * 3, rel=1e-3)
    assert largest_difference(two["fsdp2 clipped"], clipped) < 3e-7


def test_a_gradient_that_is_not_finite_on_one_process_updates_none(two):
    assert largest_difference(two["fsdp2 ruined"], alone(limit=0.01, ruined=True)) < 3e-7


def test_a_single_process_needs_no_group(one):
    for arguments in ({"parallel": "fsdp2"}, {"activation_checkpointing": True}):
        assert largest_difference(alone(**arguments), one) == 0
    distributed = Distributed()
    assert distributed.all_reduce(torch.tensor(3.0)) == 3
    assert distributed.all_gather(torch.arange(2)).tolist() == [0, 1]
    assert distributed.broadcast_object("value") == "value"
    assert copy_to_host(torch.ones(2))().tolist() == [1, 1]
    distributed.barrier()


def test_compiled_blocks_share_few_graphs(one, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiled(f, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert largest_difference(alone(compile=True), one) == 0
    # context, target, and the predictor's first, middle and last block, two of which have a second
    # graph for any target length; neither one per layer nor one per context length
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 7


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
    config = change(CONFIG, model={"predictor_depth": 3}, runtime={"compile": True})
    trainer = Trainer(config, open_images(pictures()), Distributed())
    monitor, _ = trainer.monitor()
    steps = list(trainer.batches())
    lengths = {(part.context.shape[1], part.targets.shape[2]) for step in steps for part in step}
    assert len(lengths) > 4
    first = 1 + next(
        n for n, step in enumerate(steps) if step[0].targets.shape != steps[0][0].targets.shape
    )
    for step in steps[:first]:
        trainer.train_step(step)
    graphs = len(batches)
    monitor.measure(trainer.model, trainer.distributed)
    for step in steps[first:]:
        trainer.train_step(step)
    # target, context, and the predictor's three; its last has a second one for any target length
    assert len(batches) == graphs == 6
    assert all(type(size) is int for sizes in batches for size in sizes)
    assert not torch._dynamo.utils.counters["graph_break"]
