"""Linear probes of a checkpoint on unseen scenes, beside random initialisation.

Frozen features, standardised, multinomial logistic regression (L-BFGS); the weight decay is chosen
on the last fifth of the training scenes and the test scenes are read once per row. Tasks: number
of objects (8 classes) and depth bin of the nearest object (6 classes, CLEVR's bins).

    python examples/pretrain_scenes/probe.py RUN_FOLDER --out probe.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ijepa_zoo
from ijepa_zoo.data.scenes import SPLIT_STARTS, count_class, distance_class, render_scenes
from ijepa_zoo.seeds import Stream, fold
from ijepa_zoo.train.data import normalize

DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)


@torch.no_grad()
def features(encoder: Any, images: np.ndarray) -> dict[str, torch.Tensor]:
    """Mean over patches of the normalised last block output, and of the last four, concatenated."""
    rows: dict[str, list[torch.Tensor]] = {"last": [], "last4": []}
    mean, std = (tuple(encoder.pretrained_cfg[key]) for key in ("mean", "std"))
    for start in range(0, len(images), 256):
        pixels = torch.from_numpy(images[start : start + 256]).movedim(3, 1)
        blocks = encoder.forward_intermediates(
            normalize(pixels, mean, std),
            indices=4,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        pooled = [block.mean(dim=1) for block in blocks]
        rows["last"].append(pooled[-1])
        rows["last4"].append(torch.cat(pooled, dim=1))
    return {name: torch.cat(parts) for name, parts in rows.items()}


def fit(x: torch.Tensor, y: torch.Tensor, decay: float) -> torch.nn.Linear:
    """Multinomial logistic regression with an L2 penalty of decay / 2 on the weights."""
    head = torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(x), y)
        loss = loss + decay / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head


def accuracy(head: torch.nn.Linear, x: torch.Tensor, y: torch.Tensor) -> float:
    """Percent of rows whose highest logit is the label."""
    with torch.no_grad():
        return 100 * float((head(x).argmax(dim=1) == y).float().mean())


def probe(
    train: torch.Tensor, test: torch.Tensor, y_train: torch.Tensor, y_test: torch.Tensor
) -> float:
    """Test accuracy in percent; the decay is chosen on the last fifth of the training rows."""
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    cut = len(train) * 4 // 5
    scores = {
        decay: accuracy(fit(train[:cut], y_train[:cut], decay), train[cut:], y_train[cut:])
        for decay in DECAYS
    }
    return accuracy(fit(train, y_train, max(scores, key=scores.__getitem__)), test, y_test)


def labels(scenes: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Classes of both tasks."""
    return {
        "count": torch.tensor([count_class(int(c)) for c in scenes["count"]]),
        "distance": torch.tensor([distance_class(float(d)) for d in scenes["distance"]]),
    }


def main() -> None:
    """Probe a run's target encoder and random initialisations; print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="run folder or export")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--train", type=int, default=8000, help="scenes to fit on")
    parser.add_argument("--test", type=int, default=4000, help="unseen scenes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    parser.add_argument("--random-seeds", type=int, default=3, help="random initialisations")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    encoder = ijepa_zoo.create_model(f"local-dir:{args.run}").eval()
    trained = {name: value.clone() for name, value in encoder.state_dict().items()}
    size = encoder.patch_embed.img_size[0]
    train = render_scenes(args.seed, SPLIT_STARTS["train"], args.train, size, progress=True)
    test = render_scenes(args.seed, SPLIT_STARTS["test"], args.test, size, progress=True)
    y_train, y_test = labels(train), labels(test)

    def row(name: str) -> dict[str, object]:
        x_train, x_test = (features(encoder, s["images"]) for s in (train, test))
        figures = {
            f"{task}_{kind}": round(probe(x_train[kind], x_test[kind], y_train[task], y), 2)
            for task, y in y_test.items()
            for kind in x_train
        }
        print(f"{name:20}" + "".join(f"{key:>16} {value:5.1f}" for key, value in figures.items()))
        return {"name": name, **figures}

    rows = []
    for seed in range(args.random_seeds):
        torch.manual_seed(fold(seed, Stream.PROBE))
        encoder.init_weights()
        rows.append(row(f"random {seed}"))
    encoder.load_state_dict(trained)
    rows.append(row("trained"))
    chance = {
        task: round(100 * float(y.bincount().max() / len(y)), 2) for task, y in y_test.items()
    }
    print("most frequent class:", chance)
    if args.out:
        result = {"train": args.train, "test": args.test, "most_frequent_class": chance}
        args.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
