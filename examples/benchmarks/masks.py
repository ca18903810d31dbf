"""Time the masks of a batch against the official collator.

python examples/benchmarks/masks.py --official ijepa
"""

from __future__ import annotations

import statistics
from pathlib import Path

from harness import OURS, agree, interleave, parse, parser, ratios, report, summary, write
from official import load_official

from ijepa_zoo.masks import MultiBlockMasks

BATCHES = 10  # of a round
COMPARED = 20  # batches


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--batch-size", type=int, default=128)
    made.add_argument("--grid", type=int, default=16, help="patches of a side")
    made.add_argument("--mode", choices=["published", "unbiased"], default="published")
    made.add_argument("--official", type=Path, default=Path("ijepa"), help="its clone")
    args = parse(made)
    sampler = MultiBlockMasks((args.grid, args.grid), mode=args.mode)
    collate = load_official(args.official)["multiblock"].MaskCollator(
        input_size=(args.grid, args.grid), patch_size=1, pred_mask_scale=sampler.target_scale,
        enc_mask_scale=sampler.context_scale, aspect_ratio=sampler.target_aspect, nenc=1,
        npred=sampler.num_targets, min_keep=sampler.min_keep, allow_overlap=False,
    )  # fmt: skip
    batch = list(range(args.batch_size))
    ours = [sampler.sample(len(batch), seed=0, step=s)[0].shape[1] for s in range(COMPARED)]
    theirs = [collate(batch)[1][0].shape[1] for _ in range(COMPARED)]
    difference = abs(statistics.fmean(ours) / statistics.fmean(theirs) - 1)
    tolerance = 0.1 if args.mode == "published" else 0.5
    agreement = {"official": agree("mean context lengths, relative,", difference, tolerance)}

    def sample(number: int) -> None:
        for step in range(BATCHES):
            sampler.sample(args.batch_size, seed=0, step=BATCHES * number + step)

    def collate_batches(number: int) -> None:
        for _ in range(BATCHES):
            collate(batch)

    contenders = {OURS: sample, "official": collate_batches}
    for samples in interleave(contenders, args.seconds, args.rounds):
        metrics = {
            name: {"seconds": summary([value / BATCHES for value in values])}
            for name, values in samples.items()
        }
        write(args, metrics, ratios=ratios(samples), agreement=agreement)
    report(metrics, ratios(samples))


if __name__ == "__main__":
    main()
