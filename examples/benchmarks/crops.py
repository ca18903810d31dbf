"""Time reading, decoding, cropping and collating batches in one process, against the official code.

    python examples/benchmarks/crops.py --official ijepa --data imagenet/train

Ours are the trainer's batches, uint8 with masks; the official ones are normalized float32, without
masks.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from harness import (
    OURS,
    agree,
    image_files,
    interleave,
    parse,
    parser,
    random_jpegs,
    ratios,
    report,
    summary,
    write,
)
from official import load_official
from torch.utils.data import default_collate
from torchvision.datasets.folder import default_loader

from ijepa_zoo.data import Decoder, open_images
from ijepa_zoo.train import Trainer, load_config


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="folder of JPEG files; default: random ones")
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--img-size", type=int, default=224)
    made.add_argument("--official", type=Path, default=Path("ijepa"), help="its clone")
    args = parse(made)
    with tempfile.TemporaryDirectory() as scratch:
        source = args.data or random_jpegs(Path(scratch), 256)
        paths = [str(path) for path in image_files(source, 4 * args.batch_size * args.rounds)]
        config = load_config(
            "vith14_in1k",
            [
                "model.name=vit_tiny16_ijepa", f"model.img_size={args.img_size}",
                "data.held_out=0", "mask.group_size=global", f"optim.batch_size={args.batch_size}",
                "optim.precision=fp32", "runtime.workers=0", "runtime.device=cpu",
            ],
        )  # fmt: skip
        images = open_images(paths, decoder=Decoder(as_tensor=True))
        batches = iter(Trainer(config, images).batches())
        transform = load_official(args.official)["transforms"].make_transforms(
            args.img_size, config.data.crop_scale, color_jitter=0.0
        )

        def official_batch(number: int) -> float:
            first = number * args.batch_size
            chosen = [paths[(first + i) % len(paths)] for i in range(args.batch_size)]
            batch, _ = default_collate([(transform(default_loader(path)), 0) for path in chosen])
            return batch

        ours = next(batches)[0].images.float().mean() / 255
        mean, std = (sum(values) / 3 for values in (config.data.mean, config.data.std))
        difference = abs(float(official_batch(0).mean() * std + mean - ours))
        agreement = {"official": agree("mean pixels of a batch, of 1,", difference, 0.1)}
        contenders = {
            OURS: lambda number: next(batches) and None,
            "official": lambda number: official_batch(number) is None,
        }
        for samples in interleave(contenders, args.seconds, args.rounds):
            metrics = {
                name: {
                    "seconds": summary(values),
                    "images_per_second": args.batch_size / summary(values)["median"],
                }
                for name, values in samples.items()
            }
            write(args, metrics, ratios=ratios(samples), agreement=agreement)
    report(metrics, ratios(samples))


if __name__ == "__main__":
    main()
