"""The paper's protocols, and what the schedules make of them."""

from dataclasses import replace

import pytest
import torch

from ijepa_zoo.errors import DataError
from ijepa_zoo.eval.attentive import ATTENTIVE
from ijepa_zoo.eval.tasks import TASKS, EvalTransform, find_task
from ijepa_zoo.weights.registry import checkpoints

# facts of the paper and of VISSL's configurations: classes, epochs, milestones, filter, crop mode
TABLE = {
    "imagenet1k": (1000, 50, (15, 30, 45), "bicubic", "center"),
    "cifar100": (100, 28, (8, 16, 24), "bicubic", "center"),
    "cifar10": (10, 28, (8, 16, 24), "bicubic", "center"),
    "places205": (205, 14, (4, 8, 12), "bilinear", "center"),
    "inat18": (8142, 84, (24, 48, 72), "bilinear", "center"),
    "classes": (None, 28, (8, 16, 24), "bicubic", "center"),
    "count": (8, 50, (), "bilinear", "squash"),
    "depth": (6, 100, (), "bilinear", "squash"),
}


def test_the_table():
    found = {}
    for name, task in TASKS.items():
        protocol, transform = task.protocol, task.protocol.transform
        words = transform.interpolation, transform.crop_mode
        found[name] = (task.num_classes, protocol.epochs, protocol.milestones, *words)
        heads = (protocol.optimizer, protocol.lrs, protocol.weight_decays, protocol.batch_size)
        if name == "imagenet1k":
            assert heads == ("lars", (0.1, 0.01), (5e-4, 0.0), 16384)
        else:
            assert heads == ("sgd", (0.01,), (5e-4,), 256)
    assert found == TABLE


def rates(schedule_of, epochs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, found = schedule_of(optimizer), []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", TASKS)
def test_schedules_are_those_of_torch(name):
    protocol, schedulers = TASKS[name].protocol, torch.optim.lr_scheduler

    def schedule(optimizer):
        if protocol.milestones:
            return schedulers.MultiStepLR(optimizer, list(protocol.milestones), gamma=0.1)
        return schedulers.CosineAnnealingLR(optimizer, protocol.epochs, eta_min=0.01)

    expected = rates(schedule, protocol.epochs)
    for within in (0, 4):  # the rate changes with the epochs
        steps = [5 * epoch + within for epoch in range(protocol.epochs)]
        assert [protocol.lr_scale(step, 5, 256) for step in steps] == pytest.approx(expected)
    assert protocol.lr_scale(0, 5, 1024) == pytest.approx(4)


def test_the_attentive_schedule_changes_with_every_step_and_ends_at_zero():
    expected = rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20 * 7), 20 * 7)
    assert [ATTENTIVE.lr_scale(s, 7, 256) for s in range(20 * 7)] == pytest.approx(expected)


def test_a_shorter_run_keeps_the_shape_of_its_schedule():
    short = TASKS["cifar100"].protocol.with_epochs(7)
    assert (short.epochs, short.milestones) == (7, (2, 4, 6))
    assert TASKS["count"].protocol.with_epochs(10).lr_scale(5, 1, 256) == pytest.approx(0.505)


def test_the_papers_accuracies_belong_to_registered_weights():
    known = {f"{record.model}.{record.tag}" for record in checkpoints()}
    assert all(task.paper.keys() <= known for task in TASKS.values())
    assert find_task("cifar100").paper["vit_huge14_ijepa.in1k"] == 87.5
    assert find_task("count").paper["vit_huge14_ijepa.in22k"] == 88.6
    assert find_task("depth").paper["vit_giant16_ijepa.in22k"] == 73.0
    assert find_task("imagenet1k").paper["vit_huge16_448_ijepa.in1k"] == 81.1


@pytest.mark.parametrize(("size", "resized"), [(224, 256), (448, 512), (64, 73)])
def test_sizes_scale_with_the_model(size, resized):
    transform = EvalTransform("center", "bicubic")
    assert transform.resize_to((size, 2 * size)) == (resized, 2 * size * 8 // 7)
    assert replace(transform, crop_pct=1.0).resize_to((size, size)) == (size, size)
    assert f"resize to {resized}x" in transform.describe((size, size), train=False)


def test_descriptions_tell_transforms_apart():
    made = [EvalTransform(c, i) for c in ("center", "squash") for i in ("bicubic", "bilinear")]
    words = {t.describe((s, s), train=b) for t in made for s in (64, 224) for b in (True, False)}
    assert len(words) == 16


def test_transforms_of_an_architecture_are_those_of_its_file():
    for name in ("places205", "inat18"):
        models = ("vit_giant16_ijepa.in22k", "vit_giant16_ijepa", "vit_huge14_ijepa.in1k")
        found = [find_task(name).of_model(m).protocol.transform.interpolation for m in models]
        assert found == ["bicubic", "bicubic", "bilinear"]
    with pytest.raises(DataError, match="cifar-100"):
        find_task("cifar-100")
