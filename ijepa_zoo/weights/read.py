"""Open a checkpoint of any known kind and hand out its networks, read lazily, in our names."""

import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, SettingsError
from . import catalog, fetch, layouts, safetensors_file
from .config import encoder_args, native_section, preprocessing, read_config, transformers_args
from .layouts import State
from .networks import LABEL_KEY, UNLABELLED, Networks, Training, label_of

HUB_PREFIX, FOLDER_PREFIX = "hf-hub:", "local-dir:"
PICKLES = (".pth.tar", ".pth", ".pt", ".tar", ".bin")
# what torch.load raises on a damaged pickle depends on the byte that is wrong
_DAMAGE = (
    *(pickle.UnpicklingError, struct.error, EOFError, OSError, RuntimeError, ValueError),
    *(LookupError, TypeError, AttributeError, AssertionError, zipfile.BadZipFile),
)


def read_safetensors(path: Path) -> State:
    """Map a safetensors file into memory: pages are read when touched, writes stay private."""
    try:
        with safe_open(path, framework="pt") as file:  # checks header and sizes
            mapped = safetensors_file.map_tensors(path)
            rare = [name for name in file.keys() if name not in mapped]  # noqa: SIM118
            return mapped | {name: file.get_tensor(name) for name in rare}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({error}); fetch or write it again"
        ) from error


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The strings in a safetensors file's header."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error})") from error


def read_pickle(path: Path) -> dict[str, Any]:
    """Load a ``torch.save`` file: tensors and plain values only, mapped where the format allows.

    Raises:
        CheckpointError: If the file is damaged, holds code, or no dictionary.
    """
    with path.open("rb") as file:  # a file that may not be read is not a damaged one
        mapped = zipfile.is_zipfile(file)
    try:
        if mapped:
            _refuse_compressed(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of tensors: it is damaged, cut short, or "
            f"holds objects that could run code, which are never loaded ({reason})"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not named tensors")
    return content


def _refuse_compressed(path: Path) -> None:
    """torch.save stores its records as they are; a compressed one may be a zip bomb."""
    with zipfile.ZipFile(path) as archive:
        packed = [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise SettingsError(f"compressed records, which torch.save does not write: {packed[0]}")


def open_checkpoint(location: str | Path, cache_dir: str | Path | None = None) -> Networks:
    """Open a user's checkpoint.

    Args:
        location: A file (.pth.tar, .pth, .pt, .bin, .safetensors), a folder with config.json
            (transformers, timm or exported by this package), the folder of a pretraining run,
            'local-dir:FOLDER' or 'hf-hub:REPO[@REVISION]'.
        cache_dir: Cache of the Hub's files.

    Raises:
        CheckpointError: If there is no such checkpoint or its layout is unknown.
        ijepa_zoo.weights.fetch.FetchError: If the Hub cannot be read.
    """
    text = str(location)
    if text.startswith(HUB_PREFIX):
        repo, _, revision = text.removeprefix(HUB_PREFIX).partition("@")
        return open_folder(
            partial(fetch.fetch_hub, repo, revision=revision or None, cache_dir=cache_dir), text
        )
    place = text.removeprefix(FOLDER_PREFIX)
    if not place:
        raise CheckpointError("the checkpoint's path is empty: name a file or folder")
    path = Path(place).expanduser()
    if path.is_dir():
        path = _export_of_run(path)
        return open_folder(partial(_within, path), str(path))
    if path.is_file():
        return open_file(path)
    if path.exists():
        raise CheckpointError(f"{path} is neither a file nor a folder")
    hint = f"; for a Hub repository write {HUB_PREFIX}{text}" if _like_a_repository(text) else ""
    raise CheckpointError(f"no checkpoint at {path}: no such file or folder{hint}")


def _like_a_repository(text: str) -> bool:
    return text.count("/") == 1 and ":" not in text and text[0] not in "./~"


def _export_of_run(folder: Path) -> Path:
    """The export inside the folder of a pretraining run; any other folder as it is."""
    if (folder / "config.json").exists() or not (folder / "config.yaml").exists():
        return folder
    if not (folder / "export" / "config.json").exists():
        raise CheckpointError(
            f"{folder} is a pretraining run without an export: write it by `ijepa-zoo export "
            f"{folder}`"
        )
    return folder / "export"


def _within(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        found = layouts.some(item.name for item in folder.iterdir())
        raise CheckpointError(f"{folder} has no {name}; it holds {found or 'nothing'}")
    return folder / name


def open_file(path: Path) -> Networks:
    """Open a single checkpoint file, see :func:`open_checkpoint`."""
    origin = str(path)
    if path.suffix == ".safetensors":
        label = label_of(safetensors_metadata(path).get("network"))
        layout = layouts.recognise(read_safetensors(path), origin)

        def read() -> State:  # again: tensors in nobody's hands give their memory back
            return layouts.to_timm(read_safetensors(path), layout, origin)

        return Networks(origin, {label: read}, layout)
    if not path.name.endswith(PICKLES):
        raise CheckpointError(
            f"{path}: a checkpoint file ends in .safetensors or one of {', '.join(PICKLES)}"
        )
    content = read_pickle(path)
    layout = layouts.recognise(content, origin)
    if layout == "official":
        return Networks(
            origin,
            {
                network: partial(layouts.to_timm, content[network], layout, origin)
                for network in catalog.NETWORKS
            },
            layout,
            training=partial(_official_training, content, origin),
        )
    renamed = partial(layouts.to_timm, content, layout, origin)
    return Networks(origin, {UNLABELLED: renamed}, layout)


def _official_training(content: Mapping[str, Any], origin: str) -> Training:
    encoder, predictor = (layouts.from_official(content[k]) for k in ("encoder", "predictor"))
    groups = layouts.official_parameter_groups(encoder, predictor)
    tensors, plain = layouts.optimizer_from_official(content["opt"], groups, origin)
    rest = {key: content[key] for key in content if key not in (*catalog.NETWORKS, "opt")}
    return Training(tensors, {**plain, "rest": rest})


def open_folder(locate: Callable[[str], Path], origin: str) -> Networks:
    """Open a folder or Hub repository by its config.json.

    Args:
        locate: Gives the local path of a file of the folder, fetching it if need be.
        origin: The folder, for messages.
    """
    config = read_config(locate("config.json"), origin)
    if "ijepa_zoo" in config:
        return _open_native(config, locate, origin)
    label = label_of(config.get(LABEL_KEY))
    if config.get("model_type") == "ijepa":
        read = partial(_read_single, locate, origin, "transformers")
        args = encoder_args(transformers_args(config), origin)
        return Networks(origin, {label: read}, "transformers", args=args)
    if isinstance(config.get("architecture"), str):
        cfg = preprocessing(config.get("pretrained_cfg", {}), origin)
        args = encoder_args(config.get("model_args", {}), origin)
        read = partial(_read_single, locate, origin, "timm")
        model = layouts.STOCK_TIMM.get(config["architecture"])
        return Networks(origin, {label: read}, "timm", model, args, pretrained_cfg=cfg)
    raise CheckpointError(
        f"{origin}/config.json describes no I-JEPA model: it has neither model_type 'ijepa' "
        f"(transformers) nor a timm architecture, but {layouts.some(config)}"
    )


def _open_native(config: dict[str, Any], locate: Callable[[str], Path], origin: str) -> Networks:
    ours = native_section(config, origin)
    args = config.get("model_args")
    if isinstance(args, dict):
        args = {**args, "norm_eps": ours.get("norm_eps")}

    def read(filename: str) -> State:
        return read_safetensors(locate(filename))

    def training() -> Training:
        return Training(read(ours["optimizer"]), ours["training"])

    return Networks(
        origin,
        {network: partial(read, filename) for network, filename in ours["networks"].items()},
        "native",
        model=ours["model"],
        args=encoder_args(args, origin),
        predictor=ours["predictor"],
        pretrained_cfg=preprocessing(config.get("pretrained_cfg"), origin),
        license=ours.get("license"),
        training=training if "optimizer" in ours else None,
    )


def _read_single(locate: Callable[[str], Path], origin: str, layout: str) -> State:
    state = read_safetensors(locate("model.safetensors"))
    found = layouts.recognise(state, origin)
    if found != layout:
        raise CheckpointError(
            f"{origin}: config.json says {layout}, but model.safetensors has {found} names"
        )
    return layouts.to_timm(state, layout, origin)


def packaged_folder(name: str) -> Path:
    """Path of a folder of weights inside this package."""
    return Path(__file__).resolve().parent / name


def open_record(record: catalog.Checkpoint, cache_dir: str | Path | None = None) -> Networks:
    """Open an entry of the catalogue; files travel when a network is read."""
    source = record.source
    if source.folder:
        networks = open_folder(partial(_within, packaged_folder(source.folder)), record.name)
        return replace(networks, license=record.license)
    folder = Path(cache_dir) if cache_dir is not None else None

    def read(network: str) -> State:
        if source.url:
            path = fetch.fetch_official(
                source.url,
                network,
                cache_dir=folder,
                size=source.size,
                sha256=source.sha256.get(network),
            )
            return layouts.from_official(read_safetensors(path))
        path = fetch.fetch_hub(
            str(source.hf_hub_id),
            str(source.filename),
            revision=source.revision,
            cache_dir=cache_dir,
        )
        return layouts.to_timm(read_safetensors(path), record.layout, record.name)

    return Networks(
        record.name,
        {network: partial(read, network) for network in record.networks},
        record.layout,
        model=record.model,
        predictor=record.predictor,
        license=record.license,
    )
