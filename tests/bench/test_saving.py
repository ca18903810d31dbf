"""What a save costs is what its steps take beyond those without one."""

import pytest

from ijepa_zoo import bench
from ijepa_zoo.bench.saving import _Saving, _stalled
from ijepa_zoo.bench.steps import OurStep, StepSettings
from ijepa_zoo.bench.tables import fill
from ijepa_zoo.train.checkpoint import Checkpoints, read_checkpoint

MODEL = "vit_nano8_64_ijepa"


def test_stall_and_loss_are_counted_in_steps():
    without = [{"seconds": 2.0}, {"seconds": 1.0}]
    saving = [
        {"seconds": 3.0, "all_seconds": 9.0, "steps": 4},
        {"seconds": 2.0, "all_seconds": 5.5, "steps": 3},
    ]
    found = _stalled(without, saving)
    assert found["steps_stalled"].range == (0.5, 1.0)
    assert found["steps_lost"].range == (0.5, 2.5)


def test_a_round_writes_a_whole_checkpoint_of_the_trainers_state(tmp_path):
    work = _Saving(OurStep(StepSettings(MODEL, batch_size=2, device="cpu")), tmp_path / "saves")
    trainer = work.step.trainer
    for _ in range(2):
        begun = trainer.step
        found = work.steps_with()
        assert trainer.step - begun == found["steps"] >= 2
        assert work.checkpoints.complete() == [begun + 1]  # whole, and no older one is left
    stored, _ = read_checkpoint(tmp_path / "saves")
    assert stored.keys() == trainer.tensors().keys()
    bytes_of_state = sum(tensor.nbytes for tensor in trainer.tensors().values())
    assert bytes_of_state < work.size() < 1.1 * bytes_of_state
    assert found["copy_seconds"] < found["save_seconds"] <= found["all_seconds"]
    begun = trainer.step
    work.steps_without()
    assert trainer.step - begun == max(3, found["steps"])


def test_checkpoint(tmp_path):
    found = bench.checkpoint(
        model=MODEL, batch_size=2, device="cpu", folder=tmp_path, threads=1, seconds=0.1, rounds=3
    )
    saving = found.results["while saving"]
    assert saving["steps_stalled"] == saving["steps_stalled_summary"]["median"]
    assert saving["steps_stalled_summary"]["count"] == 3
    assert set(found.extra["first_save"]) == {"steps_stalled", "steps_lost"}
    assert not list(tmp_path.iterdir())
    found.save(tmp_path)
    filled = fill("<!-- bench:checkpoint -->\n<!-- /bench -->", tmp_path)
    assert f"| {saving['bytes_written'] / 1e6:.0f} MB |" in filled
    assert f"| {MODEL}, batch size 2, fp32 |" in filled


def test_failed_save_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoints, "_write_tensors", lambda *given: "no space left")
    with pytest.raises(OSError, match="no space left"):
        bench.checkpoint(model=MODEL, batch_size=2, device="cpu", folder=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="nowhere is no folder: make it first"):
        bench.checkpoint(model=MODEL, folder=tmp_path / "nowhere")
