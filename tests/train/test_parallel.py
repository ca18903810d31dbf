"""Equality of processes, sharding, accumulation, recomputing, precision and compilation."""

import pytest
import several_processes
import torch
from small_run import CONFIG, PLAIN, change, pictures

from ijepa_zoo.data import open_images
from ijepa_zoo.train import Trainer

# Three updates with batch 8, two or four micro-batches in a process
TRAIN = """
import sys
import torch
from train.small_run import CONFIG, change, pictures
from ijepa_zoo.data import open_images
from ijepa_zoo.distributed import init_distributed
from ijepa_zoo.train import NonFiniteLossError, Trainer, trainer as module

gradient_norms = module.gradient_norms

def ruin(optimizer):
    gradient = optimizer.param_groups[0]["params"][0].grad
    getattr(gradient, "to_local", lambda: gradient)().fill_(torch.nan)
    return gradient_norms(optimizer)

def train(distributed, precision="fp32", limit=None, **runtime):
    config = change(
        CONFIG,
        model={"embed_dim": 64, "num_heads": 4, "predictor_embed_dim": 32, "predictor_depth": 2},
        mask={"group_size": 2, "per_image": 1},
        optim={"regularizer_weight": 0.0, "precision": precision, "clip_grad": limit},
        runtime=runtime,
    )
    trainer = Trainer(config, open_images(pictures()), distributed)
    losses = []
    for number, step in zip(range(3), trainer.batches()):
        try:  # the gradient of the last process is not finite in the second step
            last = distributed.rank == distributed.world_size - 1
            module.gradient_norms = ruin if limit and number == 1 and last else gradient_norms
            losses.append(trainer.train_step(step).metrics["loss"])
        except NonFiniteLossError:
            losses.append(0.0)
    state = {n: t.full_tensor() if hasattr(t, "full_tensor") else t.clone()
             for n, t in trainer.tensors().items()}
    return {"loss": torch.tensor(losses), **state}

VARIANTS = {
    "ddp": {},
    "fsdp2": {"parallel": "fsdp2", "activation_checkpointing": True},
    "ddp bf16": {"precision": "bf16"},
    "fsdp2 bf16": {"precision": "bf16", "parallel": "fsdp2"},
    "fsdp2 ruined": {"parallel": "fsdp2", "limit": 0.01},
}
with init_distributed("cpu", 60) as distributed:
    if distributed.world_size == 1:
        VARIANTS = {name: VARIANTS[name] for name in ("ddp", "fsdp2 ruined")}
    results = {name: train(distributed, **options) for name, options in VARIANTS.items()}
    if distributed.rank == 0:
        torch.save(results, sys.argv[1])
"""


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of one process and of two."""
    path = tmp_path_factory.mktemp("results") / "results.pt"
    found = []
    for world in (1, 2):
        several_processes.run(TRAIN, world, path)
        found.append(torch.load(path))
    return found


def test_two_processes_equal_one_sharded_or_not(results):
    one, two = results
    assert not torch.equal(one["ddp"]["loss"][0], one["ddp"]["loss"][2])
    assert largest_difference(two["ddp"], one["ddp"]) < 3e-7
    assert 1e-5 < largest_difference(two["ddp bf16"], one["ddp"]) < 1e-2
    assert largest_difference(two["fsdp2"], two["ddp"]) == 0
    assert largest_difference(two["fsdp2 bf16"], two["ddp bf16"]) == 0


def test_a_gradient_that_is_not_finite_on_one_process_updates_none(results):
    one, two = (found["fsdp2 ruined"] for found in results)
    assert one["loss"][0].item() == pytest.approx(results[0]["ddp"]["loss"][0].item(), rel=1e-6)
    assert one["loss"][1] == 0
    assert one["optimizer.encoder.norm.bias.step"] == 2
    assert largest_difference(two, one) < 3e-7


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
        sections = {"model": {"predictor_depth": 3}, "runtime": {"compile": compile}}
        config = change(CONFIG, mask={"per_image": 1}, optim=PLAIN, **sections)
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
