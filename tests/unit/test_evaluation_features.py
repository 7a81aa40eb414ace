"""Feature extractors: dependencies, invariances and rejected input."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from acpo_dist.core.errors import ConfigError, ModelError
from acpo_dist.data.toy.world import templates
from acpo_dist.evaluation.metrics.features import InceptionFeatures, LowPassPixels, NetworkFeatures


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class OwnClassifier(nn.Module):
    """Loaded by name in a test below."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 5, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)


def test_low_pass_features_hardly_see_speckle_and_see_another_scene():
    # The same shape on grey, elsewhere: grey leaves the speckle room on both sides.
    clean, other = templates()[18:19], templates()[26:27]
    noisy = (clean + 0.2 * torch.randn(clean.shape, generator=rng(0))).clamp(0, 1)
    extract = LowPassPixels(8)
    speckle, scene = ((extract(images).values - extract(clean).values).norm() for images in (noisy, other))
    assert extract(clean).values.shape == (1, 192) and extract(clean).noise_blind
    pixels = (noisy - clean).norm() / (other - clean).norm()
    # Each value averages 16 pixels: independent noise shrinks to a quarter, a scene stays.
    assert pixels > 0.6 and speckle / scene < 0.5 * pixels


def test_low_pass_features_refuse_images_too_small_to_average():
    with pytest.raises(ValueError, match="lower the size"):
        LowPassPixels(8)(torch.zeros(1, 3, 16, 16))


def test_a_network_is_loaded_by_name_with_its_weights(tmp_path: Path):
    network = OwnClassifier()
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    target = f"{OwnClassifier.__module__}:OwnClassifier"
    features = NetworkFeatures.load(target, tmp_path / "own.safetensors", noise_blind=True)(templates()[:4])
    with torch.no_grad():
        torch.testing.assert_close(features.values, network(templates()[:4]).mean((2, 3)))
    assert features.noise_blind and features.source.startswith(target)


def test_weights_that_do_not_fit_a_network_are_refused(tmp_path: Path):
    save_file({"other": torch.zeros(1)}, tmp_path / "own.safetensors")
    with pytest.raises(ModelError, match="does not fit"):
        NetworkFeatures.load(f"{OwnClassifier.__module__}:OwnClassifier", tmp_path / "own.safetensors")


def test_an_unknown_network_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="feature network"):
        NetworkFeatures.load("nowhere:Network", tmp_path / "own.safetensors")


def test_missing_inception_weights_are_refused_with_a_remedy(tmp_path: Path):
    with pytest.raises(ModelError, match="Nothing is downloaded"):
        InceptionFeatures(tmp_path / "inception-2015-12-05.pt")


def test_a_torchscript_inception_gets_bytes_and_gives_features(tmp_path: Path):
    class Stand(nn.Module):
        def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            assert images.dtype == torch.uint8 and return_features
            return images.float().mean((2, 3))

    torch.jit.script(Stand()).save(str(tmp_path / "stand.pt"))
    features = InceptionFeatures(tmp_path / "stand.pt", batch_size=2)(torch.full((3, 3, 8, 8), 0.5))
    # 0.5 rounds to level 128.
    assert features.values.tolist() == [[128.0] * 3] * 3
