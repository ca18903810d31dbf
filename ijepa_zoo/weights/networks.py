"""A checkpoint in memory: its networks, read when asked for, and what it says of itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError
from . import catalog
from .layouts import State

UNLABELLED = "unlabelled"
LABEL_KEY = "ijepa_zoo_network"  # in config.json of the folders that export writes


def label_of(said: Any) -> str:
    """The network that a file says it holds; 'unlabelled' for other words, which mean nothing."""
    return said if said in catalog.NETWORKS else UNLABELLED


@dataclass(frozen=True)
class Training:
    """State of a training run beside its networks.

    Attributes:
        optimizer: Optimizer tensors by parameter name, see
            :func:`~ijepa_zoo.weights.layouts.optimizer_from_official`.
        plain: Values that are no tensors: param_groups, scalars, scaler, epoch, loss, ...
    """

    optimizer: State
    plain: Mapping[str, Any]


@dataclass(frozen=True)
class Networks:
    """The networks of one checkpoint.

    Attributes:
        origin: Where it lies, in words.
        states: A reader per network; files are opened, or fetched, when it is called. The key is
            'unlabelled' where the checkpoint holds one network and does not say which.
        layout: Its layout, see :mod:`ijepa_zoo.weights.layouts`.
        model: Registered model that it belongs to, where it says so.
        args: timm arguments of its encoder, as far as its configuration gives them.
        predictor: ``embed_dim`` and ``depth`` of its predictor, and ``context`` if it is not the
            published one, where it says so.
        pretrained_cfg: timm's description of input and preprocessing, where it has one.
        license: Licence of the weights, where known.
        training: Reads what it holds beside networks to go on training, if anything.
    """

    origin: str
    states: Mapping[str, Callable[[], State]]
    layout: str
    model: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    predictor: Mapping[str, Any] = field(default_factory=dict)
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None
    training: Callable[[], Training] | None = None

    @property
    def grid_size(self) -> tuple[int, int] | None:
        """Rows and columns of the patch grid, where the configuration gives them."""
        if "img_size" not in self.args or "patch_size" not in self.args:
            return None
        sizes = (self.args["img_size"], self.args["patch_size"])
        (rows, columns), (height, width) = (
            (size, size) if isinstance(size, int) else tuple(size) for size in sizes
        )
        return rows // height, columns // width

    def choose(self, network: str | None, default: str = "target_encoder") -> str:
        """The key of ``states`` to load.

        Args:
            network: The network asked for; None for ``default`` where there is a choice.
            default: What is taken among several networks.

        Raises:
            CheckpointError: If the checkpoint does not hold the network, or does not say so.
        """
        if network is None:
            return default if default in self.states else next(iter(self.states))
        if network not in catalog.NETWORKS:
            raise CheckpointError(f"network must be one of {catalog.NETWORKS}, got {network!r}")
        if network in self.states:
            return network
        if UNLABELLED in self.states:
            raise CheckpointError(
                f"{self.origin} holds one network and does not say which: leave network out to "
                f"load it. (Released transformers files hold the context encoder.)"
            )
        raise CheckpointError(f"{self.origin} holds {', '.join(self.states)}, but no {network}")
