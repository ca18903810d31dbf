"""LoRA with peft: adapt an encoder to a task by training a few percent of its weights.

    pip install peft
    python examples/lora.py --steps 200

The task is that of `finetune_timm.py`: to count the objects of a rendered scene.
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model

import ijepa_zoo  # noqa: F401 - registers the models with timm
from ijepa_zoo.data.scenes import SPLIT_STARTS, count_class, render_scenes

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="vit_nano8_64_ijepa")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--scenes", type=int, default=2000)
parser.add_argument("--out", default="adapter")
args = parser.parse_args()

encoder = timm.create_model(args.model, pretrained=True, num_classes=8)
config = timm.data.resolve_model_data_config(encoder)
mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))


def load(split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    scenes = render_scenes(0, SPLIT_STARTS[split], count, size=config["input_size"][-1])
    images = torch.from_numpy(scenes["images"]).permute(0, 3, 1, 2).float() / 255
    return (images - mean) / std, torch.tensor([count_class(int(c)) for c in scenes["count"]])


# Names of timm's ViT; a bare "proj" would also match the patch embedding.
layers = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
lora = LoraConfig(r=8, lora_alpha=16, target_modules=layers, modules_to_save=["head"])
model = get_peft_model(encoder, lora)
model.print_trainable_parameters()

images, labels = load("train", args.scenes)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
generator = torch.Generator().manual_seed(0)
for step in range(args.steps):
    batch = torch.randint(len(images), (64,), generator=generator)
    loss = F.cross_entropy(model(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0 or step == args.steps - 1:
        print(f"step {step:4d}  loss {loss.item():.3f}")

model.save_pretrained(args.out)  # the adapter and the classifier, without the encoder
fresh = timm.create_model(args.model, pretrained=True, num_classes=8)
merged = PeftModel.from_pretrained(fresh, args.out).merge_and_unload().eval()  # a timm ViT again
test_images, test_labels = load("val", max(64, args.scenes // 4))
with torch.inference_mode():
    right = merged(test_images).argmax(1) == test_labels
print(f"count accuracy on {len(right)} unseen scenes: {right.float().mean():.1%} (chance 12.5%)")
