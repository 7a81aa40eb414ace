"""The NCP encoder computes the base model's own features with sufficient precision for its logits."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from acpo_dist.core.errors import ModelError
from acpo_dist.data.toy.world import captions
from acpo_dist.models.config import TuningConfig
from acpo_dist.models.family import Condition, trainable_tensors
from acpo_dist.models.ncp import NcpEncoder, full_float32
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.objective.ncp import ncp_statistics, ncp_step
from acpo_dist.objective.noise_space import ErrorStatistics, error_statistics
from acpo_dist.objective.preference import preference_logit, preference_term, split_pairs
from tests.helpers.ncp import calibrated_beta

PAIRS = 32
TIMESTEPS = (20, 100, 500, 900)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def sdxl() -> SdxlFamily:
    config = SdxlFamily.Config(path="toy-sdxl", tuning=TuningConfig(method="lora", rank=4))
    return SdxlFamily.load(config, device="cpu", trainable=True)


@pytest.fixture(scope="module")
def condition(sdxl: SdxlFamily) -> Condition:
    """Prompts of the pairs: winners, then losers."""
    prompts = sdxl.encode([captions()[index % len(captions())] for index in range(PAIRS)])
    pairs = prompts.join(prompts)
    return sdxl.sized(pairs, torch.zeros(2 * PAIRS, *sdxl.sample_shape))


class Situation:
    """Pairs at one timestep whose policy differs from the base by 1 %; winner and loser share noise, t and z."""

    def __init__(self, family: SdxlFamily, condition: Condition, timestep: int) -> None:
        self.timesteps = torch.full((2 * PAIRS,), timestep)
        self.alpha_bars, self.condition = family.alpha_bars, condition
        level, clean = family.alpha_bars[timestep], noise(2 * PAIRS, 4, 8, 8, seed=1)
        self.noise = noise(PAIRS, 4, 8, 8, seed=2).repeat(2, 1, 1, 1)
        self.z = noise(PAIRS, 4, 8, 8, seed=3).repeat(2, 1, 1, 1)
        self.noisy = level.sqrt() * clean + (1 - level).sqrt() * self.noise
        with torch.no_grad():
            self.reference = family.predict(self.noisy.float(), self.timesteps, condition).double()
        self.policy = self.reference + 0.01 * self.reference.std() * noise(2 * PAIRS, 4, 8, 8, seed=4)

    @torch.no_grad()
    def statistics(self, encoder: NcpEncoder, dtype: torch.dtype, *, stride: int = 1) -> ErrorStatistics:
        def features(state: Tensor, timesteps: Tensor) -> list[Tensor]:
            return [value.to(dtype) for value in encoder.features(state, timesteps, self.condition)]

        return ncp_statistics(
            features, noisy=self.noisy.to(dtype), policy_noise=self.policy.to(dtype),
            reference_noise=self.reference.to(dtype), noise=self.noise.to(dtype),
            step=ncp_step(self.timesteps, self.alpha_bars, stride),
            posterior_noise=self.z.to(dtype) if stride == 1 else None,
        )  # fmt: skip

    def logit(self, encoder: NcpEncoder, dtype: torch.dtype, **options) -> Tensor:
        winner, loser = split_pairs(self.statistics(encoder, dtype, **options))
        return preference_logit(winner.excess, loser.excess, 1.0).double()


def correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def to_tf32(values: Tensor) -> Tensor:
    """float32 rounded to TF32's ten stored bits, ties to even, as tensor cores do with their inputs."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


# Precision


@pytest.mark.parametrize("stride", [1, 20])
@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_ncp_logits_in_our_precision_are_those_of_float64(sdxl, condition, timestep: int, stride: int):
    situation = Situation(sdxl, condition, timestep)
    exact = NcpEncoder(sdxl.network)
    exact.network.double()
    wanted = situation.logit(exact, torch.float64, stride=stride)
    found = situation.logit(NcpEncoder(sdxl.network), torch.float32, stride=stride)
    assert correlation(found, wanted) > 0.999


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_ncp_logits_are_lost_in_bfloat16_and_in_tf32(sdxl, condition, timestep: int):
    situation = Situation(sdxl, condition, timestep)
    wanted = situation.logit(NcpEncoder(sdxl.network), torch.float32)
    half = NcpEncoder(sdxl.network)
    half.network.bfloat16()
    assert correlation(situation.logit(half, torch.float32), wanted) < 0.9
    tensor_core = NcpEncoder(sdxl.network)
    for module in tensor_core.network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data = to_tf32(module.weight.data)
            module.register_forward_pre_hook(lambda _module, inputs: (to_tf32(inputs[0]), *inputs[1:]))
    assert correlation(situation.logit(tensor_core, torch.float32), wanted) < 0.9


def test_autocast_does_not_reach_the_encoder(sdxl, condition):
    situation, encoder = Situation(sdxl, condition, 100), NcpEncoder(sdxl.network)
    plain = situation.logit(encoder, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(situation.logit(encoder, torch.float32), plain)


def test_tf32_is_off_inside_and_back_to_what_it_was_outside():
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip(f"needs torch 2.9 for its precision switches, found {torch.__version__}")
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    with full_float32("cpu"):
        assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
    assert (conv.fp32_precision, matmul.fp32_precision) == before != ("ieee", "ieee")


def test_the_encoder_is_float32_for_any_dtype_of_the_model():
    family = SdxlFamily.load(SdxlFamily.Config(path="toy-sdxl", dtype="bfloat16"), device="cpu", trainable=True)
    encoder = NcpEncoder(family.network)
    assert {parameter.dtype for parameter in encoder.network.parameters()} == {torch.float32}
    latents = noise(1, 4, 8, 8, seed=0).float()
    (found,) = encoder.features(latents, torch.tensor([5]), family.sized(family.encode(["a"]), latents))
    assert found.dtype == torch.float32


# The encoder


def watched(network: nn.Module) -> dict[str, Tensor]:
    """States inside the forward pass of a complete U-Net, by name."""
    seen: dict[str, Tensor] = {}
    for index, block in enumerate(network.down_blocks):
        block.register_forward_hook(lambda _m, _i, result, index=index: seen.__setitem__(f"down{index}", result[0]))
    network.mid_block.register_forward_hook(lambda _m, _i, result: seen.__setitem__("middle", result))
    return seen


@pytest.mark.parametrize(
    ("output", "names"), [("down", ["down1"]), ("middle", ["middle"]), ("stages", ["down0", "down1", "middle"])]
)
def test_features_are_the_states_of_the_base_models_own_pass(condition, output, names: list[str]):
    family = SdxlFamily.load(SdxlFamily.Config(path="toy-sdxl"), device="cpu", trainable=True)
    encoder, seen = NcpEncoder(family.network, output=output), watched(family.network)
    state, timesteps = noise(2 * PAIRS, 4, 8, 8, seed=0).float(), torch.arange(2 * PAIRS)
    with torch.no_grad(), family.anchored():
        family.predict(state, timesteps, condition)
    found = encoder.features(state, timesteps, condition)
    for value, name in zip(found, names, strict=True):
        torch.testing.assert_close(value, seen[name], rtol=0, atol=1e-6)


def test_an_encoder_made_of_a_trained_lora_network_is_still_the_base(sdxl, condition):
    family = SdxlFamily.load(SdxlFamily.Config(path="toy-sdxl"), device="cpu", trainable=True)
    for parameter in trainable_tensors(family.network).values():
        nn.init.normal_(parameter.data)
    state, timesteps = noise(2 * PAIRS, 4, 8, 8, seed=0).float(), torch.full((2 * PAIRS,), 100)
    of_trained, of_base = (
        NcpEncoder(network, output="middle").features(state, timesteps, condition)[0]
        for network in (family.network, sdxl.network)
    )
    assert torch.equal(of_trained, of_base)
    assert len(trainable_tensors(family.network)) > 0  # nothing of the policy was taken away


def test_the_encoder_is_a_copy_without_the_half_it_does_not_need(sdxl):
    encoder = NcpEncoder(sdxl.network)
    own = {parameter.data_ptr() for parameter in encoder.network.parameters()}
    assert not own & {parameter.data_ptr() for parameter in sdxl.network.parameters()}
    assert not trainable_tensors(encoder.network)
    down = sdxl.network.down_blocks
    base = sum(value.numel() for name, value in down.named_parameters() if "lora_" not in name)
    rest = ("time_embedding", "add_embedding", "conv_in")
    base += sum(value.numel() for name in rest for value in getattr(sdxl.network, name).parameters())
    assert sum(value.numel() for value in encoder.network.parameters()) == base
    assert len(sdxl.network.up_blocks) and sdxl.network.mid_block is not None


def test_an_unconditional_unet_has_features_too():
    network = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
    ).eval()  # fmt: skip
    seen = watched(network)
    state, timesteps = noise(2, 3, 8, 8, seed=0).float(), torch.tensor([3, 700])
    encoder = NcpEncoder(network, output="stages")
    with torch.no_grad():
        network(state, timesteps)
    found = encoder.features(state, timesteps, Condition({}))
    for value, name in zip(found, ["down0", "down1", "middle"], strict=True):
        torch.testing.assert_close(value, seen[name], rtol=0, atol=1e-6)


def test_checkpointing_changes_memory_and_not_the_gradient(sdxl, condition):
    gradients = []
    for checkpointing in (False, True):
        state = noise(2 * PAIRS, 4, 8, 8, seed=0).float().requires_grad_(True)
        encoder = NcpEncoder(sdxl.network, output="stages", checkpointing=checkpointing)
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = sum(value.square().mean() for value in encoder.features(state, state.new_zeros(64), condition))
        forward = kept
        (gradient,) = torch.autograd.grad(loss, state)
        gradients.append((gradient, forward))
    (plain, held), (recomputed, held_less) = gradients
    torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-9)
    assert held_less < held / 2


def test_a_network_that_is_no_unet_is_refused():
    with pytest.raises(ModelError, match="network is a Linear"):
        NcpEncoder(nn.Linear(1, 1))


def test_a_missing_middle_block_is_refused_only_for_outputs_that_need_it():
    network = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"), mid_block_type=None, layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=8,
    )  # fmt: skip
    with pytest.raises(ModelError, match="middle block"):
        NcpEncoder(network, output="middle")
    condition = Condition({"prompt_embeds": noise(1, 3, 8, seed=0).float()})
    (found,) = NcpEncoder(network).features(noise(1, 4, 8, 8, seed=1).float(), torch.tensor([1]), condition)
    assert found.shape == (1, 16, 4, 4)


# Losses on the encoder


def test_the_encoder_passes_gradient_to_the_policys_noise_and_to_nothing_else(sdxl, condition):
    situation, encoder = Situation(sdxl, condition, 300), NcpEncoder(sdxl.network)
    tensors = {name: getattr(situation, name).float().requires_grad_(True) for name in ("policy", "reference", "noise")}
    statistics = ncp_statistics(
        lambda state, timesteps: encoder.features(state, timesteps, condition), noisy=situation.noisy.float(),
        policy_noise=tensors["policy"], reference_noise=tensors["reference"], noise=tensors["noise"],
        step=ncp_step(situation.timesteps, situation.alpha_bars, 1), posterior_noise=situation.z.float(),
    )  # fmt: skip
    preference_term("dpo", *split_pairs(statistics), beta=1e6).loss_P.sum().backward()
    assert tensors["reference"].grad is None and tensors["noise"].grad is None
    assert bool((tensors["policy"].grad.flatten(1).norm(dim=1) > 0).all())


def test_calibration_gives_the_real_encoder_logits_of_the_noise_spaces_scale(sdxl, condition):
    situation = Situation(sdxl, condition, 300)
    distances = situation.statistics(NcpEncoder(sdxl.network), torch.float32)
    errors = error_statistics(situation.policy, situation.reference, situation.noise)
    beta = calibrated_beta(errors, distances)
    spread = [
        float(preference_term("dpo", *split_pairs(found), beta=value).logit_P.std())
        for found, value in ((errors, 5000.0), (distances, beta))
    ]
    # The scale, not the numbers: the encoder weighs directions differently.
    assert 1 / 4 < spread[1] / spread[0] < 4
