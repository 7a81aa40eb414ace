"""Warnings of a plan: insufficient memory with remedies, then the limits of the estimate."""

from collections.abc import Mapping

from acpo_dist.config.schema import Config
from acpo_dist.core.sizes import size_text
from acpo_dist.models.architectures import Architecture
from acpo_dist.preflight.plan.memory import Memory
from acpo_dist.preflight.plan.rates import Device

TIGHT = 0.92
"""Share of a device's memory above which a plan warns; fragmentation uses the rest."""
_WHO = {
    "all": "one process holds all roles: it",
    "shared": "a GPU that workers of several roles share (gpus_per_worker, gpus_per_rank, gpus_per_replica)",
}


def warnings_for(
    config: Config, architecture: Architecture, roles: Mapping[str, Memory], needed: Mapping[str, float], device: Device
) -> list[str]:
    """Return warnings, the most urgent first."""
    found = [
        text for name, amount in needed.items() if (text := _too_much(config, name, amount, roles, device)) is not None
    ]
    if architecture.published:
        found.append(
            f"model.path `{config.model.path}` is not on this disk: counted on the published architecture of "
            f"`{architecture.family}`. `hf download {config.model.path}` first, then plan again."
        )
    metrics = [entry.name for entry in (*config.rewards.train, *config.rewards.judges) if not entry.lightweight]
    if metrics:
        found.append(f"the networks of the metrics themselves are not counted: {', '.join(metrics)}.")
    sizes = [size for size, _ in config.model.sizes]
    if len(sizes) > 1:
        largest = max(sizes, key=lambda size: size[0] * size[1])
        found.append(f"memory and time are those of the largest of {len(sizes)} image sizes, {size_text(largest)}.")
    if config.learner.offload_optimizer == "cpu":
        found.append(
            "the optimiser is in host memory (12 bytes per trainable weight over all ranks) and its steps run on the "
            "CPU."
        )
    if config.learner.zero_stage == 3:
        found.append("ZeRO stage 3 gathers weights layer by layer; its peak depends on prefetching (not counted).")
    return found


def _too_much(
    config: Config, name: str, amount: float, roles: Mapping[str, Memory], device: Device
) -> str | None:  # fmt: skip
    if device.memory_gib is None or amount <= TIGHT * device.memory_gib:
        return None
    over = "more than" if amount > device.memory_gib else "nearly all of"
    who = _WHO.get(name, f"`{name}`")
    remedies = _remedies(config, name, roles)
    return (
        f"out of memory: {who} needs about {amount:.1f} GiB, {over} the {device.memory_gib:.1f} GiB of "
        f"{device.name}. {remedies}"
    )


def _remedies(config: Config, name: str, roles: Mapping[str, Memory]) -> str:
    """Return settings that reduce the memory of the largest role."""
    memory = getattr(config.model, "memory", None)
    ways: list[str] = []
    largest = name if name in roles else max(roles, key=lambda role: roles[role].total)
    if largest == "learner":
        if memory is not None and not memory.gradient_checkpointing:
            ways.append("model.memory.gradient_checkpointing=true")
        if config.learner.micro_batch > 1:
            ways.append(f"learner.micro_batch={max(1, config.learner.micro_batch // 2)}")
        if config.learner.zero_stage is None and config.learner.optimizer == "adamw":
            ways.append("learner.optimizer=adamw_8bit")
        if config.learner.zero_stage in (1, 2) and config.learner.offload_optimizer == "none":
            ways.append("learner.offload_optimizer=cpu")
        if config.model.tuning.method == "full":
            ways.append("model.tuning.method=lora, or more ranks with learner.zero_stage=2")
    if largest == "rollout":
        if memory is not None and not memory.vae_slicing:
            ways.append("model.memory.vae_slicing=true")
        if config.rollout.batch_size > config.rollout.samples_per_prompt:
            ways.append(f"rollout.batch_size={max(config.rollout.samples_per_prompt, config.rollout.batch_size // 2)}")
    if largest == "reward":
        if memory is not None and not memory.vae_checkpointing:
            ways.append("model.memory.vae_checkpointing=true")
        if config.learner.micro_batch > 1:
            ways.append(f"learner.micro_batch={max(1, config.learner.micro_batch // 2)}")
        if getattr(config.model, "vae_dtype", "float32") == "float32":
            ways.append("model.vae_dtype=bfloat16")
    if memory is not None and not memory.free_text_encoders and largest != "reward":
        ways.append("model.memory.free_text_encoders=true")
    return f"Try {'; '.join(ways)}." if ways else "Use a larger device."
