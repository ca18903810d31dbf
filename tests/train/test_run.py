import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import CONFIG, after_updates, change, pictures, rows, same_state, state

import ijepa_zoo
from ijepa_zoo.data import open_images
from ijepa_zoo.errors import CheckpointError, DataError, RunError
from ijepa_zoo.models.jepa import IJepa
from ijepa_zoo.train import Interrupted, NonFiniteLossError, Trainer, export_run, plot_run, pretrain
from ijepa_zoo.train.checkpoint import checkpoint_steps
from ijepa_zoo.train.logger import read_log

IMAGES = pictures()


def train(folder, config=CONFIG, images=IMAGES, **options):
    return pretrain(config, images, folder, progress=False, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, whole, number):
    with monkeypatch.context() as patch:
        after_updates(patch, 5, lambda: signal.raise_signal(number))
        with pytest.raises(Interrupted, match=r"after step [56] of 9.*again") as stop:
            train(tmp_path)
    assert stop.value.signal == number
    torch.manual_seed(123)  # global state must not matter
    np.random.seed(5)
    train(tmp_path)
    assert same_state(whole, tmp_path)
    assert rows(whole) == rows(tmp_path)


def test_crash_goes_back_to_the_last_checkpoint(tmp_path, monkeypatch, whole):
    def crash():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        after_updates(patch, 7, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(tmp_path)
    train(tmp_path)
    assert same_state(whole, tmp_path)
    assert rows(whole) == rows(tmp_path)
    assert [float(row["step"]) for row in rows(tmp_path)] == list(range(9))


def test_second_interrupt_ends_at_once(tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    after_updates(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt, match="without saving") as stop:
        train(tmp_path)
    assert not isinstance(stop.value, Interrupted)


def test_finished_run_is_left_alone(tmp_path):
    train(tmp_path)

    def files():
        found = (path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock")
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found
                if path.name not in ("config.yaml", "data.json")}  # fmt: skip

    before = files()
    train(tmp_path)
    assert files() == before


def test_other_settings_are_refused_with_the_difference(whole):
    with pytest.raises(RunError, match=r"optim\.lr: 0\.001 then, 0\.1 now"):
        train(whole, change(CONFIG, optim={"lr": 0.1}))


def test_runtime_and_log_settings_may_change(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        after_updates(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(tmp_path)
    train(tmp_path, change(CONFIG, runtime={"workers": 2}, log={"keep": 3}))
    assert same_state(whole, tmp_path)


def test_other_images_are_refused(whole):
    with pytest.raises(RunError, match="40 then, 30 now"):
        train(whole, images=IMAGES[:30])


def test_folder_in_use_is_refused(tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"), pytest.raises(RunError, match="another process"):
        train(tmp_path)


def test_export_makes_a_model_with_the_transform_of_training(whole):
    model = ijepa_zoo.create_model(f"local-dir:{whole}")
    tensors, _ = state(whole)
    assert torch.equal(model.norm.bias, tensors["target_encoder.norm.bias"])
    context = ijepa_zoo.create_model(f"local-dir:{whole}", network="encoder")
    assert torch.equal(context.norm.bias, tensors["encoder.norm.bias"])
    again = ijepa_zoo.create_ijepa(f"local-dir:{whole}")
    assert torch.equal(again.predictor.mask_token, tensors["predictor.mask_token"])
    assert tuple(model.pretrained_cfg["mean"]) == CONFIG.data.mean == (0.4, 0.5, 0.6)


def test_export_of_an_unfinished_run(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        after_updates(patch, 6, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(tmp_path)
    with pytest.raises(CheckpointError, match="`ijepa-zoo export"):
        ijepa_zoo.create_model(f"local-dir:{tmp_path}")
    export_run(tmp_path)
    tensors, _ = state(tmp_path)
    model = ijepa_zoo.create_model(f"local-dir:{tmp_path}")
    assert torch.equal(model.norm.weight, tensors["target_encoder.norm.weight"])
    earlier = export_run(tmp_path, tmp_path / "earlier", step=4)
    model = ijepa_zoo.create_model(f"local-dir:{earlier}")
    assert not torch.equal(model.norm.weight, tensors["target_encoder.norm.weight"])


def test_loss_that_is_not_finite_names_step_rank_and_images(tmp_path, monkeypatch):
    original = IJepa.forward
    calls = []

    def forward(self, images, context, targets):
        calls.append(1)
        loss = original(self, images, context, targets)
        return loss * float("nan") if len(calls) in (6, 9) else loss  # steps 2 and 4, part 2 and 1

    with monkeypatch.context() as patch:
        patch.setattr(IJepa, "forward", forward)
        with pytest.raises(NonFiniteLossError, match=r"step 2 is nan on rank 0 \(images "):
            train(tmp_path / "stops")
        calls.clear()
        train(tmp_path / "skips", skip_nonfinite=2)
    tensors, about = state(tmp_path / "skips")
    assert about["skipped"] == [2, 4]
    assert all(value.isfinite().all() for value in tensors.values())
    assert tensors["optimizer.encoder.norm.bias.step"] == 7
    assert {float(row["step"]) for row in rows(tmp_path / "skips")} == {0, 1, 3, 5, 6, 7, 8}


def test_starts_from_weights_at_another_size_and_with_other_channels(tmp_path, whole):
    change_size = {"img_size": 48, "patch_size": 6, "in_chans": 1}
    grey = change(
        CONFIG,
        model=change_size,
        data={"mean": (0.5,), "std": (0.25,)},
        optim={"duration": "1 steps", "warmup": "0 steps"},
    )
    train(tmp_path, grey, images=IMAGES[..., 0], init=whole / "export")
    tensors, _ = state(tmp_path)
    assert tensors["encoder.patch_embed.proj.weight"].shape == (24, 1, 6, 6)
    before, _ = state(whole)
    name = "encoder.blocks.0.attn.qkv.weight"
    assert (tensors[name] - before[name]).abs().max() < 0.01
    assert ijepa_zoo.create_model(f"local-dir:{tmp_path}").patch_embed.proj.in_channels == 1


def test_broken_images_are_named_and_stop_the_run_above_a_share(tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i, picture in enumerate(IMAGES):
        Image.fromarray(picture).save(folder / f"{i:02}.png")
    (folder / "07.png").write_bytes(b"no image")
    (folder / "19.png").write_bytes((folder / "19.png").read_bytes()[:60])
    allowed = change(CONFIG, data={"max_broken": 0.2})
    train(tmp_path / "goes_on", allowed, str(folder))
    text = (tmp_path / "goes_on" / "broken-0.jsonl").read_text()
    named = [Path(json.loads(line)["image"]).name for line in text.splitlines()]
    assert sorted(named) == ["07.png", "19.png"]
    with pytest.raises(DataError, match=r"broken-\*\.jsonl"):
        train(tmp_path / "stops", change(CONFIG, data={"max_broken": 0.0}), str(folder))


def test_seed_and_bf16(whole, tmp_path):
    short = {"duration": "2 steps", "warmup": "1 steps"}
    train(tmp_path / "a", change(CONFIG, optim=short))
    train(tmp_path / "b", change(CONFIG, optim=short, seed=1))
    train(tmp_path / "c", change(CONFIG, optim={**short, "precision": "bf16"}))
    losses = {name: float(rows(tmp_path / name)[0]["loss"]) for name in "abc"}
    assert losses["a"] != losses["b"]
    assert losses["c"] == pytest.approx(losses["a"], rel=0.02)


def stop_after(monkeypatch, updates, folder, config=CONFIG, **options):
    with monkeypatch.context() as patch:
        after_updates(patch, updates, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(folder, config, **options)


def test_an_export_of_an_earlier_step_is_replaced_at_the_end(tmp_path, monkeypatch, whole):
    stop_after(monkeypatch, 5, tmp_path)
    export_run(tmp_path)
    before = ijepa_zoo.create_model(f"local-dir:{tmp_path}").norm.bias.clone()
    train(tmp_path)
    after = ijepa_zoo.create_model(f"local-dir:{tmp_path}").norm.bias
    assert not torch.equal(before, after)
    assert torch.equal(after, state(whole)[0]["target_encoder.norm.bias"])


def test_a_folder_of_something_else_where_the_export_goes_is_refused_at_once(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine.txt").write_text("keep me")
    with pytest.raises(RunError, match=r"mine\.txt"):
        train(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_ruined_weights_are_never_saved_nor_exported(tmp_path):
    wild = change(CONFIG, optim={"lr": 1e30, "start_lr": 1e30, "regularizer_weight": 0.0})
    with pytest.raises(NonFiniteLossError, match=r"step 1 is nan"):
        train(tmp_path / "a", wild)
    with pytest.raises(NonFiniteLossError, match="ruined the weights"):
        train(tmp_path / "b", wild, skip_nonfinite=100)
    every = change(wild, log={"save_every": "1 steps"})
    with pytest.raises(NonFiniteLossError, match="not finite after step 1"):
        train(tmp_path / "c", change(every, optim={"lr": 3e38, "start_lr": 3e38}))
    for name in "abc":
        assert checkpoint_steps(tmp_path / name / "checkpoints") == []
        assert not (tmp_path / name / "export").exists()


def test_settings_that_are_gone_or_damaged_are_not_guessed(tmp_path, monkeypatch):
    stop_after(monkeypatch, 5, tmp_path)
    settings, data = tmp_path / "config.yaml", tmp_path / "data.json"
    text = settings.read_text()
    settings.write_text("")
    with pytest.raises(RunError, match=r"config\.yaml is damaged"):
        train(tmp_path)
    with pytest.raises(RunError, match="damaged"):
        export_run(tmp_path)
    settings.unlink()
    with pytest.raises(RunError, match=r"has no config\.yaml"):
        train(tmp_path)
    settings.write_text(text.replace("depth: 2", "depth: 3"))
    with pytest.raises(CheckpointError, match=r"config\.yaml: .*blocks\.2"):
        export_run(tmp_path)
    settings.write_text(text)
    data.write_text("{}")
    with pytest.raises(RunError, match=r"data\.json.*missing or damaged"):
        train(tmp_path)


def test_a_run_of_version_0_1_is_refused(tmp_path, monkeypatch):
    stop_after(monkeypatch, 5, tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("runtime:", "machine:").replace("group_size:", "cut:"))
    for action in (train, export_run, plot_run):
        with pytest.raises(RunError, match=r"0\.1.*that version"):
            action(tmp_path)


def test_export_says_which_steps_there_are(whole, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7: it has \[8, 9\]"):
        export_run(whole, tmp_path / "export", step=7)


def test_going_back_does_the_steps_again(tmp_path, whole):
    train(tmp_path)
    train(tmp_path, resume_from=8)
    assert rows(tmp_path) == rows(whole)
    assert same_state(tmp_path, whole)


def test_weights_to_start_from_are_not_needed_to_go_on(tmp_path, monkeypatch, whole):
    start = tmp_path / "start"
    export_run(whole, start)
    stop_after(monkeypatch, 5, tmp_path / "run", init=start)
    start.rename(tmp_path / "gone")
    train(tmp_path / "run", init=start)
    assert state(tmp_path / "run")[1]["initial"] != {}


def test_run_folder_inside_its_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="images"):
        train(tmp_path / "images" / "run", images=str(tmp_path / "images"))
    with pytest.raises(ValueError, match="no name"):
        train("")


def test_signal_before_the_first_step_stops_there(tmp_path, monkeypatch):
    def stop(out, config, *others):
        signal.raise_signal(signal.SIGUSR1)
        return config

    monkeypatch.setattr("ijepa_zoo.train.run.reconcile_settings", stop)
    with pytest.raises(Interrupted, match="after step 0 of 9"):
        train(tmp_path)


def test_patches_must_fill_the_image():
    with pytest.raises(ValueError, match=r"img_size \(50, 50\)"):
        Trainer(change(CONFIG, model={"img_size": 50}), open_images(IMAGES))


def test_rows_are_means_over_their_steps(whole, tmp_path):
    train(tmp_path, change(CONFIG, log={"log_every": 3, "monitor_every": 100}))
    for name in ("loss", "regularizer", "mask-A"):
        single = np.array([float(row[name]) for row in rows(whole)])
        means = [float(row[name]) for row in rows(tmp_path)]
        assert means == pytest.approx(single.reshape(3, 3).mean(1), rel=1e-6)
    assert all(0 < row["data_wait"] < 1 for row in read_log(tmp_path))


def test_the_regularizers_part_of_the_loss_is_logged(whole, tmp_path):
    config = change(CONFIG, optim={"regularizer_weight": 0.0, "duration": "4 steps"})
    train(tmp_path, config)
    with_term, without = rows(whole)[0], rows(tmp_path)[0]
    assert without["regularizer"] == ""
    part = float(with_term["loss"]) - float(without["loss"])
    assert float(with_term["regularizer"]) == pytest.approx(part, rel=1e-3)


SMALL_DATA = {
    "model": {"predictor_context": "shared", "predictor_depth": 2},
    "mask": {"per_image": 2},
    "optim": {
        "target_layers": 2, "position_noise": 0.25,
        "regularizer": "isotropic_gaussian", "duration": "4 steps",
    },
}  # fmt: skip


def test_settings_for_small_data_resume_exactly_and_accumulate(tmp_path, monkeypatch):
    config = change(CONFIG, **SMALL_DATA)
    train(tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        after_updates(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(tmp_path / "stopped", config)
    train(tmp_path / "stopped", config)
    assert same_state(tmp_path / "whole", tmp_path / "stopped")
    free = change(config, optim={"regularizer_weight": 0.0})
    for micro in (4, 2):
        train(tmp_path / str(micro), change(free, runtime={"micro_batch_size": micro}))
    one, two = ([float(r["loss"]) for r in rows(tmp_path / str(micro))] for micro in (4, 2))
    assert one == pytest.approx(two, rel=1e-5)
    images = open_images(IMAGES)
    with pytest.raises(ValueError, match=r"^optim\.target_layers"):
        Trainer(change(config, optim={"target_layers": 3}), images)
    (batch, *_), *_ = Trainer(config, images).batches()
    assert len(batch.images) * 2 == len(batch.context) == len(batch.targets)
    assert not torch.equal(batch.context[0], batch.context[1])


def test_a_broken_image_whose_line_was_cut_off_is_named_again(tmp_path, monkeypatch):
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for i, picture in enumerate(IMAGES):
        Image.fromarray(picture).save(images / f"{i:02}.png")
    (images / "07.png").write_bytes(b"no image")
    config = change(CONFIG, data={"max_broken": 1.0}, log={"keep": 9})
    stop_after(monkeypatch, 6, tmp_path / "run", config, images=str(images))
    file = tmp_path / "run" / "broken-0.jsonl"
    whole = file.read_bytes()
    for _ in range(2):
        file.write_bytes(whole[:-9])
        train(tmp_path / "run", config, images=str(images), resume_from=4)
        assert [Path(json.loads(line)["image"]).name for line in file.open()] == ["07.png"]


def test_an_error_leaves_no_save_behind(tmp_path, monkeypatch, whole):
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    def slow(*args):
        time.sleep(1)
        return write(*args)

    write = FileSystemWriter.write_data
    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", slow)
        after_updates(patch, 5, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000004"]
    train(tmp_path)
    assert same_state(tmp_path, whole)


def test_after_going_back_and_a_crash_the_log_has_no_gap(tmp_path, monkeypatch, whole):
    train(tmp_path, change(CONFIG, log={"keep": 9}))
    with monkeypatch.context() as patch:
        after_updates(patch, 2, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, resume_from=4)
    train(tmp_path)
    assert rows(tmp_path) == rows(whole)
    assert same_state(tmp_path, whole)


def test_checkpoints_are_kept_at_their_own_interval(tmp_path):
    train(tmp_path, change(CONFIG, log={"keep": 1, "keep_every": "3 steps"}))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000000003", "step-000000006", "step-000000009"]


def test_a_skipped_step_is_saved_and_monitored(tmp_path, monkeypatch):
    original, calls = IJepa.forward, []

    def forward(self, images, context, targets):
        calls.append(1)
        loss = original(self, images, context, targets)
        return loss * float("nan") if len(calls) in (15, 17) else loss  # steps 7 and 8

    monkeypatch.setattr(IJepa, "forward", forward)
    with pytest.raises(NonFiniteLossError, match="step 8"):  # two in a row
        train(tmp_path, skip_nonfinite=9)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-000000004",
        "step-000000008",
    ]
    assert [row["rankme"] != "" for row in rows(tmp_path)][-1]


def test_settings_of_a_damaged_checkpoint_are_not_extended(tmp_path, monkeypatch, whole):
    train(tmp_path)
    file = tmp_path / "checkpoints" / "step-000000009" / "__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    longer = change(CONFIG, optim={"duration": "12 steps", "extend": "constant"})
    with pytest.raises(CheckpointError, match="step-000000009"):
        train(tmp_path, longer)
    file.write_bytes(content)
    train(tmp_path)
    assert same_state(tmp_path, whole)


def test_a_log_of_version_0_1_is_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("machine:\n  workers: 2\n")
    (tmp_path / "log.csv").write_text("epoch,itr,loss\n1,0,0.5\n")
    with pytest.raises(RunError, match=r"0\.1"):
        train(tmp_path)
    assert "0.5" in (tmp_path / "log.csv").read_text()
