"""Base class of the Stable Diffusion families: a U-Net on VAE latents with CLIP conditioning."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import AutoTokenizer
from typing_extensions import override

from acpo_dist.core.errors import ModelError
from acpo_dist.core.sizes import Size, size_text
from acpo_dist.diffusion.flow import flow_inputs
from acpo_dist.models.compiling import compile_blocks
from acpo_dist.models.family import Condition, ModelFamily, trainable_tensors
from acpo_dist.models.fusing import fused_folder
from acpo_dist.models.latent_checks import check_folder, check_unet, own_size
from acpo_dist.models.loading import DTYPES, held_dtype, load_part, pipeline_folder, resolve_path
from acpo_dist.models.lora_files import adapter_layers
from acpo_dist.models.lora_reading import lora_file
from acpo_dist.models.noise_levels import read_schedule
from acpo_dist.models.offload import Offloader
from acpo_dist.models.pipeline_files import write_pipeline
from acpo_dist.models.single_file import check_single_file, single_file_folder, tokenizer_source
from acpo_dist.models.text import CHUNKS, Encoder, Encoders, PromptEmbeddings, fingerprint, load_encoders
from acpo_dist.models.tuning import TunedNetwork
from acpo_dist.models.vae import VaeDecoder, load_vae, replace_vae


class LatentFamily(ModelFamily):
    """A U-Net with text encoders and a VAE. Subclasses define the pipeline class and the conditioning."""

    conditional: ClassVar[bool] = True
    pixel_space: ClassVar[bool] = False
    pipeline: ClassVar[Any]
    """Pipeline class of diffusers."""
    text_parts: ClassVar[tuple[tuple[str, str, Any], ...]]
    """(folder of the tokenizer, folder of the encoder, class of the encoder) of each text encoder."""
    unused_parts: ClassVar[tuple[str, ...]] = ()
    """Components of the pipeline that are never loaded."""
    network_part: ClassVar[str] = "unet"
    """Folder of the trained network."""
    network_class: ClassVar[Any] = UNet2DConditionModel
    vae_class: ClassVar[Any] = AutoencoderKL
    decoder_class: ClassVar[type[VaeDecoder]] = VaeDecoder
    saved_with: ClassVar[dict[str, Any]] = {}
    """Additional configuration values of the saved pipeline."""

    def __init__(self, config: Any, *, path: str, device: str, trainable: bool) -> None:
        """Load all components. Called by `load`.

        Args:
            config: the `model` section.
            path: pipeline folder.
            device: torch device.
            trainable: whether the weights are trained (learner) or only sampled from (rollout).
        """
        self.config, self.path, self.device = config, path, device
        self._options: dict[str, Any] = {"revision": config.revision, "variant": config.variant}
        dtype = held_dtype(config.dtype, method=config.tuning.method, trainable=trainable)
        unet = load_part(self.network_class.from_pretrained, path, self.network_part, dtype=dtype, **self._options)
        self._check_network(unet)
        unet.to(device).eval()
        if config.speed.channels_last:
            unet.to(memory_format=torch.channels_last)
        if config.memory.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self._tuned = TunedNetwork(
            unet, config.tuning, seed=config.seed, keep_anchor=trainable,
            anchor_dtype=DTYPES[config.memory.anchor_dtype],
        )  # fmt: skip
        if config.speed.compile is not None:
            compile_blocks(unet, config.speed.compile)
        self.network: nn.Module = unet
        self.schedule = read_schedule(path, config.revision)
        self.prediction_type, self.alpha_bars = self.schedule.prediction_type, self.schedule.alpha_bars
        self.clean_rule = self.schedule.rule
        self._zero_null = self._null_is_zeros(config, path)
        self._offloader = Offloader(device) if config.memory.offload else None
        self._embeddings = PromptEmbeddings(
            self._load_encoders, self._embed, device=device, folder=self._cache_folder(config, path),
            free=config.memory.free_text_encoders,
        )  # fmt: skip
        self.decoder = self.load_decoder(config, device=device)
        if self._offloader is not None:
            # What is trained, and a decoder that gradients pass through, stay on the device.
            frozen = [self._tuned.frozen_copy] if trainable else [unet, self.decoder.vae]
            for module in frozen:
                if module is not None:
                    self._offloader.add(module)
        self.factor, self._channels = self.decoder.factor, int(unet.config["in_channels"])
        factor = self._multiple
        sizes = [size for size, _ in config.sizes] or [self._own_size(unet)]
        odd = [size_text(size) for size in sizes if size[0] % factor or size[1] % factor]
        if odd:
            raise ModelError(
                f"model.image_size: {', '.join(odd[:3])}: width and height must be multiples of {factor}, the VAE's "
                "reduction and the network's patches."
            )
        self.size = sizes[0]
        self.sample_shape = self.shape_of(None)

    @classmethod
    @override
    def check(cls, config: Any) -> None:
        path = Path(resolve_path(config.path))
        if path.is_file():
            check_single_file(config)
        elif path.is_dir():
            cls._check_folder(str(path), config)
        for entry in config.loras:
            lora_file(entry.path, "model.loras")
        if config.tuning.init is not None:
            lora_file(config.tuning.init, "model.tuning.init")

    @classmethod
    @override
    def load(cls, config: Any, *, device: str, trainable: bool) -> Any:
        return cls(config, path=cls.locate(config), device=device, trainable=trainable)

    @classmethod
    @override
    def load_decoder(cls, config: Any, *, device: str) -> VaeDecoder:
        """Load the VAE only."""
        memory = config.memory
        vae = load_vae(
            cls.locate(config), config.vae, dtype=config.vae_dtype, device=device, offline=config.offline,
            revision=config.revision, variant=config.variant, kind=cls.vae_class,
        )  # fmt: skip
        if config.speed.channels_last:
            vae.to(memory_format=torch.channels_last)
        return cls.decoder_class(
            vae, checkpointing=memory.vae_checkpointing, slicing=memory.vae_slicing, tiling=memory.vae_tiling
        )

    @classmethod
    def locate(cls, config: Any) -> str:
        """Return the pipeline folder with `model.loras` merged.

        A hub id is downloaded or found in the local cache, a single file is converted once.

        Raises:
            ModelError: the model is not available, is incomplete, or is another kind of pipeline.
        """
        path = resolve_path(config.path)
        if Path(path).is_file():
            path = str(single_file_folder(config))
        else:
            path = pipeline_folder(
                cls.pipeline, path, revision=config.revision, variant=config.variant, offline=config.offline,
                without=cls._unused(config),
            )  # fmt: skip
            cls._check_folder(path, config)
        return str(fused_folder(Path(path), config)) if config.loras else path

    @classmethod
    def open_pipeline(cls, config: Any) -> Any:
        """Open the base model as a diffusers pipeline in float32, without the unused components.

        Raises:
            ModelError: the model is not available, is incomplete, or is another kind of pipeline.
        """
        return cls._whole(config, cls.locate(config))

    @classmethod
    def embeddings(cls, config: Any, *, device: str) -> PromptEmbeddings:
        """Create the prompt embeddings with their cache folder only, for `acpo embed`.

        Raises:
            ModelError: `memory.embedding_cache` is unset, or the text encoders cannot be loaded.
        """
        if config.memory.embedding_cache is None:
            raise ModelError("model.memory.embedding_cache is unset: set the folder of the embeddings.")
        path = cls.locate(config)
        return PromptEmbeddings(
            lambda: cls._encoders(config, path, device), cls._embedder(config, path), device=device,
            folder=cls._cache_folder(config, path), free=True,
        )  # fmt: skip

    @classmethod
    def chunk_counts(cls, config: Any, prompts: Sequence[str]) -> list[int]:
        """Return the number of chunks of each prompt; only the tokenizers are loaded.

        Raises:
            ModelError: a tokenizer is missing.
        """
        path = tokenizer_source(config)
        encoders = [
            Encoder(load_part(AutoTokenizer.from_pretrained, path, name, revision=config.revision), None)
            for name, _, _ in cls.text_parts
        ]
        return [max(len(encoder.chunks(prompt, cut=False)) for encoder in encoders) for prompt in prompts]

    @classmethod
    def guided_condition(cls, config: Any, encoders: Encoders, prompt: str, negative: str | None) -> Condition:
        """Encode the two branches of guidance with loaded encoders, for a pipeline of diffusers.

        Args:
            config: the `model` section.
            encoders: the pipeline's text encoders.
            prompt: the prompt.
            negative: prompt of the unconditional branch; None is the family's null condition.

        Returns:
            Conditions of the unconditional and the conditional branch, in this order, equally long.
        """
        embed = cls._embedder(config.model_copy(update={"negative_prompt": negative}), tokenizer_source(config))
        with torch.no_grad():
            padding = embed(encoders, None)["prompt_embeds"]
            null = Condition(embed(encoders, ""), padding)
            return null.join(Condition(embed(encoders, prompt), padding))

    @override
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts, each once; the empty prompt gives the null condition, or that of `negative_prompt`."""
        tensors = self._embeddings(prompts)
        if self._zero_null and not any(prompts):
            return Condition(tensors, padding=torch.zeros_like(tensors["prompt_embeds"][:1]))
        return Condition(tensors, padding=self._embeddings.padding() if CHUNKS in tensors else None)

    @override
    def shape_of(self, size: Size | None) -> tuple[int, int, int]:
        width, height = size or self.size
        return self._channels, height // self.factor, width // self.factor

    def size_conditioning(
        self, originals: Sequence[Size], crops: Sequence[tuple[int, int]], size: Size
    ) -> dict[str, Tensor]:
        """Return the conditioning on the size and crop of real images; empty if the network takes none.

        Args:
            originals: (width, height) of each image file in pixels.
            crops: (top, left) of each crop, in pixels of the resized image.
            size: (width, height) of the crops.
        """
        return {}

    @override
    def sized(self, condition: Condition, noisy: Tensor) -> Condition:
        return condition

    @override
    def predict(self, noisy: Tensor, timesteps_B: Tensor, condition: Condition) -> Tensor:
        """Run the U-Net once; input and output are float32 for any data type of the weights."""
        # Read the current data type: DeepSpeed can change it after loading.
        dtype = self._tuned.dtype
        if self.prediction_type == "flow_prediction":
            noisy, timesteps_B = flow_inputs(noisy, timesteps_B, len(self.alpha_bars))
        states = condition.tensors["prompt_embeds"].to(dtype)
        output = self._tuned.active(
            noisy.to(dtype),
            timesteps_B,
            states,
            added_cond_kwargs=self._added(self.sized(condition, noisy)),
            encoder_attention_mask=condition.mask(noisy.device),
            return_dict=False,
        )
        return output[0].float()

    @override
    def anchored(self) -> AbstractContextManager[None]:
        return self._tuned.anchored()

    @override
    def substituted(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        return self._tuned.substituted(weights)

    @override
    def decode(self, clean: Tensor) -> Tensor:
        return self.decoder.decode(clean)

    @override
    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.decoder.encode(pixels.to(self.device))

    @override
    def release(self) -> None:
        if self._offloader is not None:
            self._offloader.release()

    @override
    def save_pipeline(self, folder: Path) -> None:
        tensors = {name: value.detach() for name, value in trainable_tensors(self.network).items()}
        self.write_pipeline(self.config, tensors, folder)

    @classmethod
    def write_pipeline(
        cls, config: Any, tensors: Mapping[str, Tensor], folder: Path, *, dtype: torch.dtype = torch.float32
    ) -> None:
        """Write the base model with tuned weights as a pipeline folder, without loading the model.

        Args:
            config: the `model` section.
            tensors: trainable weights by parameter name, in float32.
            folder: folder to write.
            dtype: data type of all weights; in half precision small updates are lost to rounding.

        Raises:
            ModelError: the base model is not available, or the weights do not belong to it.
        """
        lora = config.tuning.method == "lora"
        write_pipeline(
            Path(cls.locate(config)), folder, dtype=dtype, variant=config.variant, without=cls._unused(config),
            tuned={cls.network_part: adapter_layers(tensors, config.tuning) if lora else tensors},
            index=cls.saved_with,
        )  # fmt: skip
        if config.vae is not None:
            replace_vae(folder, cls.locate(config), config, kind=cls.vae_class, dtype=dtype)

    @classmethod
    def _embedder(cls, config: Any, path: str) -> Any:
        """(encoders, prompt) -> embeddings; the empty prompt is the null condition."""
        raise NotImplementedError

    @classmethod
    def _null_is_zeros(cls, config: Any, path: str) -> bool:
        """Whether the null condition is zeros instead of the encoded empty prompt."""
        return False

    @classmethod
    def _unused(cls, config: Any) -> tuple[str, ...]:
        """Components of the pipeline that are not loaded under this configuration."""
        return cls.unused_parts

    @classmethod
    def _text_parts(cls, config: Any, path: str) -> tuple[tuple[str, str, Any], ...]:
        """The text encoders that the embeddings use, as in `text_parts`."""
        return cls.text_parts

    @classmethod
    def _text_facts(cls, config: Any, path: str) -> dict[str, Any]:
        """Further JSON values that affect the embeddings, for the name of the cache folder."""
        return {}

    @property
    def _multiple(self) -> int:
        """Number of pixels of which width and height must be multiples."""
        return self.factor

    def _added(self, condition: Condition) -> dict[str, Tensor] | None:
        """The U-Net's `added_cond_kwargs`."""
        return None

    def _check_network(self, unet: Any) -> None:
        """Raise `ModelError` if the U-Net has inputs that the family does not provide."""
        check_unet(unet, self.path)

    def _own_size(self, unet: Any) -> Size:
        """Default width and height of the model's images in pixels."""
        return own_size(unet, factor=self.factor, path=self.path)

    @classmethod
    def _whole(cls, config: Any, path: str, **parts: Any) -> Any:
        """Load the pipeline of a folder; `parts` replaces components."""
        parts |= {**dict.fromkeys(cls._unused(config)), **cls.saved_with}
        if config.vae is not None:
            # Load the VAE again: the one of a loaded family can have a narrower data type and be on another device.
            parts["vae"] = load_vae(
                path, config.vae, dtype="float32", device="cpu", offline=config.offline, kind=cls.vae_class
            )
        return load_part(
            cls.pipeline.from_pretrained, path, None, dtype=torch.float32, revision=config.revision,
            variant=config.variant, **parts,
        )  # fmt: skip

    @classmethod
    def _check_folder(cls, path: str, config: Any) -> None:
        check_folder(path, config, pipeline=cls.pipeline.__name__, unused=cls._unused(config))

    @classmethod
    def _encoders(cls, config: Any, path: str, device: str) -> Encoders:
        return load_encoders(
            path, cls._text_parts(config, path), dtype=DTYPES[config.dtype], device=device, revision=config.revision,
            variant=config.variant, tokenizer=AutoTokenizer,
        )  # fmt: skip

    def _load_encoders(self) -> Encoders:
        encoders = self._encoders(self.config, self.path, self.device)
        if self._offloader is not None and not self.config.memory.free_text_encoders:
            for encoder in encoders:
                self._offloader.add(encoder.model)
        return encoders

    def _embed(self, encoders: Encoders, prompt: str | None) -> dict[str, Tensor]:
        return self._embedder(self.config, self.path)(encoders, prompt)

    @classmethod
    def _cache_folder(cls, config: Any, path: str) -> Path | None:
        root = config.memory.embedding_cache
        if root is None:
            return None
        parts = [name for part in cls._text_parts(config, path) for name in part[:2]]
        return root / fingerprint(
            path, parts, dtype=config.dtype, variant=config.variant, negative_prompt=config.negative_prompt,
            null_is_zeros=cls._null_is_zeros(config, path), long_prompts=config.long_prompts,
            clip_skip=getattr(config, "clip_skip", None), **cls._text_facts(config, path),
        )  # fmt: skip
