import runpy
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ijepa_zoo

TRAIN = Path(__file__).parents[2] / "examples" / "pretrain_nano" / "train.py"


def test_photographs_and_scenes(tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    for name, shape in (("small", (64, 70, 3)), ("large", (150, 200, 3))):
        (tmp_path / name).mkdir()
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
    command = f"""train.py {tmp_path}/run --scenes 70 --crops 2
        --photos {tmp_path}/small {tmp_path}/large --set runtime.workers=0 optim.precision=fp32
        optim.batch_size=8 data.held_out=8"""
    short = ["optim.duration=2 steps", "optim.warmup=1 steps"]
    monkeypatch.setattr(sys, "argv", [*command.split(), *short])
    threads = torch.get_num_threads()
    runpy.run_path(str(TRAIN), run_name="__main__")
    torch.set_num_threads(threads)
    images = np.load(tmp_path / "run" / "images.npy")
    assert images.shape == (70 + 1 + 2, 64, 64, 3)
    model = ijepa_zoo.create_model(f"local-dir:{tmp_path / 'run' / 'export'}")
    assert model.forward_features(torch.zeros(1, 3, 64, 64)).shape == (1, 64, 128)
