"""checkpoints.json as typed records: which weights exist, where, and what they are."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import SettingsError

NETWORKS = ("target_encoder", "encoder", "predictor")
LAYOUTS = ("official", "transformers", "native")


@dataclass(frozen=True)
class Source:
    """Where a set of weights lies: exactly one of a URL, a Hub repository or a packaged folder.

    Attributes:
        url: Address of a file on a plain web server.
        hf_hub_id: Repository on the Hugging Face Hub, with ``revision`` and ``filename``.
        folder: Folder inside this package.
        size: Bytes of the source file, where known exactly: another size is refused.
        gigabytes: Its size, rounded.
        sha256: Hash per network (official files: of the fetched tensor bytes), where known.
    """

    url: str | None = None
    hf_hub_id: str | None = None
    revision: str | None = None
    filename: str | None = None
    folder: str | None = None
    size: int | None = None
    gigabytes: float | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """The place in words, for messages and tables."""
        if self.hf_hub_id:
            return f"hf-hub:{self.hf_hub_id}" + (f"@{self.revision}" if self.revision else "")
        return self.url or "packaged with ijepa_zoo"


@dataclass(frozen=True)
class Checkpoint:
    """One entry of the catalogue.

    Attributes:
        model: Registered model name.
        tag: timm tag; ``name`` is ``model.tag``.
        network: The network that ``create_model`` loads.
        networks: All networks that the source holds.
        source: Where it lies.
        layout: File layout, one of :data:`LAYOUTS`.
        license: Licence of the weights (SPDX).
        input_size: ``(channels, height, width)`` of pretraining.
        mean: Channel means of the preprocessing.
        std: Channel standard deviations of the preprocessing.
        crop_pct: Share of the resized image that the centre crop keeps.
        interpolation: Resize filter of the preprocessing.
        data: Pretraining data set.
        epochs: Epochs of pretraining on it.
        predictor: ``embed_dim`` and ``depth`` of the predictor, where the source holds one.
        check: Numbers that must come out of these weights, for tests.
        figures: Measured quality of these weights, where measured.
    """

    model: str
    tag: str
    network: str
    networks: tuple[str, ...]
    source: Source
    layout: str
    license: str
    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float
    interpolation: str
    data: str
    epochs: float
    predictor: Mapping[str, int]
    check: Mapping[str, Any]
    figures: Mapping[str, Any]

    @property
    def name(self) -> str:
        """``model.tag``, as ``create_model`` takes it."""
        return f"{self.model}.{self.tag}"


def catalogue_file() -> Path:
    """The catalogue: beside the package's modules in a wheel, one folder up in a checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged = package / "checkpoints.json"
    return packaged if packaged.is_file() else package.parent / "checkpoints.json"


def parse(entry: Mapping[str, Any]) -> Checkpoint:
    """Turn one JSON entry into a record.

    Raises:
        ValueError: If a field is missing, unknown or holds a value outside its range.
    """
    fields = dict(entry)
    label = f"{fields.get('model')}.{fields.get('tag')}"
    try:
        source = Source(**fields.pop("source"))
        for key in ("networks", "input_size", "mean", "std"):
            fields[key] = tuple(fields[key])
        record = Checkpoint(
            source=source,
            predictor=fields.pop("predictor", {}),
            check=fields.pop("check", {}),
            figures=fields.pop("figures", {}),
            **fields,
        )
    except (KeyError, TypeError) as error:
        raise SettingsError(f"checkpoints.json, entry {label}: {error}") from error
    if record.layout not in LAYOUTS:
        raise SettingsError(f"checkpoints.json, entry {label}: layout is none of {LAYOUTS}")
    if record.network not in record.networks or not set(record.networks) <= set(NETWORKS):
        raise SettingsError(f"checkpoints.json, entry {label}: networks must be of {NETWORKS}")
    if sum(map(bool, (source.url, source.hf_hub_id, source.folder))) != 1:
        raise SettingsError(f"checkpoints.json, entry {label}: give one of url, hf_hub_id, folder")
    return record


@cache
def checkpoints() -> tuple[Checkpoint, ...]:
    """All entries, in the file's order: a model's first entry is its default."""
    with catalogue_file().open(encoding="utf-8") as file:
        return tuple(parse(entry) for entry in json.load(file)["checkpoints"])


def find(model: str, tag: str | None = None) -> Checkpoint | None:
    """The entry of a model and tag, or the model's default entry without a tag."""
    for record in checkpoints():
        if record.model == model and tag in (None, "", record.tag):
            return record
    return None
