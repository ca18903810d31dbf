"""What saving costs a run: the longest step while a checkpoint is written, and the time lost.

python examples/benchmarks/checkpoint.py --model vit_tiny16_ijepa
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import parse, parser, report, summary, write

from ijepa_zoo.train import Trainer, load_config, pretrain


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--model", default="vit_nano8_64_ijepa")
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    made.add_argument("--every", type=int, default=20, help="steps between saves")
    made.add_argument("--saves", type=int, default=5)
    args = parse(made)
    side = 64 if "64" in args.model else 224
    shape = (4 * args.batch_size, side, side, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    steps = args.every * (args.saves + 1)
    config = load_config(
        "vith14_in1k",
        [
            f"model.name={args.model}", "data.held_out=0", "mask.cut=global",
            f"mask.min_keep={4 if side == 64 else 10}", f"optim.batch_size={args.batch_size}",
            f"optim.precision={args.precision}", f"optim.duration={steps} steps",
            "optim.warmup=1 steps", f"log.save_every={args.every} steps", "log.keep=1",
            f"log.monitor_every={steps}", f"log.log_every={steps}", f"machine.device={args.device}",
        ],
    )  # fmt: skip
    ends: list[float] = []
    update = Trainer.update

    def timed_update(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        result = update(self, *args, **kwargs)
        ends.append(time.perf_counter())
        return result

    Trainer.update = timed_update  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        pretrain(config, images, Path(folder) / "run", progress=False)

    gaps = np.diff(ends)[args.every // 2 :]  # step k's time, with the save before it
    usual = statistics.median(gaps)
    first = args.every - args.every // 2 - 1  # gaps of the steps after a save
    windows = [gaps[first + args.every * k :][: args.every // 2] for k in range(args.saves)]
    others = [gaps[first + args.every * k :][args.every // 2 : -1] for k in range(args.saves)]
    metrics = {
        "step": {"seconds": usual},
        "saving": {
            "longest step, in steps": summary([window.max() / usual for window in windows]),
            "steps lost": summary([window.sum() / usual - len(window) for window in windows]),
        },
        "without": {
            "longest step, in steps": summary([o[: args.every // 2].max() / usual for o in others])
        },
    }
    write(args, metrics)
    report(metrics, {})


if __name__ == "__main__":
    main()
