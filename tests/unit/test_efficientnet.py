"""EfficientNet-Lite0 features, with the published weights where they are present."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from acpo_dist.core.errors import ModelError
from acpo_dist.evaluation.metrics.efficientnet import EfficientNetLite0
from acpo_dist.evaluation.suites.set_metrics import open_extractor
from tests.helpers.data import DATA, needs

WEIGHTS = "iqa/efficientnet_lite0.safetensors"
# ImageNet classes: paintbrush, alp, valley, wall clock, drum.
CLASSES = {"Picture_1A": 696, "picosdeeuropa": 970, "life": 979, "greentock": 892, "Wine": 541}


@needs(WEIGHTS, "photos")
def test_published_weights_classify_real_photographs():
    network = EfficientNetLite0().eval()
    network.load_state_dict(load_file(DATA / WEIGHTS))
    for name, wanted in CLASSES.items():
        image = Image.open(DATA / "photos" / f"{name}.webp").convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        cut = image.crop((left, top, left + side, top + side)).resize((256, 256))
        with torch.no_grad():
            logits = network.logits(torch.from_numpy(np.asarray(cut).copy()).permute(2, 0, 1)[None] / 255)
        assert int(logits.argmax()) == wanted, name


@needs(WEIGHTS)
def test_features_are_the_input_of_the_classifier():
    extractor = open_extractor(f"efficientnet-lite0:{DATA / WEIGHTS}")
    images = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    features = extractor(images).values
    weights = load_file(DATA / WEIGHTS)
    network = EfficientNetLite0().eval()
    network.load_state_dict(weights)
    with torch.no_grad():
        logits = network.logits(images)
    assert features.shape == (2, 1280)
    torch.testing.assert_close(features @ weights["_fc.weight"].T + weights["_fc.bias"], logits, rtol=1e-4, atol=1e-4)


def test_other_weights_are_refused(tmp_path):
    save_file({"_conv_stem.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"other\.safetensors"):
        open_extractor(f"efficientnet-lite0:{tmp_path / 'other.safetensors'}")
