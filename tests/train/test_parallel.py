import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import several_processes
import torch
from ijepa_zoo.rendezvous import Place, choose_device, read_place
from small_run import CONFIG, change, pictures

from ijepa_zoo import rendezvous
from ijepa_zoo.data import open_images
from ijepa_zoo.distributed import Distributed, choose_device, init_distributed
from ijepa_zoo.errors import DistributedError
from ijepa_zoo.train import Trainer
from ijepa_zoo.train.parallel import choose_kernels

# Three updates with batch 8; masks are cut per group of two images
TRAIN = """
import sys
import torch
import ijepa_zoo
from ijepa_zoo.masks import MultiBlockMasks
from ijepa_zoo.train.config import MachineConfig
from ijepa_zoo.train.optim import make_optimizer, set_rates
from ijepa_zoo.train.parallel import accumulate, autocast, parallelise
from ijepa_zoo.distributed import Distributed, init_distributed

NETWORK = dict(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=4,
               predictor_embed_dim=32, predictor_depth=3)

def make():
    torch.manual_seed(0)
    return ijepa_zoo.create_ijepa("vit_nano8_64_ijepa", pretrained=False, **NETWORK)

def train(processes, precision="fp32", micro=2, **machine):
    model = make().train()
    module = parallelise(model, MachineConfig(**machine), processes, precision)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in make().named_parameters()]
    optimizer = make_optimizer(model.encoder, model.predictor)
    masks = MultiBlockMasks(model.predictor.grid_size, min_keep=3)
    share = 8 // distributed.world_size
    losses = []
    for step in range(3):
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        first = distributed.rank * share
        total = torch.zeros(())
        optimizer.zero_grad()
        for start in range(first, first + share, micro):
            part = slice(start, start + micro)
            context, targets = masks.sample(8, seed=0, step=step, part=part, cut=micro)
            with accumulate(module, start + micro == first + share):
                with autocast(distributed.device, precision):
                    loss = module(images[part], context, targets)
                (loss * micro / share).backward()
            total += loss.detach() * micro / 8
        set_rates(optimizer, lr=1e-3, weight_decay=0.1)
        optimizer.step()
        model.update_target(0.9)
        losses.append(processes.all_reduce(total).item())
    tensors = {n: p.full_tensor() if hasattr(p, "full_tensor") else p
               for n, p in model.named_parameters()}
    return {"loss": torch.tensor(losses), **{n: p.detach().clone() for n, p in tensors.items()}}
"""
TRAIN_MANY = (
    TRAIN
    + """
from ijepa_zoo.train.parallel import copy_whole

VARIANTS = {
    "ddp": {},
    "fsdp2": {"parallel": "fsdp2"},
    "ddp recomputed": {"activation_checkpointing": True},
    "fsdp2 recomputed": {"parallel": "fsdp2", "activation_checkpointing": True},
    "ddp bf16": {"precision": "bf16"},
    "fsdp2 bf16": {"precision": "bf16", "parallel": "fsdp2"},
    "ddp fp8": {"precision": "fp8"},
    "fsdp2 fp8 recomputed": {
        "precision": "fp8", "parallel": "fsdp2", "activation_checkpointing": True
    },
}
with init_distributed("cpu", 60) as processes:
    results = {name: train(processes, **VARIANTS[name]) for name in sys.argv[2:]}
    whole, model = make(), make()
    parallelise(model, MachineConfig(parallel="fsdp2"), processes, "fp32")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # as a monitor does, before the first update
        assert torch.equal(model.target_encoder.encode(images), whole.target_encoder.encode(images))
        parameter = model.predictor.mask_token
        copy_whole(torch.arange(32.0).view(1, 1, 32), parameter)
    results["copied"] = {"mask_token": parameter.full_tensor()}
    if distributed.rank == 0:
        torch.save(results, sys.argv[1])
"""
)
ALL = ["ddp", "fsdp2", "ddp recomputed", "fsdp2 recomputed", "ddp bf16", "fsdp2 bf16"]


def alone(**arguments):
    space = {}
    exec(TRAIN, space)
    return space["train"](Distributed(), **arguments)


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def one():
    return alone()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "results.pt"
    several_processes.run(TRAIN_MANY, 2, path, *ALL)
    return torch.load(path)


def test_two_processes_equal_one(one, two):
    assert not torch.equal(one["loss"][0], one["loss"][2])
    assert largest_difference(two["ddp"], one) < 3e-7


@pytest.mark.parametrize("name", ["fsdp2", "ddp recomputed", "fsdp2 recomputed"])
def test_sharding_and_recomputing_change_nothing(two, name):
    assert largest_difference(two[name], two["ddp"]) == 0


def test_bf16_is_the_same_sharded(one, two):
    assert largest_difference(two["fsdp2 bf16"], two["ddp bf16"]) == 0
    assert 1e-5 < largest_difference(two["ddp bf16"], one) < 1e-2


def test_whole_tensors_are_copied_into_shards(two):
    assert torch.equal(two["copied"]["mask_token"].flatten(), torch.arange(32.0))


@pytest.mark.slow
def test_four_processes_equal_one(one, tmp_path):
    several_processes.run(TRAIN_MANY, 4, tmp_path / "results.pt", "ddp", "fsdp2")
    four = torch.load(tmp_path / "results.pt")
    assert largest_difference(four["ddp"], one) < 3e-7
    assert largest_difference(four["fsdp2"], one) < 3e-7


def test_a_single_process_needs_no_group(one):
    for arguments in ({"parallel": "fsdp2"}, {"activation_checkpointing": True}):
        assert largest_difference(alone(**arguments), one) == 0
    distributed = Distributed()
    assert distributed.all_reduce(torch.tensor(3.0)) == 3
    assert distributed.all_gather(torch.arange(2)).tolist() == [0, 1]
    assert distributed.broadcast_object("value") == "value"
    assert distributed.to_host(torch.ones(2)).read().tolist() == [1, 1]
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
    config = change(CONFIG, model={"predictor_depth": 3}, machine={"compile": True})
    trainer = Trainer(config, open_images(pictures()), Distributed())
    monitor, _ = trainer.monitor()
    steps = list(trainer.batches())
    lengths = {(part.context.shape[1], part.targets.shape[2]) for step in steps for part in step}
    assert len(lengths) > 4
    first = 1 + next(
        n for n, step in enumerate(steps) if step[0].targets.shape != steps[0][0].targets.shape
    )
    for step in steps[:first]:
        trainer.update(step)
    graphs = len(batches)
    monitor.measure(trainer.model, trainer.distributed)
    for step in steps[first:]:
        trainer.update(step)
    # target, context, and the predictor's three; its last has a second one for any target length
    assert len(batches) == graphs == 6
    assert all(type(size) is int for sizes in batches for size in sizes)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_kernels_are_chosen_on_a_gpu_only(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", calls.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls.append)
    trainer = Trainer(CONFIG, open_images(pictures()), Distributed())
    assert not calls
    assert "1 x cpu, fp32, 4 images" in str(trainer)
    choose_kernels(torch.device("cuda", 1))
    assert calls == [False, "high"]
    trainer.distributed = Distributed(0, 1, 0, torch.device("cuda", 0))
    assert "1 x cuda:0, fp32 (TF32 products), 4 images" in str(trainer)


EXCHANGE = """
import torch
from ijepa_zoo.distributed import init_distributed

for _ in range(2):
    with init_distributed("auto", 30) as processes:
        rank = distributed.rank
        assert (distributed.world_size, distributed.local_world_size, distributed.device.type) == (2, 2, "cpu")
        assert processes.all_reduce(torch.tensor([1.0, rank])).tolist() == [2, 1]
        rows = processes.all_gather(torch.full((2, 3), rank))
        assert rows[:, 0].tolist() == [0, 0, 1, 1] and rows.shape == (4, 3)
        assert processes.broadcast_object({"from": rank}) == {"from": 0}
        processes.barrier()
        print("rank", rank, "done")
"""


def test_under_torchrun(tmp_path):
    (tmp_path / "script.py").write_text(EXCHANGE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    port = several_processes.free_port()
    done = subprocess.run(
        [*command, f"--master-port={port}", tmp_path / "script.py"],
        env={**os.environ, "PYTHONPATH": str(several_processes.ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 4


AGAIN = """
import os, time
import torch
from ijepa_zoo.rendezvous import meet, read_place

place = read_place(os.environ)
survey, _ = meet(place, torch.device("cpu"))
time.sleep(2 if place.rank == 0 else 0)  # process 1 comes again while 0 has not left
del survey
meet(place, torch.device("cpu"))
"""


def test_processes_that_leave_late_meet_again():
    several_processes.run(AGAIN, 2)


LATE = """
import os, time
import torch
from ijepa_zoo import rendezvous

rendezvous._PATIENCE = 3.0
place = rendezvous.read_place(os.environ)
time.sleep(4 if place.rank == 1 else 0)
for attempt in range(3):
    try:
        rendezvous.meet(place, torch.device("cpu"))
        break
    except rendezvous.DistributedError as error:
        assert "process 1 of 2 did not come" in str(error) and (place.rank, attempt) == (0, 0)
else:
    raise AssertionError("never met")
"""


def test_a_meeting_that_one_missed_can_be_repeated():
    several_processes.run(LATE, 2)


LOSE = """
import os, signal, sys, time
import torch
from ijepa_zoo.distributed import init_distributed

how, who = sys.argv[1], int(sys.argv[2])
try:
    with init_distributed("cpu", 1) as processes:
        for step in range(5):
            if step == 3 and distributed.rank == who:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif how == "hangs":
                    time.sleep(1000)
                elif how == "fails":
                    raise FloatingPointError("the loss is nan")
            processes.all_reduce(torch.ones(3))
except DistributedError:
    assert processes.lost.is_set()
    raise
"""


@pytest.mark.parametrize(
    ("how", "world", "who", "said"),
    [
        ("killed", 2, 0, "process 0 gave no sign of life"),
        ("hangs", 3, 2, "process 2 gave no sign of life: killed, or hanging (limit: 1 s)"),
        ("fails", 2, 1, "process 1 ended with FloatingPointError: the loss is nan"),
    ],
)
def test_a_lost_process_ends_the_others_with_a_message(how, world, who, said):
    distributed = several_processes.start(LOSE, world, how, who)
    survivors = [p for rank, p in enumerate(distributed) if rank != who]
    results = several_processes.finish(survivors, 60)
    distributed[who].kill()
    several_processes.finish([distributed[who]])
    for status, errors in results:
        assert status == 1, errors
        message = errors.strip().split("DistributedError: ")[-1]
        assert "waited for the loss of step 3 and lost the others" in message, errors
        assert said in message


TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_places():
    assert read_place({}) == Place(0, 1, 0)
    assert read_place(TORCHRUN) == Place(1, 2, 1, "127.0.0.1", 29500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": ""}, "not RANK: start with: torchrun"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "not MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "2"}, r"RANK=2 must be 0 to 1 \(WORLD_SIZE=2\)"),
        ({"RANK": "one"}, "RANK='one' is no whole number"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0' is no whole number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 must be 0 to 1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 must be 0 to 65535"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 must be at least 1"),
    ],
)
def test_wrong_variables(change, message):
    with pytest.raises(DistributedError, match=message):
        read_place({**TORCHRUN, **change})


def test_a_launcher_without_variables_does_not_train_alone():
    with pytest.raises(DistributedError, match=r"SLURM_STEP_NUM_TASKS=8 .* each would work alone"):
        read_place({"SLURM_STEP_NUM_TASKS": "8"})
    assert read_place({"SLURM_STEP_NUM_TASKS": "1"}).world == 1
    with pytest.raises(
        DistributedError, match=r"SLURM_STEP_NUM_TASKS='x' is no .*correct or unset"
    ):
        read_place({"SLURM_STEP_NUM_TASKS": "x"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_ADDR": "no.such.machine.invalid"}, "no machine has this name"),
        ({}, r"cannot reach MASTER_ADDR=127.0.0.1, MASTER_PORT=\d+: is process 0 there"),
        ({"RANK": "0"}, "process 1 of 2 did not come to 127.0.0.1"),
    ],
)
def test_nobody_there(monkeypatch, change, message):
    monkeypatch.setattr(rendezvous, "_PATIENCE", 1.0)
    variables = {**TORCHRUN, "MASTER_PORT": str(several_processes.free_port()), **change}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    with pytest.raises(DistributedError, match=message), init_distributed("cpu"):
        pass
    assert time.monotonic() - start < 10


def test_taken_port(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        variables = {**TORCHRUN, "RANK": "0", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(DistributedError, match="is the port taken by another job"):
            rendezvous.meet(read_place(os.environ), torch.device("cpu"))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (Place(0, 2), Place(0, 2), "two processes have RANK=0"),
        (Place(0, 2), Place(1, 3), "WORLD_SIZE=3 here, but 2 in another process"),
    ],
)
def test_places_that_do_not_fit_together(first, second, message):
    store = torch.distributed.HashStore()
    waits = threading.Thread(target=rendezvous.Survey(first, store).come, daemon=True)
    waits.start()
    while not store.add("count", 0):
        time.sleep(0.01)
    with pytest.raises(DistributedError, match=message):
        rendezvous.Survey(second, store).come()
    rendezvous.Survey(Place(1, 2), store).come()  # the first one waits for this one
    waits.join(20)
    assert not waits.is_alive()


def test_devices(monkeypatch):
    assert choose_device("cpu", Place(0, 2)) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", Place()) == torch.device("cpu")
    with pytest.raises(DistributedError, match=r"finds no usable CUDA GPU.*use the device cpu"):
        choose_device("cuda", Place())
    with pytest.raises(DistributedError, match="unknown to torch: use auto, cuda or cpu"):
        choose_device("gpu", Place())
    for name in ("meta", "mps", "xpu"):
        if name == "meta" or not getattr(torch, name).is_available():
            with pytest.raises(
                DistributedError, match=rf"^the device {name} cannot be used .*: use auto"
            ) as e:
                choose_device(name, Place())
            assert "\n" not in str(e.value)
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", Place(3, 4, 1)) == torch.device("cuda", 1)
    with pytest.raises(DistributedError, match=r"LOCAL_RANK=2, .* shows 2 GPUs.*nproc-per-node=2"):
        choose_device("auto", Place(2, 4, 2))
    with pytest.raises(DistributedError, match=r"use the device cuda"):
        choose_device("cuda:0", Place(1, 2, 1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # Slurm: one for each process
    assert choose_device("cuda", Place(3, 4, 3)) == torch.device("cuda", 0)
    assert chosen == [torch.device("cuda", 1), torch.device("cuda", 0)]
