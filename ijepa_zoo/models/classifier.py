"""An encoder with a trained head: logits of images or maps, saved as a folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.transforms import transform_config
from ..encode import weights_fingerprint
from ..errors import CheckpointError, SettingsError, UserError
from ..features import FeatureExtractor, Layers
from ..weights.export import export, write_folder
from ..weights.read import FOLDER_PREFIX
from ..weights.writers import save_tensors, write_json
from .factory import create_named_model, is_own_model

KIND = "classifier"  # the value of "ijepa_zoo" in config.json of these folders
_TRANSFORM = ("crop_pct", "crop_mode", "interpolation")
CONFIG, HEAD, ENCODER = "config.json", "head.safetensors", "encoder"
_FLOOR = 0.1  # added to every depth bin


class LinearHead(nn.Module):
    """Linear classifier of pooled features, optionally after a BatchNorm."""

    def __init__(self, in_features: int, num_classes: int, batch_norm: bool = False) -> None:
        super().__init__()
        self.args = dict(in_features=in_features, num_classes=num_classes, batch_norm=batch_norm)
        self.norm = nn.BatchNorm1d(in_features) if batch_norm else nn.Identity()
        self.linear = nn.Linear(in_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[B, num_classes]` of features `[B, in_features]`."""
        return self.linear(self.norm(features))


class AttentiveHead(nn.Module):
    """Attentive pooler and linear classifier, as V-JEPA (arXiv 2404.08471) evaluates encoders.

    A learned query attends to the patch tokens (cross-attention with one LayerNorm before its keys
    and values), followed by a residual MLP and a linear layer. The initialization is V-JEPA's too:
    std 0.02, the two residual projections divided by sqrt(2).
    """

    def __init__(
        self, embed_dim: int, num_classes: int, num_heads: int, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__()
        self.args: dict[str, Any] = dict(embed_dim=embed_dim, num_classes=num_classes)
        self.args |= {"num_heads": num_heads, "mlp_ratio": mlp_ratio}
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.norm1 = nn.LayerNorm(embed_dim)
        self.q = nn.Linear(embed_dim, embed_dim)
        self.kv = nn.Linear(embed_dim, 2 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio))
        self.linear = nn.Linear(embed_dim, num_classes)
        for layer in (self.q, self.kv, self.proj, self.mlp.fc1, self.mlp.fc2, self.linear):
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        trunc_normal_(self.query, std=0.02)
        with torch.no_grad():
            for layer in (self.proj, self.mlp.fc2):
                layer.weight.div_(2**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[B, num_classes]` of patch tokens `[B, N, embed_dim]`."""
        batch, _, width = tokens.shape
        split = (batch, -1, self.num_heads, width // self.num_heads)
        query = self.query.expand(batch, -1, -1)
        keys, values = self.kv(self.norm1(tokens)).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(
            *(part.reshape(split).transpose(1, 2) for part in (self.q(query), keys, values))
        )
        pooled = query + self.proj(attended.transpose(1, 2).reshape(batch, 1, width))
        pooled = pooled + self.mlp(self.norm2(pooled))
        return self.linear(pooled.squeeze(1))


class DenseHead(nn.Module):
    """Linear head on every patch, a 1x1 convolution, optionally after a BatchNorm2d.

    With a `depth_range` the channels score bins of uniform depth between the two numbers, and the
    output is depth: the mean of the bins weighted by `relu(score) + 0.1`, as in DINOv2
    (facebookresearch/dinov2 `BNHead`) and AdaBins (arXiv 2011.14141). The scores are upsampled
    first; DINOv2 upsamples the features, which is equivalent for a linear layer.
    """

    def __init__(
        self,
        in_features: int,
        num_outputs: int,
        batch_norm: bool = False,
        depth_range: Sequence[float] | None = None,
        upsample: int = 1,
    ) -> None:
        super().__init__()
        self.args: dict[str, Any] = dict(in_features=in_features, num_outputs=num_outputs)
        self.args["batch_norm"] = batch_norm
        self.depth_range, self.upsample = depth_range, upsample
        if depth_range is not None:
            self.args |= {"depth_range": list(depth_range), "upsample": upsample}
        self.norm = nn.BatchNorm2d(in_features) if batch_norm else nn.Identity()
        self.conv = nn.Conv2d(in_features, num_outputs, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Maps `[B, num_outputs, h, w]` of patch features `[B, in_features, h, w]`.

        Depth is `[B, 1, upsample * h, upsample * w]`.
        """
        maps: Tensor = self.conv(self.norm(features))
        if self.depth_range is None:
            return maps
        maps = F.interpolate(maps, scale_factor=self.upsample, mode="bilinear")
        weights = maps.relu() + _FLOOR
        near, far = self.depth_range
        bins = torch.linspace(near, far, maps.shape[1], device=maps.device, dtype=maps.dtype)
        return torch.einsum("bkhw,k->bhw", weights, bins)[:, None] / weights.sum(1, keepdim=True)


HEADS: dict[str, type[nn.Module]] = {
    "linear": LinearHead,
    "attentive": AttentiveHead,
    "dense": DenseHead,
}


class Classifier(nn.Module):
    """A frozen or fine-tuned encoder with a head on its features.

    ``layers`` and ``pool`` are those of :class:`ijepa_zoo.FeatureExtractor`; attentive and dense
    heads take patch tokens, so no pooling. With ``multi_label`` the logits are of independent
    classes (sigmoid instead of softmax). ``transform`` has the entries of timm's data config that
    differ from the encoder's: crop_pct, crop_mode, interpolation.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: Any,
        layers: Layers = "last",
        pool: str | None = "auto",
        class_names: Sequence[str] | None = None,
        multi_label: bool = False,
        transform: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        pool = pool if isinstance(head, LinearHead) else None
        self.extractor = FeatureExtractor(encoder, layers, pool)
        self.head = head
        width, taken = self.extractor.num_features, next(iter(self.head.args.values()))
        if width != taken:
            raise SettingsError(f"the head takes {taken} features, the encoder has {width}")
        if class_names is not None and len(class_names) != self.num_classes:
            raise SettingsError(
                f"{len(class_names)} class_names for {self.num_classes} classes: give one for each"
            )
        self.weights_origin = "a classifier in memory"
        self.class_names = None if class_names is None else list(class_names)
        self.multi_label = multi_label
        self.transform = dict(transform or {})

    @property
    def encoder(self) -> Any:
        """The timm model."""
        return self.extractor.model

    @property
    def num_classes(self) -> int:
        """Number of logits, or channels of the maps."""
        if not self.is_dense:
            return int(self.head.args["num_classes"])
        return 1 if self.head.depth_range else int(self.head.args["num_outputs"])

    @property
    def is_dense(self) -> bool:
        """Whether the output is maps."""
        return isinstance(self.head, DenseHead)

    @property
    def pretrained_cfg(self) -> Any:
        """timm's description of the input, for :func:`ijepa_zoo.create_transform`."""
        return {**self.encoder.pretrained_cfg, **self.transform}

    @property
    def patch_embed(self) -> Any:
        """The encoder's, which has the image size and channels."""
        return getattr(self.encoder, "patch_embed", None)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, num_classes]` of images; maps `[B, num_outputs, H, W]` of a dense head."""
        features = self.extractor(images)
        if isinstance(self.head, AttentiveHead):
            features = features.flatten(2).transpose(1, 2)
        outputs: Tensor = self.head(features)
        if self.is_dense:
            size = images.shape[-2:]
            outputs = F.interpolate(outputs, size, mode="bilinear", align_corners=False)
        return outputs


def save_classifier(
    folder: str | Path,
    classifier: Classifier,
    *,
    encoder: str | None = None,
    encoder_args: Mapping[str, Any] | None = None,
    with_encoder: bool = False,
    overwrite: bool = False,
    **record: Any,
) -> Path:
    """Write a classifier as a folder that ``create_model("local-dir:FOLDER")`` opens.

    ``config.json`` has the head, its features, class names, the encoder's source, hash and
    preprocessing, and ``record``; ``head.safetensors`` has the head's weights. ``encoder`` is the
    name to open the encoder by, with the arguments ``encoder_args`` of `create_model`;
    ``with_encoder`` writes it into ``folder/encoder`` instead.
    """
    if encoder is None and not with_encoder:
        raise SettingsError("an encoder in memory has no source: save it too, with_encoder=True")
    args = {key: value for key, value in (encoder_args or {}).items() if value is not None}
    if "checkpoint" in args:
        args["checkpoint"] = _absolute(args["checkpoint"])
    folder, head, network = Path(folder), classifier.head, classifier.encoder
    config = transform_config(classifier)
    content = {
        "ijepa_zoo": KIND,
        "head": next(kind for kind, cls in HEADS.items() if type(head) is cls),
        "head_args": head.args,
        "layers": classifier.extractor.layers,
        "pool": classifier.extractor.pool,
        "class_names": classifier.class_names,
        "multi_label": classifier.multi_label,
        "encoder": ENCODER if with_encoder or encoder is None else _absolute(encoder),
        "encoder_args": {} if with_encoder else args,
        "encoder_hash": weights_fingerprint(network),
        "preprocessing": {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()},
        **record,
    }
    with write_folder(folder, (CONFIG, HEAD, ENCODER), overwrite) as part:
        if with_encoder:
            export(network, part / ENCODER)
        save_tensors(head.state_dict(), part / HEAD, None)
        write_json(part / CONFIG, content)
    return folder


def load_classifier(folder: str | Path) -> Classifier:
    """Open a folder that :func:`save_classifier` has written."""
    folder = Path(folder).expanduser()
    if (config := read_classifier_config(folder)) is None:
        raise CheckpointError(f"{folder} is not a classifier folder: it has no such {CONFIG}")
    try:
        source, args = config["encoder"], dict(config["encoder_args"])
        size = tuple(config["preprocessing"]["input_size"][1:])
        if source == ENCODER:
            source = f"{FOLDER_PREFIX}{folder / ENCODER}"
        encoder = _open_encoder(source, size, args)
        head = HEADS[config["head"]](**config["head_args"])
        head.load_state_dict(load_file(folder / HEAD))
        classifier = Classifier(
            encoder,
            head,
            config["layers"],
            config["pool"],
            config["class_names"],
            config.get("multi_label", False),
            {key: config["preprocessing"][key] for key in _TRANSFORM},
        )
        is_same = weights_fingerprint(encoder) == config["encoder_hash"]
    except UserError:
        raise
    except Exception as error:  # damaged files raise almost anything
        raise CheckpointError(
            f"{folder / CONFIG} or {HEAD} beside it is damaged or missing: {error!r}"
        ) from error
    if not is_same:
        raise CheckpointError(
            f"{source} has other weights than the head in {folder} was trained on: restore them, "
            "or train the head again"
        )
    classifier.weights_origin = str(folder)
    return classifier


def read_classifier_config(folder: str | Path) -> dict[str, Any] | None:
    """Content of a classifier folder's config.json; None for every other folder."""
    path = Path(folder).expanduser() / CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # the readers of other folders report the damage
    is_ours = isinstance(config, dict) and config.get("ijepa_zoo") == KIND
    return config if is_ours else None


def _absolute(source: str) -> str:
    """A source with the absolute path of its folder or file; names of models stay."""
    library, prefix, path = source.rpartition(FOLDER_PREFIX)
    if not prefix and not Path(path).exists():
        return source
    return f"{library}{prefix}{Path(path).expanduser().resolve()}"


def _open_encoder(source: str, size: tuple[int, ...], args: dict[str, Any]) -> Any:
    if not is_own_model(source):
        with torch.device("meta"):
            has_size = hasattr(create_named_model(source, pretrained=False), "patch_embed")
        if not has_size:
            return create_named_model(source, **args)
    return create_named_model(source, img_size=size, **args)
