"""Serving options of the reward pool for one metric, and its HTTP endpoint."""

from pydantic import Field, model_validator

from acpo_dist.config.section import Section


class RuntimeEnvConfig(Section):
    """Environment of the replicas of one metric."""

    pip: tuple[str, ...] = ()
    """pip requirements, installed for these replicas only."""
    env_vars: dict[str, str] = Field(default={})
    """Environment variables of these replicas; no secrets, since the configuration is written into the run's folder."""


class MetricPoolConfig(Section):
    """Replicas, batches and resources of one metric. Null values are taken from `rewards`."""

    replicas: int | None = Field(default=None, ge=1)
    """Fixed number of replicas; null uses rewards.replicas."""
    min_replicas: int | None = Field(default=None, ge=1)
    """Smallest number of replicas; set together with max_replicas, instead of a fixed number."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Largest number of replicas; between the two the number follows the ongoing requests."""
    target_ongoing_requests: float = Field(default=2.0, gt=0)
    """Target of ongoing requests per replica for autoscaling."""
    upscale_delay_s: float = Field(default=5.0, ge=0)
    """Seconds above that target before a replica is added."""
    downscale_delay_s: float = Field(default=60.0, ge=0)
    """Seconds below that target before a replica is removed."""
    max_ongoing_requests: int = Field(default=4, ge=1)
    """Requests that a replica holds at once: one batch is computed while the next is collected."""
    max_queued_requests: int = Field(default=128, ge=1)
    """Requests that wait per caller; further ones are rejected and retried."""
    max_batch: int = Field(default=16, ge=1)
    """Largest number of images per forward pass, over all requests; halved if memory runs out."""
    batch_wait_s: float = Field(default=0.0, ge=0)
    """Seconds that an incomplete batch waits for more requests; 0 runs it at once."""
    cpus: float | None = Field(default=None, ge=0)
    """CPUs per replica; null uses rewards.cpus_per_replica."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs per replica, may be fractional; null uses rewards.gpus_per_replica."""
    runtime_env: RuntimeEnvConfig = RuntimeEnvConfig()

    @model_validator(mode="after")
    def _number_of_replicas(self) -> "MetricPoolConfig":
        if (self.min_replicas is None) != (self.max_replicas is None):
            raise ValueError(
                f"min_replicas ({self.min_replicas}) and max_replicas ({self.max_replicas}) must be set together"
            )
        if self.min_replicas is not None and self.max_replicas is not None:
            if self.replicas is not None:
                raise ValueError(
                    f"replicas ({self.replicas}) is a fixed number, min_replicas ({self.min_replicas}) and "
                    f"max_replicas ({self.max_replicas}) are bounds: set one or the other"
                )
            if self.min_replicas > self.max_replicas:
                raise ValueError(f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})")
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """Return the smallest and largest number of replicas; equal if the number is fixed."""
        fixed = self.replicas or 1
        return self.min_replicas or fixed, self.max_replicas or fixed


class HttpConfig(Section):
    """HTTP endpoint of the pool for other runs and programs."""

    enabled: bool = False
    """Start the endpoint."""
    host: str = "127.0.0.1"
    """Address to listen on; the default accepts connections from this machine only."""
    port: int = Field(default=8765, ge=0, le=65535)
    """Port to listen on; 0 uses a free one."""
    token_env: str = Field(default="ACPO_REWARDS_TOKEN", min_length=1)
    """Environment variable with the accepted tokens, separated by commas; their values are never written anywhere."""
    max_mib: float = Field(default=64.0, gt=0)
    """Largest request body in MiB."""
