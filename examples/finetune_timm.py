"""A timm fine-tuning loop with an I-JEPA backbone: only the name of the model changes.

The task is to count the objects of a rendered scene; layer decay, drop path, the optimizer and the
schedule are timm's.

    python examples/finetune_timm.py --model vit_nano8_64_ijepa --steps 200    # a few minutes

`--lora` trains low-rank adapters with peft (`pip install peft`), a few percent of the weights:

    python examples/finetune_timm.py --lora adapter
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

import ijepa_zoo  # noqa: F401 - registers the models with timm
from ijepa_zoo.data.scenes import SPLIT_STARTS, count_class, render_scenes

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="vit_nano8_64_ijepa")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--scenes", type=int, default=2000)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--lora", metavar="DIR", help="train an adapter alone, and save it here")
args = parser.parse_args()

drop_path = 0 if args.lora else 0.1
model = timm.create_model(args.model, pretrained=True, num_classes=8, drop_path_rate=drop_path)
config = timm.data.resolve_model_data_config(model)
mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))


def load(split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    scenes = render_scenes(0, SPLIT_STARTS[split], count, size=config["input_size"][-1])
    images = torch.from_numpy(scenes["images"]).permute(0, 3, 1, 2).float() / 255
    return (images - mean) / std, torch.tensor([count_class(int(c)) for c in scenes["count"]])


if args.lora:
    from peft import LoraConfig, PeftModel, get_peft_model

    # Names of timm's ViT; a bare "proj" would also match the patch embedding.
    layers = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=layers, modules_to_save=["head"])
    model = get_peft_model(model, lora)
    model.print_trainable_parameters()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
else:
    options = {"lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.75}
    optimizer = create_optimizer_v2(model, opt="adamw", **options)

images, labels = load("train", args.scenes)
scheduler = CosineLRScheduler(optimizer, args.steps, warmup_t=args.steps // 10, warmup_lr_init=1e-6)
generator = torch.Generator().manual_seed(0)
model.train()
for step in range(args.steps):
    scheduler.step(step)
    batch = torch.randint(len(images), (args.batch_size,), generator=generator)
    loss = F.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0 or step == args.steps - 1:
        print(f"step {step:4d}  loss {loss.item():.3f}")

if args.lora:
    model.save_pretrained(args.lora)  # the adapter and the classifier, without the encoder
    fresh = timm.create_model(args.model, pretrained=True, num_classes=8)
    model = PeftModel.from_pretrained(fresh, args.lora).merge_and_unload()  # a timm ViT again
test_images, test_labels = load("val", max(64, args.scenes // 4))
with torch.inference_mode():
    right = model.eval()(test_images).argmax(1) == test_labels
print(f"count accuracy on {len(right)} unseen scenes: {right.float().mean():.1%} (chance 12.5%)")
