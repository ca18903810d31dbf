"""Detection: Faster R-CNN on ViTDet's simple feature pyramid, trained on rendered scenes.

    python examples/detection.py --steps 200    # two minutes on a CPU

The pyramid is built from the last map alone (Li et al., 2022, arXiv 2203.16527, section 3).
"""

import argparse
from collections import OrderedDict

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou, masks_to_boxes

import ijepa_zoo  # noqa: F401 - registers the models with timm
from ijepa_zoo.data.scenes import SHAPES, SPLIT_STARTS, render_scene

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="vit_nano8_64_ijepa")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--scenes", type=int, default=400)
parser.add_argument("--size", type=int, default=128)
args = parser.parse_args()


class SimplePyramid(nn.Module):
    """Maps at half, one, two and four times the patch size."""

    def __init__(self, name: str, size: int, out_channels: int = 64) -> None:
        super().__init__()
        options = {"features_only": True, "out_indices": [-1], "img_size": size}
        self.body = timm.create_model(name, pretrained=True, **options)
        (width,) = self.body.feature_info.channels()
        up = nn.ConvTranspose2d(width, width, 2, stride=2)
        scales = [up, nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4)]
        self.levels = nn.ModuleList(
            nn.Sequential(scale, nn.Conv2d(width, out_channels, 1), nn.GroupNorm(1, out_channels))
            for scale in scales
        )
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return maps by level, finest first, as torchvision expects them."""
        (last,) = self.body(images)
        return OrderedDict((str(i), level(last)) for i, level in enumerate(self.levels))


def load(split: str, index: int) -> tuple[Tensor, dict[str, Tensor]]:
    scene = render_scene(0, SPLIT_STARTS[split] + index, args.size)
    masks = torch.from_numpy(scene.masks)
    seen = [k for k in range(1, scene.count + 1) if (masks == k).any(0).sum() > 3]
    boxes = masks_to_boxes(torch.stack([masks == k for k in seen])) + torch.tensor([0, 0, 1, 1])
    labels = torch.tensor([1 + SHAPES.index(scene.objects[k - 1].shape) for k in seen])
    image = torch.from_numpy(scene.image).permute(2, 0, 1) / 255
    return image, {"boxes": boxes, "labels": labels}


torch.manual_seed(0)
config = timm.get_pretrained_cfg(args.model)
model = FasterRCNN(
    SimplePyramid(args.model, args.size),
    num_classes=1 + len(SHAPES),
    rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 4),
    min_size=args.size,
    max_size=args.size,
    image_mean=config.mean,
    image_std=config.std,
    # Far fewer than the defaults for COCO: a scene has at most ten objects.
    rpn_post_nms_top_n_train=200,
    rpn_post_nms_top_n_test=100,
    box_batch_size_per_image=64,
)
scenes = [load("train", index) for index in range(args.scenes)]
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.05)
for step in range(args.steps):
    images, targets = zip(*[scenes[i] for i in torch.randint(len(scenes), (4,))])
    loss = sum(model(images, targets).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0 or step == args.steps - 1:
        print(f"step {step:4d}  loss {loss.item():.3f}")

model.eval()
found = total = 0
for image, target in (load("val", index) for index in range(32)):
    with torch.inference_mode():
        boxes = model([image])[0]["boxes"][:10]
    total += len(target["boxes"])
    if len(boxes):
        found += int((box_iou(target["boxes"], boxes).amax(1) > 0.5).sum())
print(f"recall of the first ten boxes on 32 unseen scenes, IoU > 0.5: {found / total:.1%}")
