"""The paper's protocols as tables, and what the schedules make of them."""

import pytest
import torch

from ijepa_zoo.errors import DataError
from ijepa_zoo.eval.tasks import TASKS, View, find_task
from ijepa_zoo.weights.registry import checkpoints

# facts of the paper and of VISSL's configurations: epochs, milestones, filter, shape
TABLE = {
    "imagenet1k": (1000, 50, (15, 30, 45), "bicubic", "crop"),
    "cifar100": (100, 28, (8, 16, 24), "bicubic", "crop"),
    "cifar10": (10, 28, (8, 16, 24), "bicubic", "crop"),
    "places205": (205, 14, (4, 8, 12), "bilinear", "crop"),
    "inat18": (8142, 84, (24, 48, 72), "bilinear", "crop"),
    "classes": (None, 28, (8, 16, 24), "bicubic", "crop"),
    "count": (8, 50, (), "bilinear", "square"),
    "depth": (6, 100, (), "bilinear", "square"),
}


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def rates(optimizer: torch.optim.Optimizer, schedule: object, epochs: int) -> list[float]:
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_table() -> None:
    found = {
        name: (
            task.num_classes,
            task.protocol.epochs,
            task.protocol.milestones,
            task.protocol.view.filter,
            task.protocol.view.shape,
        )
        for name, task in TASKS.items()
    }
    assert found == TABLE


def test_optimizers_and_grids() -> None:
    for name, task in TASKS.items():
        protocol = task.protocol
        if name == "imagenet1k":
            assert (protocol.optimizer, protocol.nesterov) == ("lars", False)
            assert (protocol.lrs, protocol.weight_decays) == ((0.1, 0.01), (5e-4, 0.0))
            assert protocol.batch_size == 16384
        else:
            assert (protocol.optimizer, protocol.nesterov) == ("sgd", True)
            assert (protocol.lrs, protocol.weight_decays) == ((0.01,), (5e-4,))
            assert protocol.batch_size == 256
        assert protocol.momentum == 0.9


@pytest.mark.parametrize("name", ["imagenet1k", "cifar100", "places205", "inat18"])
def test_steps_are_those_of_torch(name: str) -> None:
    protocol = TASKS[name].protocol
    opt = optimizer()
    schedule = torch.optim.lr_scheduler.MultiStepLR(opt, list(protocol.milestones), gamma=0.1)
    expected = rates(opt, schedule, protocol.epochs)
    assert [protocol.scale(e) for e in range(protocol.epochs)] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["count", "depth"])
def test_the_cosine_is_that_of_torch_and_ends_near_a_hundredth(name: str) -> None:
    protocol = TASKS[name].protocol
    opt = optimizer()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, protocol.epochs, eta_min=0.01)
    expected = rates(opt, schedule, protocol.epochs)
    found = [protocol.scale(e) for e in range(protocol.epochs)]
    assert found == pytest.approx(expected)
    assert 0.01 * found[0] == 0.01
    assert 0.01 * protocol.scale(protocol.epochs) == pytest.approx(1e-4)


def test_rates_grow_with_the_global_batch() -> None:
    imagenet, cifar = TASKS["imagenet1k"].protocol, TASKS["cifar100"].protocol
    assert imagenet.lrs[0] * imagenet.lr_scale(0) == pytest.approx(6.4)  # 0.1 x 16384 / 256
    assert cifar.lr_scale(0) == 1.0
    assert cifar.lr_scale(8) == pytest.approx(0.1)
    assert cifar.lr_scale(8, 1024) == pytest.approx(0.4)


def test_a_shorter_run_keeps_the_shape_of_its_schedule() -> None:
    short = TASKS["cifar100"].protocol.with_epochs(7)
    assert (short.epochs, short.milestones) == (7, (2, 4, 6))
    assert TASKS["count"].protocol.with_epochs(10).scale(5) == pytest.approx(0.505)


def test_the_papers_figures_belong_to_weights_of_the_catalogue() -> None:
    known = {f"{record.model}.{record.tag}" for record in checkpoints()}
    for task in TASKS.values():
        assert task.paper.keys() <= known
        assert not any(name.endswith("_context") for name in task.paper)
    assert find_task("cifar100").paper["vit_huge14_ijepa.in1k"] == 87.5
    assert find_task("count").paper["vit_huge14_ijepa.in22k"] == 88.6
    assert find_task("depth").paper["vit_giant16_ijepa.in22k"] == 73.0
    assert find_task("imagenet1k").paper["vit_huge16_448_ijepa.in1k"] == 81.1
    assert not find_task("cifar10").paper


@pytest.mark.parametrize(
    ("size", "resized"), [((224, 224), (256, 256)), ((448, 448), (512, 512)), ((64, 64), (73, 73))]
)
def test_sizes_scale_with_the_model(size: tuple[int, int], resized: tuple[int, int]) -> None:
    view = View("crop", "bicubic")
    assert view.resize_to(size) == resized
    assert f"resize to {resized[0]}x" in view.describe(size, train=False)


def test_descriptions_tell_views_apart() -> None:
    views = [View(s, f) for s in ("crop", "square") for f in ("bicubic", "bilinear")]
    words = {v.describe((s, s), train=t) for v in views for s in (64, 224) for t in (True, False)}
    assert len(words) == 16


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(DataError, match="cifar-100"):
        find_task("cifar-100")


def test_transforms_of_an_architecture_are_those_of_its_file() -> None:
    for name in ("places205", "inat18"):
        task = find_task(name)
        filters = [
            task.of_model(model).protocol.view.filter
            for model in ("vit_giant16_ijepa.in22k", "vit_giant16_ijepa", "vit_huge14_ijepa.in1k")
        ]
        assert filters == ["bicubic", "bicubic", "bilinear"]
