"""The model of many GPUs: against a simulation of buckets, and the limits of its formulas."""

import sys

import pytest

from ijepa_zoo import bench
from ijepa_zoo.bench.growth_plot import draw_scaling, refuse_plot
from ijepa_zoo.bench.scale_out import GpuStep, exchange, gpu_step, modelled
from ijepa_zoo.bench.tables import fill
from ijepa_zoo.models.factory import create_ijepa

MODEL = "vit_nano8_64_ijepa"
MB25 = 25 * 2**20


def simulated(step, images, gpus, bandwidth):
    """Bucket after bucket: each waits for its gradients and for the link."""
    buckets = step.gradient_bytes // MB25
    backward = images * step.image_seconds * step.backward
    each = 2 * (gpus - 1) / gpus * MB25 / bandwidth
    free = 0.0
    for number in range(1, buckets + 1):
        free = max(free, number / buckets * backward) + each
    return free - backward


@pytest.mark.parametrize("gpus", [2, 8, 256])
@pytest.mark.parametrize("bandwidth", [1e9, 2e10, 1e12])
@pytest.mark.parametrize("images", [1, 128])
def test_exposed_exchange_is_that_of_buckets_one_after_another(gpus, bandwidth, images):
    step = GpuStep(image_seconds=1e-3, fixed_seconds=5e-3, backward=0.4, gradient_bytes=40 * MB25)
    whole, exposed = exchange(step, images, gpus, bandwidth)
    assert exposed == pytest.approx(simulated(step, images, gpus, bandwidth))
    assert whole == pytest.approx(2 * (gpus - 1) / gpus * 40 * MB25 / bandwidth)


def test_roofline_counts_the_models_own_weights():
    step = gpu_step(MODEL, 128)
    model = create_ijepa(MODEL, pretrained=False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    averaged = sum(p.numel() for p in model.encoder.parameters())
    assert step.gradient_bytes == 4 * trained
    assert step.fixed_seconds == pytest.approx((28 * trained + 12 * averaged) / 4.3e12)
    assert 0.2 < step.backward < 2 / 3


def test_measured_step_takes_the_place_of_the_roofline():
    step = gpu_step(MODEL, 128, step_ms=50.0)
    assert step.seconds(128) == pytest.approx(0.05)
    assert step.seconds(64) == pytest.approx((0.05 + step.fixed_seconds) / 2)
    with pytest.raises(ValueError, match="give the milliseconds of a whole step of 128 images"):
        gpu_step(MODEL, 128, step_ms=1e-6)


def test_scaling_is_perfect_with_an_endless_bandwidth_and_lost_without():
    best = modelled(MODEL, [1, 16, 256], 128, 1e12, 50.0)
    assert [row["efficiency"] for row in best["weak"].values()] == pytest.approx([1, 1, 1])
    fixed = best["assumed"]["of_it_whatever_the_images_ms"]
    step = best["strong"]["256"]["step_ms"]
    one = 16 * (50.0 - fixed) + fixed  # 2,048 images on one GPU
    assert best["strong"]["256"]["efficiency"] == pytest.approx(one / 256 / step)
    worst = modelled(MODEL, [16, 256], 128, 1e-3, 50.0)
    assert worst["weak"]["256"]["efficiency"] < 0.05
    assert worst["weak"]["16"] == worst["strong"]["16"]  | {
        "efficiency": worst["weak"]["16"]["efficiency"]
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"gpus \[3\] do not divide the published batch"):
        modelled(MODEL, [3, 8], 128, 100.0, None)


def points(*values):
    return {str(v): {"x": v, "work": v, "step_seconds": v / 1000} for v in values}


def test_picture_and_table(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "ijepa_zoo.bench.growth.in_ranks",
        lambda f, world, **rest: {"step_seconds": 0.1, "images_per_second": 1.0, "on_gpu": False},
    )
    found = bench.scaling(
        models=[MODEL], img_sizes=[64], batch_sizes=[1], ranks=[1, 2], device="cpu", threads=1,
        plot=tmp_path / "scaling.png", gpu_model=MODEL, gpus=[8], seconds=0.1, rounds=3,
    )  # fmt: skip
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "--plot scaling.png" in found.command
    assert found.extra["many_gpus"]["weak"]["8"]["images_per_gpu"] == 128
    assert "    8: images_per_gpu 128, " in str(found)
    found.save(tmp_path)
    filled = fill("<!-- bench:scale_out -->\n<!-- /bench -->", tmp_path)
    assert "A model, not a measurement" in filled
    assert "Measured" not in filled
    assert f"| strong: {MODEL}, " in filled
    measured = fill("<!-- bench:scaling -->\n<!-- /bench -->", tmp_path)
    assert "| ranks 2 | 100 ms |" in measured


def test_points_stand_where_they_were_measured(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *given, **rest: drawn.append(self))
    axes = {name: points(10, 20) for name in ("model", "img_size", "batch_size", "ranks")}
    draw_scaling(axes, modelled(MODEL, [8, 16], 128, 100.0, None), tmp_path / "a.png")
    panels = drawn[0].axes
    assert len(panels) == 6
    for panel in panels[:4]:
        assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
        assert list(panel.lines[0].get_ydata()) == [10, 20]
        assert list(panel.lines[1].get_ydata()) == [10, 20]
        assert panel.get_title().startswith("Measured")
    assert all("not measured" in panel.get_title() for panel in panels[4:])


def test_times_that_differ_by_rounding_have_an_axis(tmp_path):
    """Seen by chance: one point, whose expected time is its own up to the last bit."""
    row = {"x": 64.0, "work": 0.3, "step_seconds": 0.1}
    odd = {"64": row, "65": row | {"x": 65.0, "step_seconds": 0.1 + 2e-17}}
    axes = dict.fromkeys(("model", "img_size", "batch_size", "ranks"), odd)
    draw_scaling(axes, modelled(MODEL, [8, 16], 128, 100.0, None), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size


def test_plot_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("ijepa_zoo.bench.growth.OurStep", None)
    for wrong in (tmp_path, tmp_path / "a.pdf", tmp_path / "nowhere" / "a.png"):
        with pytest.raises(ValueError, match=r"give the name of a \.png file in a folder"):
            bench.scaling(plot=wrong)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'ijepa-zoo\[plot\]'"):
        refuse_plot(tmp_path / "a.png")
