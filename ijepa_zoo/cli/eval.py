"""`ijepa-zoo eval`: the paper's probes, one command each."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import SettingsError
from ..eval import (
    Result,
    evaluate_attentive,
    evaluate_dense_depth,
    evaluate_finetune,
    evaluate_head,
    evaluate_knn,
    evaluate_linear,
    evaluate_logreg,
    evaluate_segmentation,
    write_report,
)
from ..eval.finetune import MICRO_BATCH
from . import options
from .options import count, positive

_CLASSES = (
    "  classes: DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg (or val); or DIR/CLASS/*.jpg, of\n"
    "  which 20 % become the test set; or FILE.csv with path,label[,split] in its first line,\n"
    "  several labels of an image separated by ;"
)
_SCENES = (
    "  scenes: CLEVR's folder, with DIR/images/{train,val} and DIR/scenes/*.json; or\n"
    "  scenes:TRAIN,TEST, which renders that many"
)
_PAIRS = (
    "  --task dense: NYU Depth v2, as DIR/nyu_depth_v2_labeled.mat and DIR/splits.mat; or pairs\n"
    "  of the same name, DIR/train/rgb/1.jpg and DIR/train/depth/1.png, and DIR/test; or\n"
    "  scenes:TRAIN,TEST"
)
_MASKS = (
    "  ADE20K: DIR/images/{training,validation} and DIR/annotations/{training,validation};\n"
    "  VOC: DIR/JPEGImages, DIR/SegmentationClass, DIR/ImageSets/Segmentation/{train,val}.txt;\n"
    "  others: DIR/images/train/1.jpg and DIR/masks/train/1.png (class ids, 255 is ignored), and\n"
    "  DIR/images/val, DIR/masks/val, or without train and val; or scenes:TRAIN,TEST"
)
_PROBES = {  # help, layout of the data, options of an example
    "linear": ("linear classifiers on frozen features", _CLASSES, "--data photos --cached"),
    "attentive": ("attention pooling of patch tokens, then a linear classifier", _CLASSES,
                  "--data photos"),
    "count": ("number of objects in CLEVR's scenes", _SCENES, "--data scenes:5000,1000 --cached"),
    "depth": ("distance of the nearest object; dense depth maps", f"{_SCENES}\n{_PAIRS}",
              "--task dense --data nyu"),
    "segmentation": ("mean IoU of linear heads on patch features", _MASKS,
                     "--data scenes:2000,500 --cached"),
    "knn": ("nearest neighbors among frozen features", _CLASSES, "--data photos --baseline"),
    "finetune": ("train all weights with the paper's recipes", _CLASSES, "--data photos"),
    "logreg": ("logistic regression on frozen features; few labels", _CLASSES,
               "--data photos --per-class 10"),
}  # fmt: skip
_HEADS = ("linear", "count", "depth", "attentive")
_OF_TRAINING = (
    "model", "test", "checkpoint", "network", "img_size", "random", "baseline", "cached",
    "select_on_test", "with_encoder", "epochs", "batch_size", "lrs", "wds", "pool", "list",
    "per_class",
)  # fmt: skip
# Every other option is an argument of the probe's function, with the same name.
_OWN = {"run", "probe", "interrupted", "debug", "quiet"}


def add_eval(commands: options.Commands) -> list[argparse.ArgumentParser]:
    """`eval` and the commands below it."""
    parser = commands.add_parser(
        "eval",
        help="the paper's probes on your data",
        description="Evaluate an encoder with the paper's probes. The same command resumes after "
        "an interruption. Several processes: torchrun --nproc-per-node N -m ijepa_zoo eval ...",
    )
    probes = parser.add_subparsers(required=True, metavar="PROBE")
    parsers = [parser, *(_add_probe(probes, name) for name in _PROBES)]
    report = probes.add_parser("report", help="one table of several results")
    report.add_argument("results", nargs="+", metavar="RESULT", help="folders or result.json files")
    report.add_argument("--out", default="report.md", metavar="FILE", help="default: report.md")
    report.set_defaults(run=_report)
    return [*parsers, report]


def _add_probe(probes: options.Commands, name: str) -> argparse.ArgumentParser:
    purpose, layout, example = _PROBES[name]
    parser = probes.add_parser(
        name,
        help=purpose,
        description=f"{purpose.capitalize()}.",
        epilog=f"layout of --data:\n{layout}\n\n"
        f"example:\n  ijepa-zoo eval {name} --model vit_nano8_64_ijepa {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = parser.add_argument_group("options of the probe")
    _add_task(own, name)
    add = own.add_argument
    add("--out", default="results", metavar="DIR", help="of all evaluations (default: results)")
    if name in ("logreg", "finetune"):
        add("--list", metavar="FILE",
            help="names of the training images, one per line, such as ImageNet's 1 %%")  # fmt: skip
    if name == "logreg":
        add("--per-class", type=positive, metavar="K", help="use K training images per class")
    if name != "finetune":
        add("--baseline", action="store_true", help="also evaluate random weights and raw pixels")
        add("--select-on-test", action="store_true",
            help="choose the best setting on the test set, as is common in the literature",
        )  # fmt: skip
    if name in (*_HEADS, "segmentation"):
        add("--cached", action="store_true", help="encode images once, then train on the features")
        add("--lrs", type=options.numbers, metavar="LR,LR",
            help="learning rates, of heads for classes per 256 images (default: those of the "
            "protocol)")  # fmt: skip
        add("--wds", type=options.numbers, metavar="WD,WD",
            help="weight decays (default: those of the protocol)")  # fmt: skip
    if name in (*_HEADS, "segmentation", "logreg"):
        add("--with-encoder", action="store_true",
            help="save the encoder beside the chosen head (default: a reference)")  # fmt: skip
    if name in (*_HEADS, "segmentation", "finetune"):
        add("--epochs", type=positive, metavar="N", help="default: those of the paper's protocol")
    if name == "finetune":
        add("--micro-batch-size", type=positive, default=MICRO_BATCH, metavar="N",
            help=f"images per forward pass of a process (default: {MICRO_BATCH})")  # fmt: skip
        add("--grad-checkpointing", action="store_true", help="less memory, slower")
    keeps_head = name in (*_HEADS, "logreg")
    if keeps_head:
        add("--head", metavar="DIR", help="test a saved head (RUN/model) on --data, train none")
    model = options.add_model_options(parser, required=not keeps_head)
    model.add_argument("--random", action="store_true", help="random weights, drawn by --seed")
    if name not in ("finetune", "segmentation", "attentive"):
        model.add_argument("--pool", choices=("auto", "avg", "cls", "cls_avg"), default="auto",
            help="pooling of patches and class token (default: auto, the class token if the model "
            "uses it, else the mean over patches)")  # fmt: skip
    data = parser.add_argument_group("data options")
    data.add_argument("--data", required=True, metavar="DATA",
        help="required: folder, hfds/NAME, ..., for scenes also scenes:TRAIN,TEST")  # fmt: skip
    if name != "segmentation":
        data.add_argument("--test", metavar="DATA", help="test images, if they are not in --data")
    options.add_pixel_options(data)
    data.add_argument("--skip-broken", action="store_true",
        help="leave out and count images that cannot be decoded (default: stop)")  # fmt: skip
    trained = name not in ("knn", "logreg")
    batch = "that of the paper's protocol; learning rates grow with it" if trained else None
    run = options.add_run_options(parser, batch)
    run.add_argument("--seed", type=count, default=0, metavar="N", help="default: 0")
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_evaluate, probe=name, interrupted=options.RESUME)
    return parser


def _add_task(own: argparse._ArgumentGroup, probe: str) -> None:
    if probe == "count":
        return
    if probe == "depth":
        own.add_argument("--task", choices=("clevr", "dense"), default="clevr",
            help="clevr (default): class of distance; dense: a depth for every pixel",
        )  # fmt: skip
        own.add_argument("--max-depth", type=float, metavar="M",
            help="dense: largest depth that counts")  # fmt: skip
        own.add_argument("--depth-scale", type=float, metavar="N",
            help="dense: units of the files per meter")  # fmt: skip
    elif probe == "segmentation":
        own.add_argument("--reduce-zero-label", action=argparse.BooleanOptionalAction,
            help="ignore class 0 and count classes from 1 (default: for ADE20K only)")  # fmt: skip
    else:
        scenes = "" if probe == "finetune" else "; count, depth: scenes"
        own.add_argument("--task", default="classes", metavar="NAME",
            help="imagenet1k, cifar100, cifar10, places205, inat18, or classes (default): any "
            f"labels{scenes}")  # fmt: skip


def _evaluate(args: argparse.Namespace) -> int:
    given = {key: value for key, value in vars(args).items() if key not in _OWN}
    result = _run(args.probe, {**given, "progress": not args.quiet})
    if options.is_main_process():
        print(result.table())
        print(f"all results: {os.path.join(args.out, 'results.csv')} and the files that it names")
    return 0


def _run(probe: str, given: dict[str, Any]) -> Result:
    head = given.pop("head", None)
    if head is not None:
        _leave_out(given, _OF_TRAINING, "are not for --head, which tests a trained head on --data")
        names = ("data", "out", "device", "workers", "precision", "value_range", "bands",
                 "skip_broken", "progress")  # fmt: skip
        return evaluate_head(head, **{name: given[name] for name in names})
    if given["model"] is None:
        raise SettingsError("give --model, or --head for a head that is trained already")
    if probe == "segmentation":
        return evaluate_segmentation(**given)
    if probe == "depth" and given.pop("task") == "dense":
        return evaluate_dense_depth(**given)
    if probe in ("count", "depth"):
        _leave_out(given, ("max_depth", "depth_scale"), "are for --task dense")
        return evaluate_linear(**{**given, "task": probe})
    functions: dict[str, Callable[..., Result]] = {
        "linear": evaluate_linear,
        "attentive": evaluate_attentive,
        "knn": evaluate_knn,
        "finetune": evaluate_finetune,
        "logreg": evaluate_logreg,
    }
    return functions[probe](**given)


def _leave_out(given: dict[str, Any], names: Sequence[str], why: str) -> None:
    """Remove options that do not apply here; refuse them if they are set."""
    found = [name for name in names if given.pop(name, None) not in (None, "auto", False)]
    if found:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in found)
        raise SettingsError(f"{shown} {why}")


def _report(args: argparse.Namespace) -> int:
    print(write_report(args.results, args.out))
    return 0
