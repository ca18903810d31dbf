"""Open a checkpoint of any known format; its networks are read on demand."""

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import to_2tuple

from ..errors import CheckpointError, FetchError, some
from . import configs, download, registry
from .formats import UNLABELED, State, find_networks

HUB_PREFIX, FOLDER_PREFIX = "hf-hub:", "local-dir:"
OFFICIAL_FILE = "ijepa-latest.pth.tar"  # name of the file in an official export
LABEL_KEY = "ijepa_zoo_network"  # in config.json of exported timm and transformers folders
PREPROCESSING = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
Locate = Callable[[str], Path | None]  # name of a file in a folder -> its local path, if any


@dataclass(frozen=True)
class Networks:
    """The networks of a checkpoint, or of modules to export."""

    origin: str  # their source, for messages and model cards
    # A reader of each network, which opens or fetches files. The key is 'unlabeled' if the
    # checkpoint has one network and does not name it.
    states: Mapping[str, Callable[[], State]]
    model: str | None = None  # registered name, if known; timm's name of another ViT
    args: Mapping[str, Any] = field(default_factory=dict)  # timm's, of the encoder, if known
    norm_eps: float = 1e-6
    predictor: Mapping[str, int] = field(default_factory=dict)  # embed_dim and depth
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)  # timm's, if known
    license: str | None = None

    @property
    def grid_size(self) -> tuple[int, int] | None:
        """Rows and columns of the patch grid, if known."""
        if "img_size" not in self.args or "patch_size" not in self.args:
            return None
        rows, columns = to_2tuple(self.args["img_size"])
        height, width = to_2tuple(self.args["patch_size"])
        return rows // height, columns // width

    @property
    def is_other_vit(self) -> bool:
        """Whether the encoders are a ViT of timm, not I-JEPA's."""
        return self.model is not None and not registry.is_ijepa(self.model)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The part of ``pretrained_cfg`` that decides the evaluation transform."""
        cfg = self.pretrained_cfg
        return {key: cfg[key] for key in PREPROCESSING if key in cfg}

    def choose(self, network: str | None) -> str:
        """The key of ``states`` to load: ``network``, or the target encoder if there is one."""
        if network is None:
            held = ("target_encoder", "encoder", *self.states)
            return next(name for name in held if name in self.states)
        if network in self.states:
            return network
        if UNLABELED in self.states and network in registry.NETWORKS:
            raise CheckpointError(
                f"{self.origin} does not say which network it is: load it without network= "
                "(released transformers files are the context encoder)"
            )
        raise CheckpointError(f"{self.origin} has {', '.join(self.states)}, not {network!r}")


def open_checkpoint(location: str | Path, cache_dir: str | Path | None = None) -> Networks:
    """Open a user's checkpoint.

    ``location`` is a file (.pth.tar, .pth, .pt, .ckpt, .bin, .safetensors), a folder with
    config.json (transformers, timm or exported by this package), a pretraining run,
    'local-dir:FOLDER' or 'hf-hub:REPO[@REVISION]'.
    """
    text = str(location)
    if text.startswith(HUB_PREFIX):
        repository = text.removeprefix(HUB_PREFIX).partition("@")[0]
        entries = (c for c in registry.checkpoints() if c.source.hf_hub_id == repository)
        return _open_folder(_files(text, cache_dir), text, next(entries, None))
    path = Path(text.removeprefix(FOLDER_PREFIX)).expanduser()
    if not text.removeprefix(FOLDER_PREFIX) or not path.exists():
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
            hint = f"; for a repository of the Hub write {HUB_PREFIX}{text}"
        raise CheckpointError(f"no checkpoint at {str(text)!r}: no such file or folder{hint}")
    if (path / OFFICIAL_FILE).is_file() and not (path / "config.json").exists():
        path = path / OFFICIAL_FILE
    if path.is_dir():
        path = _find_export(path)
        return _open_folder(_files(str(path)), str(path))
    read = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
    found = find_networks(read(path), str(path))
    return Networks(str(path), {key: partial(dict, state) for key, state in found.items()})


def open_entry(entry: registry.Checkpoint, cache_dir: str | Path | None = None) -> Networks:
    """Open released weights; a network is fetched when its state is read."""
    source = entry.source
    if source.folder:
        networks = _open_folder(_files(str(packaged_folder(source.folder))), entry.name)
        return replace(networks, license=entry.license)

    def read(network: str) -> State:
        if source.url:
            sha256 = source.sha256.get(network)
            path = download.fetch_official(source.url, network, cache_dir=cache_dir, sha256=sha256)
        else:
            repository, file = str(source.hf_hub_id), str(source.filename)
            path = download.fetch_hub(repository, file, source.revision, cache_dir)
        (state,) = find_networks(_read_safetensors(path), entry.name).values()
        return state

    return Networks(
        entry.name,
        {network: partial(read, network) for network in entry.networks},
        model=entry.model,
        predictor=entry.predictor,
        pretrained_cfg=entry.preprocessing,
        license=entry.license,
    )


def packaged_folder(name: str) -> Path:
    """Path of a folder of weights inside this package."""
    return Path(__file__).resolve().parent / name


def find_timm_config(
    location: str | Path, cache_dir: str | Path | None = None
) -> dict[str, Any] | None:
    """config.json of a timm network that is not an I-JEPA encoder; None for other locations."""
    text = str(location)
    if not text.startswith(HUB_PREFIX):
        folder = Path(text.removeprefix(FOLDER_PREFIX)).expanduser()
        if not (folder / "config.json").is_file():
            folder /= "export"  # of a pretraining run
        if not (folder / "config.json").is_file():
            return None
        text = str(folder)
    config = _read_json(_files(text, cache_dir), "config.json", text)
    name = config.get("architecture")
    is_other = isinstance(name, str) and registry.registered_name(name) is None
    return config if is_other else None


def _find_export(folder: Path) -> Path:
    """The export inside a pretraining run; any other folder unchanged."""
    if folder.parent.name == "checkpoints" and re.fullmatch(r"step-\d+", folder.name):
        raise CheckpointError(
            f"{folder} is a training checkpoint: write its weights with `ijepa-zoo export "
            f"{folder.parent.parent} FOLDER --step {int(folder.name[5:])}` and load FOLDER"
        )
    if (folder / "config.json").exists() or not (folder / "config.yaml").exists():
        return folder
    if (folder / "export" / "config.json").exists():
        return folder / "export"
    raise CheckpointError(
        f"{folder} is a pretraining run without an export: write it, `ijepa-zoo export {folder}`"
    )


def _read_safetensors(path: Path) -> State:
    """Map a file into memory: pages are read when touched, writes stay private."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file ({error})") from error


def _read_pickle(path: Path) -> Mapping[str, Any]:
    """Load a ``torch.save`` file, tensors and plain values only; mapped if the format allows."""
    with path.open("rb") as file:  # a missing read permission must not be reported as damage
        is_zip = zipfile.is_zipfile(file)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # of any kind: it depends on the byte that is wrong
        raise CheckpointError(
            f"{path} is damaged, not of torch.save, or has objects besides tensors, which could "
            f"run code ({type(error).__name__}): save the weights alone, "
            "torch.save(model.state_dict(), FILE)"
        ) from None  # torch's message says to load it unsafely
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} has a {type(content).__name__}, not named tensors")
    return content


def _open_folder(
    locate: Locate, origin: str, released: registry.Checkpoint | None = None
) -> Networks:
    """Open a folder or repository by its config.json; ``locate`` fetches its files."""
    config = _read_json(locate, "config.json", origin)
    if "ijepa_zoo" in config:
        return _open_native(config, locate, origin)
    label = config.get(LABEL_KEY)
    states = {
        label if label in registry.NETWORKS else UNLABELED: partial(_read_folder, locate, origin)
    }
    if isinstance(config.get("architecture"), str):
        args, cfg = configs.timm_args(config, origin)
        model = registry.model_name(args, config["architecture"])
        license = cfg.get("license")
        return Networks(origin, states, model, args, pretrained_cfg=cfg, license=license)
    if config.get("model_type") == "ijepa":
        args = configs.transformers_args(config, origin)
        norm_eps = args.pop("norm_eps")
        if released is not None:  # its preprocessor_config.json is not that of pretraining
            states = {released.network: partial(_read_folder, locate, origin)}
            model, license, cfg = released.model, released.license, released.preprocessing
        else:
            model, license, cfg = registry.model_name(args), config.get("license"), {}
            if locate("preprocessor_config.json") is not None:
                processor = _read_json(locate, "preprocessor_config.json", origin)
                cfg = configs.processor_cfg(processor, args, origin, is_ours=LABEL_KEY in config)
        return Networks(origin, states, model, args, norm_eps, {}, cfg, license)
    raise CheckpointError(
        f"{origin}/config.json does not describe an I-JEPA model: it has neither model_type "
        f"'ijepa' (transformers) nor a timm architecture, but {some(config)}"
    )


def _open_native(config: Mapping[str, Any], locate: Locate, origin: str) -> Networks:
    """An export of this package; one of version 0.1 may have an optimizer, which is ignored."""
    ours = config["ijepa_zoo"]
    if ours == "classifier":
        raise CheckpointError(
            f"{origin} is an encoder with a head: open it with ijepa_zoo.create_model"
            f"('local-dir:{origin}') or use its encoder, {config.get('encoder')}"
        )
    if "context" in ours["predictor"]:
        raise CheckpointError(
            f"{origin} has a predictor with predictor_context=shared, which is gone: load the "
            f"encoder alone, checkpoint='{origin}/model.safetensors'"
        )

    def read(file: str) -> State:
        return _read_safetensors(_require(locate, file, origin))

    args, model = configs.check_args(config["model_args"], origin), ours["model"]
    is_other = config.get("architecture") == model and registry.registered_name(model) is None
    return Networks(
        origin,
        {network: partial(read, file) for network, file in ours["networks"].items()},
        model if is_other else registry.model_name(args, model),
        args,
        ours.get("norm_eps", 1e-6),
        ours["predictor"],
        configs.pretrained_cfg(config),
        ours.get("license"),
    )


def _read_folder(locate: Locate, origin: str) -> State:
    """The one network of a timm or transformers folder, from one file or shards."""
    content: dict[str, Any] = {}
    readers = {"model.safetensors": _read_safetensors, "pytorch_model.bin": _read_pickle}
    for name, read in readers.items():  # timm's save_for_hf writes the second by default
        shards = {name}
        if locate(name) is None:
            if locate(f"{name}.index.json") is None:
                continue
            shards = {*_read_json(locate, f"{name}.index.json", origin)["weight_map"].values()}
        for shard in shards:
            content |= read(_require(locate, shard, origin))
        found = find_networks(content, origin)
        if len(found) > 1:
            raise CheckpointError(f"{origin} has {', '.join(found)} in one file: load that file")
        return next(iter(found.values()))
    raise CheckpointError(f"{origin} has neither model.safetensors nor pytorch_model.bin")


def _files(location: str, cache_dir: str | Path | None = None) -> Locate:
    """Finds files of a local folder or of 'hf-hub:REPO[@REVISION]'."""
    if not location.startswith(HUB_PREFIX):
        folder = Path(location)
        return lambda name: folder / name if (folder / name).is_file() else None
    repository, _, revision = location.removeprefix(HUB_PREFIX).partition("@")

    def locate(name: str) -> Path | None:
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return download.fetch_hub(repository, name, revision or None, cache_dir)
        except FetchError as error:
            is_offline = isinstance(error.__cause__, LocalEntryNotFoundError)
            if isinstance(error.__cause__, EntryNotFoundError) and not is_offline:
                return None
            raise

    return locate


def _require(locate: Locate, name: str, origin: str) -> Path:
    if (path := locate(name)) is None:
        raise CheckpointError(f"{origin} has no {name}")
    return path


def _read_json(locate: Locate, name: str, origin: str) -> dict[str, Any]:
    try:
        content = json.loads(_require(locate, name, origin).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{origin}/{name} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{origin}/{name} is damaged: it is not a JSON object")
    return content
