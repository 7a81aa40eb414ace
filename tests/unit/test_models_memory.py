"""Memory options do not change a model's output; invalid ones are rejected with a remedy."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler

import acpo_dist.data.toy
from acpo_dist.config.schema import SamplerConfig
from acpo_dist.core.errors import ModelError, NonFiniteError
from acpo_dist.core.types import SamplePlan
from acpo_dist.data.toy.world import captions
from acpo_dist.models.config import MemoryConfig, TuningConfig
from acpo_dist.models.family import Condition, trainable_tensors
from acpo_dist.models.noise_levels import NEAR_ZERO, read_schedule
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.models.tuning import release_frozen, share_frozen
from acpo_dist.models.vae import VaeDecoder
from acpo_dist.tracking.console import Console
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive
from acpo_dist.workers.learner.checkpoint import open_checkpoint
from acpo_dist.workers.rollout.worker import RolloutWorker

TOY = Path(acpo_dist.data.toy.__file__).parent / "assets" / "toy-sdxl"
PROMPTS = captions()[:3]


def load(memory: MemoryConfig | None = None, **options) -> SdxlFamily:
    options = {"path": "toy-sdxl", "tuning": TuningConfig(rank=4), **options}
    return SdxlFamily.load(
        SdxlFamily.Config(memory=memory or MemoryConfig(), **options), device="cpu", trainable=True
    )  # fmt: skip


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def copy_of_toy(folder: Path) -> Path:
    return Path(shutil.copytree(TOY, folder / "copy"))


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Memory


def gradients(family: SdxlFamily) -> dict[str, torch.Tensor]:
    for parameter in trainable_tensors(family.network).values():
        with torch.no_grad():
            parameter.add_(0.05)
    model_output = family.predict(noise(2, 4, 8, 8), torch.tensor([100, 700]), family.encode(PROMPTS[:2]))
    clean = family.decode(0.1 * model_output)
    (clean.square().mean() + model_output.square().mean()).backward()
    return {name: value.grad.clone() for name, value in trainable_tensors(family.network).items()}


def test_recomputed_gradients_of_unet_and_vae_are_the_kept_ones():
    kept = gradients(load())
    again = gradients(load(MemoryConfig(gradient_checkpointing=True, vae_checkpointing=True)))
    # The same float32 operations in the same order.
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=1e-6)


def test_slicing_decodes_the_same_images_and_tiling_nearly_the_same():
    latents = noise(2, 4, 32, 32)
    with torch.no_grad():
        whole = load().decode(latents)
        sliced = load(MemoryConfig(vae_slicing=True)).decode(latents)
        tiled_family = load(MemoryConfig(vae_tiling=True))
        tiled_family.decoder.vae.tile_latent_min_size, tiled_family.decoder.vae.tile_sample_min_size = 16, 64
        tiled = tiled_family.decode(latents)
    torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-5)
    assert not torch.equal(tiled, whole)
    assert float((tiled - whole).square().mean().sqrt()) < 0.5 * float(whole.std())


def test_tiles_are_never_used_where_a_gradient_passes():
    family = load(MemoryConfig(vae_tiling=True, vae_slicing=True))
    family.decoder.vae.tile_latent_min_size = 4
    latents = noise(2, 4, 8, 8).requires_grad_(True)
    whole = load().decode(latents)
    torch.testing.assert_close(family.decode(latents), whole, rtol=0, atol=1e-5)


def test_a_bfloat16_anchor_beside_full_tuning_stays_near_the_base():
    family = load(MemoryConfig(anchor_dtype="bfloat16"), tuning=TuningConfig(method="full"))
    arguments = noise(2, 4, 8, 8), torch.tensor([100, 700]), family.encode(PROMPTS[:2])
    with torch.no_grad():
        policy = family.predict(*arguments)
        with family.anchored():
            anchor = family.predict(*arguments)
    assert 0 < float((policy - anchor).norm() / policy.norm()) < 0.05
    assert {value.dtype for value in family.network.parameters()} == {torch.float32}


# The VAE


def test_another_vae_takes_the_pipelines_place_here_and_in_what_is_saved(tmp_path):
    vae = AutoencoderKL.from_pretrained(TOY / "vae", dtype=torch.float32)
    vae.register_to_config(scaling_factor=0.5)
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(0.25)
    vae.save_pretrained(tmp_path / "vae")
    latents = noise(1, 4, 8, 8)
    family = load(vae=str(tmp_path / "vae"))
    with torch.no_grad():
        wanted = vae.decode(latents / 0.5).sample / 2 + 0.5
        torch.testing.assert_close(family.decode(latents), wanted, rtol=0, atol=1e-6)
    family.save_pipeline(tmp_path / "out")
    saved = DiffusionPipeline.from_pretrained(tmp_path / "out").vae
    assert saved.config.scaling_factor == 0.5
    assert torch.equal(saved.decoder.conv_out.bias, vae.decoder.conv_out.bias)


def test_a_vae_that_is_not_there_is_named():
    with pytest.raises(ModelError, match=r"model\.vae: expected the folder of a VAE"):
        load(vae="./nowhere/vae")


def test_images_come_back_from_latents_and_latents_from_images():
    family = load()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    vae = family.decoder.vae
    with torch.no_grad():
        wanted = vae.config.scaling_factor * vae.encode(2 * images - 1).latent_dist.mean
    torch.testing.assert_close(family.encode_images(images), wanted, rtol=0, atol=1e-6)
    assert family.size == (32, 32)


def test_a_vae_known_to_overflow_is_refused_in_float16(tmp_path):
    folder = copy_of_toy(tmp_path)
    change_json(folder / "vae" / "config.json", force_upcast=True)
    with pytest.raises(ModelError, match=r"float16.*sdxl-vae-fp16-fix"):
        load(path=str(folder), vae_dtype="float16")


def test_an_overflow_of_the_vae_in_float16_is_noticed_and_explained():
    vae = AutoencoderKL.from_pretrained(TOY / "vae", dtype=torch.float16).eval()
    latents = noise(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.isfinite(VaeDecoder(vae).decode(latents)).all()
        vae.decoder.conv_in.weight.mul_(6e4)
        with pytest.raises(NonFiniteError, match=r"overflow in float16.*model\.vae_dtype"):
            VaeDecoder(vae).decode(latents)


# Schedules


def test_a_schedule_with_zero_terminal_signal_walks_as_diffusers_euler_does(tmp_path):
    folder = copy_of_toy(tmp_path)
    change_json(
        folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    schedule = read_schedule(str(folder))
    levels = schedule.alpha_bars
    assert schedule.prediction_type == "v_prediction" and float(levels[-1]) == NEAR_ZERO
    theirs = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = EulerDiscreteScheduler.from_config(theirs.scheduler.config, timestep_spacing="trailing")
    assert torch.allclose(theirs.scheduler.alphas_cumprod.double(), levels)
    start = noise(4, 8, 8, seed=7)
    wanted = theirs(
        PROMPTS[0], latents=start[None], num_inference_steps=10, guidance_scale=3.0, output_type="latent"
    ).images  # fmt: skip
    sampler = SamplerConfig(num_steps=10, guidance_scale=3.0, solver="euler", t_max=0.5)
    worker = RolloutWorker(SdxlFamily.Config(path=str(folder)), sampler)
    found = worker.generate([SamplePlan(sample_id="a", prompt_id=0, prompt=PROMPTS[0], seed=7)]).latents_BCHW
    # Both carry the state divided by sqrt(alpha_bar) = 2^-12 in float32 through the first step.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_noise_prediction_without_terminal_signal_is_refused(tmp_path):
    folder = copy_of_toy(tmp_path)
    change_json(folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    with pytest.raises(ModelError, match="must predict v"):
        load(path=str(folder))


def test_a_schedule_of_another_kind_is_refused(tmp_path):
    folder = copy_of_toy(tmp_path)
    change_json(folder / "scheduler" / "scheduler_config.json", _class_name="EDMEulerScheduler")
    with pytest.raises(ModelError, match="EDMEulerScheduler"):
        load(path=str(folder))


# Architectures that do not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, "takes 9 channels"),
        ({"time_cond_proj_dim": 8}, "distilled model"),
        ({"projection_class_embeddings_input_dim": 5 * 8 + 32}, "takes 5 time ids.*refiner"),
        ({"addition_embed_type": None}, "it is no SDXL"),
    ],
)
def test_a_unet_that_wants_something_else_is_refused_with_the_reason(tmp_path, changes, message):
    from diffusers import UNet2DConditionModel

    folder = copy_of_toy(tmp_path)
    config = {**UNet2DConditionModel.load_config(folder / "unet"), **changes}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    with pytest.raises(ModelError, match=message):
        load(path=str(folder))


def test_wrong_time_ids_are_refused_with_what_was_expected():
    family = load()
    tensors = dict(family.encode(PROMPTS[:1]).tensors)
    condition = Condition(tensors | {"time_ids": torch.zeros(1, 5)})
    with pytest.raises(ModelError, match=r"time ids of shape \(1, 5\): expected \(1, 6\)"):
        family.predict(noise(1, 4, 8, 8), torch.tensor([1]), condition)


def test_an_image_size_that_the_vae_cannot_make_is_refused():
    with pytest.raises(ModelError, match=r"model\.image_size: 30x30.* multiples of 4"):
        load(image_size=30)


def test_a_unet_may_say_its_height_and_width(tmp_path):
    folder = copy_of_toy(tmp_path)
    side = json.loads((folder / "unet" / "config.json").read_text())["sample_size"]
    change_json(folder / "unet" / "config.json", sample_size=[side, side])
    assert load(path=str(folder)).sample_shape == load().sample_shape
    change_json(folder / "unet" / "config.json", sample_size=[side, 2 * side])
    assert load(path=str(folder)).sample_shape == (4, side, 2 * side)
    assert load(path=str(folder), image_size=32).size == (32, 32)


def test_offloaded_parts_draw_the_same_images_and_train_the_same_weights(tiny, tmp_path):
    sums = []
    for offload in ("true", "false"):
        root = tmp_path / offload
        config = tiny("run.iterations=1", "sampler.num_steps=3", f"model.memory.offload={offload}", f"run.dir={root}")
        drive(config, open_ports, Console(quiet=True))
        sums.append(open_checkpoint(root / "checkpoints/000001").bundle().checksum)
    assert sums[0] == sums[1]


@pytest.mark.parametrize(("option", "shared"), [("run.seed=0", True), ("sampler.merge_adapters=true", False)])
def test_one_process_holds_the_frozen_weights_once_and_each_role_its_own_adapters(tiny, option, shared):
    with open_ports(tiny(option), None) as ports:  # type: ignore[arg-type]
        drawing, training = ports.rollout.worker.family.network, ports.learner.worker.family.network
    held = dict(drawing.named_parameters())
    for name, parameter in training.named_parameters():
        same = parameter.data_ptr() == held[name].data_ptr()
        assert same == (shared and not parameter.requires_grad), name


def test_released_weights_take_no_memory_until_another_network_lends_its_own(tiny):
    config = tiny().model
    drawing, training = (SdxlFamily.load(config, device="cpu", trainable=trainable) for trainable in (False, True))
    condition = training.encode(["a red circle on a white background"])
    noisy = torch.randn(1, *training.sample_shape, generator=torch.Generator().manual_seed(0))

    def head() -> torch.Tensor:
        with torch.no_grad():
            return drawing.predict(noisy, torch.tensor([300]), condition)

    before = head()
    release_frozen(drawing.network)
    held = sum(parameter.numel() for parameter in drawing.network.parameters())
    assert held == sum(value.numel() for value in trainable_tensors(training.network).values())
    share_frozen(drawing.network, training.network)
    assert torch.equal(head(), before)
    release_frozen(drawing.network)
    with pytest.raises(ValueError, match="no frozen"):
        share_frozen(drawing.network, training.network.to(torch.float64))
