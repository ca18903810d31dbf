"""`optim.precision=auto`: what the device multiplies natively, decided once for a run."""

import logging
import signal

import pytest
import torch
from small_run import CONFIG, after_updates, change, pictures

from ijepa_zoo.data import open_images
from ijepa_zoo.errors import RunError
from ijepa_zoo.train import Interrupted, Trainer, load_config, pretrain
from ijepa_zoo.train.folder import read_settings
from ijepa_zoo.train.precision import has_native_bf16

AUTO = change(CONFIG, optim={"precision": "auto", "regularizer_weight": 0.0})


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
    with monkeypatch.context() as patch:
        after_updates(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            pretrain(AUTO, pictures(), tmp_path, progress=False)
    assert read_settings(tmp_path).optim.precision == precision
    bf16_is_native(monkeypatch, not native)
    pretrain(AUTO, pictures(), tmp_path, progress=False)
    assert read_settings(tmp_path).optim.precision == precision
    other = {"bf16": "fp32", "fp32": "bf16"}[precision]
    with pytest.raises(RunError, match=r"optim\.precision"):
        pretrain(change(AUTO, optim={"precision": other}), pictures(), tmp_path, progress=False)


@pytest.mark.parametrize(("native", "warnings"), [(True, 0), (False, 1)])
def test_emulated_bf16_is_announced(monkeypatch, caplog, native, warnings):
    bf16_is_native(monkeypatch, native)
    with caplog.at_level(logging.WARNING):
        Trainer(change(CONFIG, optim={"precision": "bf16"}), open_images(pictures()))
    told = ["optim.precision=fp32" in record.getMessage() for record in caplog.records]
    assert sum(told) == warnings
