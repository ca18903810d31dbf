"""The paper's protocols, and what the schedules make of them."""

import pytest
import torch
from torch.optim import lr_scheduler

from ijepa_zoo.eval.attentive import ATTENTIVE
from ijepa_zoo.eval.tasks import TASKS, find_task
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


def test_the_table_of_the_paper():
    known = {f"{record.model}.{record.tag}" for record in checkpoints()}
    found = {}
    for name, task in TASKS.items():
        protocol, transform = task.protocol, task.protocol.transform
        words = transform.interpolation, transform.crop_mode
        found[name] = (task.num_classes, protocol.epochs, protocol.milestones, *words)
        heads = (protocol.optimizer, protocol.lrs, protocol.weight_decays, protocol.batch_size)
        lars = ("lars", (0.1, 0.01), (5e-4, 0.0), 16384)
        assert heads == (lars if name == "imagenet1k" else ("sgd", (0.01,), (5e-4,), 256))
        assert task.paper.keys() <= known
    assert found == TABLE
    assert TASKS["cifar100"].paper["vit_huge14_ijepa.in1k"] == 87.5
    assert TASKS["depth"].paper["vit_giant16_ijepa.in22k"] == 73.0
    assert TASKS["imagenet1k"].paper["vit_huge16_448_ijepa.in1k"] == 81.1
    models = ("vit_giant16_ijepa.in22k", "vit_giant16_ijepa", "vit_huge14_ijepa.in1k")
    places = [find_task("places205").of_model(model).protocol.transform for model in models]
    assert [place.interpolation for place in places] == ["bicubic", "bicubic", "bilinear"]


def rates(scheduler, steps, *args, **kwargs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, found = scheduler(optimizer, *args, **kwargs), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", TASKS)
def test_schedules_are_those_of_torch(name):
    protocol = TASKS[name].protocol
    epochs, milestones = protocol.epochs, list(protocol.milestones)
    if milestones:
        expected = rates(lr_scheduler.MultiStepLR, epochs, milestones, gamma=0.1)
    else:
        expected = rates(lr_scheduler.CosineAnnealingLR, epochs, epochs, eta_min=0.01)
    for within in (0, 4):  # the rate changes with the epochs
        steps = [5 * epoch + within for epoch in range(epochs)]
        assert [protocol.lr_scale(step, 5, 256) for step in steps] == pytest.approx(expected)
    assert protocol.lr_scale(0, 5, 1024) == pytest.approx(4)
    long = protocol.with_epochs(2 * epochs)
    assert (long.epochs, [*long.milestones]) == (2 * epochs, [2 * m for m in milestones])


def test_the_attentive_schedule_changes_with_every_step_and_ends_at_zero():
    expected = rates(lr_scheduler.CosineAnnealingLR, 20 * 7, 20 * 7)
    assert [ATTENTIVE.lr_scale(s, 7, 256) for s in range(20 * 7)] == pytest.approx(expected)
