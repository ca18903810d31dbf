"""The released files themselves: needs the network and tens of gigabytes, so not run by default."""

import io
import urllib.request

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import ijepa_zoo
from ijepa_zoo.weights import registry

pytestmark = [pytest.mark.hub, pytest.mark.timeout(7200)]

COCO = "http://images.cocodataset.org/val2017/{}.jpg"
CHECKED = [record for record in registry.checkpoints() if record.check]
OFFICIAL = [record for record in registry.checkpoints() if record.format == "official"]


@pytest.mark.parametrize("record", CHECKED, ids=lambda record: record.name)
def test_hub_files_give_the_published_check_values(record: registry.Checkpoint) -> None:
    check = record.check
    with urllib.request.urlopen(COCO.format(check["image"].removeprefix("COCO "))) as response:
        image = Image.open(io.BytesIO(response.read())).convert("RGB")
    pixels = image.resize(record.input_size[:0:-1], Image.Resampling.BILINEAR)
    normalise = v2.Normalize(check["image_mean"], check["image_std"])
    images = normalise(v2.functional.to_dtype(v2.functional.pil_to_tensor(pixels), scale=True))
    model = ijepa_zoo.create_model(record.name).eval()
    with torch.inference_mode():
        tokens = model.encode(images.unsqueeze(0))
    torch.testing.assert_close(
        tokens[0, :3, :3],
        torch.tensor(check["tokens_0_3_0_3"]),
        atol=check["tolerance"],
        rtol=0,
    )


@pytest.mark.parametrize("record", OFFICIAL, ids=lambda record: record.name)
def test_official_context_encoder_is_the_hub_file(record: registry.Checkpoint) -> None:
    ranged = ijepa_zoo.create_model(record.name, network="encoder").state_dict()
    hub = ijepa_zoo.create_model(f"{record.name}_context").state_dict()
    assert ranged.keys() == hub.keys()
    assert all(torch.equal(ranged[name], hub[name]) for name in hub)
    target = ijepa_zoo.create_model(record.name).state_dict()
    assert not torch.equal(target["norm.weight"], ranged["norm.weight"])
