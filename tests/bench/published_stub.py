"""A folder that the benches take for a clone of the published code: the same names, our networks.

Nothing in it is copied; schedules and masks are written from the formulas.
"""

import textwrap

FILES = {
    "src/models/vision_transformer.py": """
        import torch
        from torch import nn
        from ijepa_zoo.models.encoder import IJepaEncoder
        from ijepa_zoo.models.predictor import Predictor

        class VisionTransformer(IJepaEncoder):
            def __init__(self, img_size, norm_layer, **sizes):
                super().__init__(img_size=tuple(img_size), **sizes)

            def forward(self, images, masks=None):
                return self.encode(images, masks[0] if masks else None)

        class VisionTransformerPredictor(nn.Module):
            def __init__(self, num_patches, embed_dim, predictor_embed_dim, depth, num_heads,
                         mlp_ratio, **rest):
                super().__init__()
                side = int(num_patches**0.5)
                self.own = Predictor(
                    (side, side), embed_dim, predictor_embed_dim, depth, num_heads, mlp_ratio
                )

            def load_state_dict(self, state):
                return self.own.load_state_dict(state)

            def forward(self, tokens, context, targets):
                found = self.own(tokens, context[0], torch.stack(targets, dim=1))
                return found.transpose(0, 1).flatten(0, 1)
        """,
    "src/masks/utils.py": """
        import torch

        def apply_masks(tokens, masks):
            return torch.cat([torch.stack([t[i] for t, i in zip(tokens, m)]) for m in masks])
        """,
    "src/masks/multiblock.py": """
        from ijepa_zoo.masks import MultiBlockMasks

        class MaskCollator:
            larger = 0

            def __init__(self, input_size, patch_size, pred_mask_scale, enc_mask_scale,
                         aspect_ratio, nenc, npred, min_keep, allow_overlap):
                self.sampler, self.step = MultiBlockMasks(input_size), 0

            def __call__(self, batch):
                context, targets = self.sampler.sample(
                    len(batch), seed=7, step=self.step + self.larger
                )
                self.step += 1
                return batch, [context], list(targets.unbind(1))
        """,
    "src/transforms.py": """
        from torchvision import transforms

        def make_transforms(crop_size, crop_scale):
            return transforms.Compose([
                transforms.RandomResizedCrop(crop_size, crop_scale), transforms.ToTensor(),
            ])
        """,
    "src/utils/logging.py": """
        def grad_logger(parameters):
            return [float(p.grad.norm()) for _, p in parameters if p.grad is not None]
        """,
    "src/helper.py": """
        import logging, math, sys
        import torch

        logging.basicConfig(stream=sys.stdout, level=logging.INFO)
        SLOWER = 1.0

        class Rates:
            def __init__(self, change):
                self.count, self.change = 0, change

            def step(self):
                self.count += 1
                self.change(self.count)

        def init_opt(encoder, predictor, iterations_per_epoch, start_lr, ref_lr, warmup,
                     num_epochs, wd, final_wd, final_lr, ipe_scale):
            both = [*encoder.parameters(), *predictor.parameters()]
            both = [p for p in both if p.requires_grad]
            groups = [{"params": [p for p in both if p.ndim > 1]},
                      {"params": [p for p in both if p.ndim == 1], "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups)

            def lr(count):
                for group in optimizer.param_groups:
                    group["lr"] = SLOWER * (start_lr + count / warmup * (ref_lr - start_lr))

            def decay(count):
                share = (1 + math.cos(math.pi * count / num_epochs)) / 2
                optimizer.param_groups[0]["weight_decay"] = final_wd + (wd - final_wd) * share

            return optimizer, None, Rates(lr), Rates(decay)
        """,
}


def write_stub(folder, **changes):
    """The folder; `changes` replaces text of all files: `write_stub(f, **{"SLOWER = 1.0": ...})`"""
    for name, text in FILES.items():
        for old, new in changes.items():
            text = text.replace(old, new)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder
