"""The model card that goes into every exported folder."""

from .bundle import Bundle

_NETWORK = {
    "target_encoder": "the **target encoder** of I-JEPA, the network that the paper evaluates",
    "encoder": "the **context encoder** of I-JEPA (the paper evaluates the target encoder)",
}
_USE = {
    "timm": 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)',
    "native": (
        "import ijepa_zoo  # all networks; stock timm also loads the folder's main network\n\n"
        'model = ijepa_zoo.create_model("local-dir:FOLDER")'
    ),
    "transformers": (
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        'processor = AutoImageProcessor.from_pretrained("FOLDER")\n'
        'model = AutoModel.from_pretrained("FOLDER")\n'
        "features = model(**processor(image, return_tensors='pt')).last_hidden_state.mean(1)"
    ),
}
_CLASSIFY = (
    "from transformers import AutoImageProcessor, AutoModelForImageClassification\n\n"
    'processor = AutoImageProcessor.from_pretrained("FOLDER")\n'
    'model = AutoModelForImageClassification.from_pretrained("FOLDER")\n'
    "logits = model(**processor(image, return_tensors='pt')).logits"
)


def model_card(bundle: Bundle, library: str, network: str) -> str:
    """README.md with Hub metadata: what the weights are, preprocessing, how to load them.

    Args:
        bundle: The networks.
        library: Layout of the folder: 'timm', 'native' or 'transformers'.
        network: The main network in it.
    """
    args, pre = bundle.args, bundle.preprocessing
    size = "x".join(map(str, pre["input_size"][1:]))
    name = "timm" if library == "native" else library
    held = ", ".join(bundle.states) if library == "native" else network
    part = "" if pre["crop_pct"] == 1 else f" / {pre['crop_pct']}"
    license_line = f"license: {bundle.license.lower()}\n" if bundle.license else ""
    what = _NETWORK.get(network, "one encoder of I-JEPA; the source did not say which")
    use = _USE[library]
    if args["num_classes"]:
        what = f"an encoder of I-JEPA with a classifier of {args['num_classes']} classes"
        use = _CLASSIFY if library == "transformers" else use
    return f"""---
{license_line}library_name: {name}
tags:
- image-feature-extraction
- self-supervised-learning
- i-jepa
---
# {bundle.model}

This folder holds {what}.

| | |
|---|---|
| source | {bundle.origin.rsplit("/", 1)[-1]} |
| width, depth, heads | {args["embed_dim"]}, {args["depth"]}, {args["num_heads"]} |
| patch, image | {args["patch_size"][0]}, {size} |
| networks | {held} |
| preprocessing | resize to {size}{part} ({pre["interpolation"]}), centre crop, \
mean {pre["mean"]}, std {pre["std"]} |
| licence | {bundle.license or "not stated; that of the weights it was made from, if any"} |

```python
{use}
```

Features: tokens after the final LayerNorm, averaged over the patches.

Paper: *Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture*,
Assran et al., CVPR 2023, arXiv:2301.08243. Written by ijepa_zoo.
"""
