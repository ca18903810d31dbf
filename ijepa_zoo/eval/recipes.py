"""Fine-tuning recipes of the paper, and the augmentation that they share.

Sources: the I-JEPA paper (arXiv 2301.08243, section 5 and appendix A.1). What it leaves open is
taken from MAE's fine-tuning (facebookresearch/mae), whose recipe the paper follows: warm-up of 5
epochs from 0, smallest learning rate 1e-6, a head that starts with weights of std 2e-5, and for
full fine-tuning label smoothing 0.1 and RandAugment.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from ..data.datasets import Targets
from ..errors import SettingsError
from ..seeds import Stream, fold, torch_generator
from .batches import EvalBatch, TrainBatches
from .sets import EvalSet
from .tasks import View
from .views import Size

VIEW = View("crop", "bicubic")

_HEAD_STD = 2e-5
_TRANSLATE = 0.45  # of the image's side, the most that RandAugment moves it: timm's


@dataclass(frozen=True)
class FineTuneRecipe:
    """How all weights of a model are trained with labels.

    Attributes:
        epochs: Passes over the training images.
        lr: Learning rate of the last layer at `batch_size`; it grows linearly with the batch.
        batch_size: Images of a step, of all processes together.
        weight_decay: Of AdamW; none on biases and norms.
        layer_decay: Factor of the learning rate from each layer to the one below: the head, the
            blocks (the final norm with the last one, as timm has it), the patch embedding.
        drop_path: Share of residual branches that are left out, growing from 0 over the depth.
        mixup: Parameter of mixup's beta distribution; 0 for none.
        cutmix: The same of cutmix; a batch gets one of the two.
        label_smoothing: Probability that is spread over all classes.
        auto_augment: timm's name of the augmentation.
        warmup_epochs: Epochs of the linear warm-up; a cosine follows.
        min_lr: What the cosine ends at.
        paper: The paper's accuracies on ImageNet in percent, by the name of the weights.
    """

    epochs: int = 50
    lr: float = 1e-4
    batch_size: int = 528
    weight_decay: float = 0.04
    layer_decay: float = 0.75
    drop_path: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    warmup_epochs: float = 5.0
    min_lr: float = 1e-6
    paper: Mapping[str, float] = field(default_factory=dict)

    def with_epochs(self, epochs: int) -> FineTuneRecipe:
        """The same schedule stretched or shortened to another number of epochs.

        Raises:
            ValueError: `epochs` is below 1.
        """
        if epochs < 1:
            raise SettingsError(f"epochs is {epochs}; fine-tuning needs at least 1")
        return replace(self, epochs=epochs, warmup_epochs=self.warmup_epochs * epochs / self.epochs)


FULL = FineTuneRecipe(paper={"vit_huge16_448_ijepa.in1k": 87.1})
FEW_LABELS = FineTuneRecipe(
    lr=3e-5,
    batch_size=512,
    weight_decay=0.4,
    drop_path=0.0,
    mixup=0.0,
    cutmix=0.0,
    paper={"vit_huge14_ijepa.in1k": 73.3, "vit_huge16_448_ijepa.in1k": 77.3},
)
_LARGE = 1024  # width of a ViT-L
_LARGE_DECAY = 0.05


def few_labels_recipe(model: Any) -> FineTuneRecipe:
    """The recipe for few labels: weight decay 0.4 for ViT-H, 0.05 up to ViT-L."""
    small = model.embed_dim <= _LARGE
    return replace(FEW_LABELS, weight_decay=_LARGE_DECAY) if small else FEW_LABELS


def add_head(model: Any, num_classes: int, seed: int) -> None:
    """Give a timm model a classifier for `num_classes`, with small weights."""
    model.reset_classifier(num_classes)
    head = model.get_classifier()
    generator = torch_generator(seed, Stream.EVAL_INIT)
    with torch.no_grad():
        nn.init.trunc_normal_(head.weight, std=_HEAD_STD, generator=generator)
        nn.init.zeros_(head.bias)


def set_drop_path(model: Any, rate: float) -> None:
    """Leave out residual branches in training, from none in the first block to `rate` in the last.

    Raises:
        ValueError: The model's blocks have no place for it.
    """
    from timm.layers import DropPath

    blocks = list(model.blocks)
    for block, share in zip(blocks, np.linspace(0, rate, len(blocks)).tolist()):
        places = [name for name, _ in block.named_children() if name.startswith("drop_path")]
        if not places:
            raise SettingsError(
                f"blocks of {type(block).__name__} take no drop path: use a recipe with drop_path=0"
            )
        for place in places:
            setattr(block, place, DropPath(share) if share else nn.Identity())


@contextmanager
def library_seeds(*keys: int) -> Iterator[None]:
    """Seed the generators of `random` and NumPy, which timm draws from, and put them back."""
    states = random.getstate(), np.random.get_state()
    random.seed(fold(*keys))
    np.random.seed(fold(*keys) % 2**32)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class AugmentedBatches(TrainBatches):
    """Training batches of random crops and flips, then timm's augmentation of each image.

    Args:
        data: Training set.
        rows: Numbers of its images.
        size: Height and width of the model's input.
        batch_size: Images of a step, of all processes together.
        auto_augment: timm's name of the augmentation.
        mean: Of the model's input, 0 to 1; fills what an augmentation leaves empty.
        more: Further arguments of `TrainBatches`.
    """

    def __init__(
        self,
        data: EvalSet,
        rows: Targets,
        size: Size,
        batch_size: int,
        *,
        auto_augment: str,
        mean: tuple[float, ...],
        **more: Any,
    ) -> None:
        from timm.data.auto_augment import posterize, rand_augment_transform

        super().__init__(data, rows, VIEW, size, batch_size, **more)
        settings = {
            "translate_const": int(min(size) * _TRANSLATE),
            "img_mean": tuple(min(255, round(255 * value)) for value in mean),
            "interpolation": Image.Resampling.BICUBIC,
        }
        self.augment = rand_augment_transform(auto_augment, settings)
        for operation in self.augment.ops:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize

    def __getitem__(self, number: int) -> EvalBatch:
        """See :class:`TrainBatches`."""
        batch = super().__getitem__(number)
        step, part = divmod(number, self.parts)
        first = self.rank * self.share + part * self.micro
        keys = (self.seed, Stream.EVAL_AUGMENT, *divmod(step, self.steps))
        images = [
            self._augmented(image, (*keys, first + place))
            for place, image in enumerate(batch.images)
        ]
        return replace(batch, images=torch.stack(images))

    def _augmented(self, image: Tensor, keys: tuple[int, ...]) -> Tensor:
        with library_seeds(*keys):
            tensor: Tensor = tv.pil_to_tensor(self.augment(tv.to_pil_image(image)))
        return tensor


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """timm's operation; it asks for 0 bits at the top, which newer versions of Pillow refuse."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)
