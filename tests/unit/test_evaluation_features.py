"""Feature extractors: what they depend on, what they ignore, and what they refuse."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from acpo_dist.core.errors import ConfigError, ModelError
from acpo_dist.data.toy.world import templates
from acpo_dist.evaluation.metrics.features import InceptionFeatures, LowPassPixels, MidBlockFeatures, NetworkFeatures
from acpo_dist.models.config import TuningConfig
from acpo_dist.models.ddpm import DdpmFamily
from acpo_dist.models.family import trainable_tensors
from acpo_dist.models.sdxl import SdxlFamily

FULL, LORA = TuningConfig(method="full"), TuningConfig(rank=2)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class OwnClassifier(nn.Module):
    """Loaded by name in a test below."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 5, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)


def family_of(kind: str, tuning: TuningConfig):
    if kind == "ddpm":
        return DdpmFamily.load(DdpmFamily.Config(tuning=tuning), device="cpu", trainable=True)
    return SdxlFamily.load(SdxlFamily.Config(path="toy-sdxl", tuning=tuning), device="cpu", trainable=True)


@pytest.mark.parametrize(
    ("kind", "tuning"), [("ddpm", FULL), ("sdxl", FULL), ("sdxl", LORA)], ids=["ddpm full", "sdxl full", "sdxl lora"]
)
def test_mid_block_features_are_the_frozen_base_models_however_far_the_policy_moves(kind: str, tuning: TuningConfig):
    family = family_of(kind, tuning)
    clean = torch.randn(3, *family.sample_shape, generator=rng(0))
    extract = MidBlockFeatures(family, batch_size=2)
    before = extract(clean)
    with torch.no_grad():
        for parameter in trainable_tensors(family.network).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng(1)))
    after = extract(clean)
    assert torch.equal(after.values, before.values) and after.source == before.source
    assert not before.noise_blind
    # The samples are told apart, and the policy really moved.
    assert (before.values[0] - before.values[1]).abs().max() > 1e-3
    noisy, at = clean, torch.full((3,), 100)
    condition = family.encode([""] * 3)
    with torch.no_grad():
        policy = family.predict(noisy, at, condition)
        with family.anchored():
            assert not torch.allclose(policy, family.predict(noisy, at, condition))


def test_mid_block_features_do_not_depend_on_the_batch():
    family = family_of("ddpm", FULL)
    clean = torch.randn(3, *family.sample_shape, generator=rng(0))
    together = MidBlockFeatures(family)(clean).values
    alone = torch.cat([MidBlockFeatures(family)(sample[None]).values for sample in clean])
    # float32 convolutions may add in another order for another batch size.
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_mid_block_features_follow_their_timestep_and_seed():
    family = family_of("ddpm", FULL)
    clean = torch.randn(1, *family.sample_shape, generator=rng(0))
    made = [MidBlockFeatures(family, **options)(clean) for options in ({}, {"timestep": 300}, {"seed": 1})]
    assert len({features.source for features in made}) == 3
    assert not torch.allclose(made[0].values, made[1].values) and not torch.allclose(made[0].values, made[2].values)


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


def test_missing_inception_weights_say_what_to_do(tmp_path: Path):
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
