"""`optim.precision=auto`: what the device multiplies natively, decided once for a run."""

import pytest
import torch
from small_run import CONFIG, change, pictures, stop_after, train

from ijepa_zoo.data import open_images
from ijepa_zoo.errors import RunError
from ijepa_zoo.train import Trainer, load_config
from ijepa_zoo.train.folder import read_settings
from ijepa_zoo.train.precision import has_native_bf16

AUTO = change(CONFIG, optim={"precision": "auto", "duration": "6 steps"})


def bf16_is_native(monkeypatch, native):
    monkeypatch.setattr("ijepa_zoo.train.precision.has_native_bf16", lambda device: native)


@pytest.mark.parametrize(
    ("found", "native"), [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({}, False)]
)
def test_native_on_a_cpu(monkeypatch, found, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert has_native_bf16(torch.device("cpu")) == native


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True)])
def test_native_on_a_gpu(monkeypatch, capability, native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_native_bf16(torch.device("cuda", 0)) == native


def test_own_recipes_choose_and_those_of_the_paper_do_not():
    assert load_config("custom_small").optim.precision == "auto"
    assert load_config("vitb16_in1k").optim.precision == "bf16"


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_run_keeps_its_precision_on_another_device(tmp_path, monkeypatch, native, precision):
    bf16_is_native(monkeypatch, native)
    stop_after(monkeypatch, 3, tmp_path, AUTO)
    bf16_is_native(monkeypatch, not native)
    train(tmp_path, AUTO)
    assert read_settings(tmp_path).optim.precision == precision
    other = {"bf16": "fp32", "fp32": "bf16"}[precision]
    with pytest.raises(RunError, match=r"optim\.precision"):
        train(tmp_path, change(AUTO, optim={"precision": other}))


@pytest.mark.parametrize("native", [True, False])
def test_emulated_bf16_is_announced(monkeypatch, caplog, native):
    bf16_is_native(monkeypatch, native)
    Trainer(change(CONFIG, optim={"precision": "bf16"}), open_images(pictures()))
    assert ("optim.precision=fp32" in caplog.text) != native
