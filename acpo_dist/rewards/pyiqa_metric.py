"""No-reference metrics of pyiqa by name: an optional extra under a noncommercial licence; nothing of it is here."""

import importlib.util
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from acpo_dist.core.errors import RewardConfigError
from acpo_dist.core.registry import nearest
from acpo_dist.rewards.base import MetricConfig

# Facts of pyiqa 0.1.16. These have no usable gradient: histograms, thresholds, hand-made features, forests.
_WITHOUT_GRADIENT = frozenset(
    "piqe entropy niqe niqe_matlab ilniqe brisque brisque_matlab nrqm pi qalign qalign_8bit qalign_4bit compare2score "
    "fgresq".split()
)
_LOWER_IS_BETTER = frozenset("piqe niqe niqe_matlab ilniqe brisque brisque_matlab pi".split())
_WITH_GRADIENT = frozenset(
    "cnniqa dbcnn wadiqam_nr musiq musiq-ava musiq-paq2piq musiq-spaq nima nima-koniq nima-spaq nima-vgg16-ava paq2piq "
    "maniqa maniqa-pipal maniqa-kadid clipiqa clipiqa+ clipiqa+_vitL14_512 clipiqa+_rn50_512 tres tres-flive hyperiqa "
    "uranker topiq_nr topiq_nr-flive topiq_nr-spaq topiq_nr-face topiq_iaa topiq_iaa_res50 laion_aes liqe liqe_mix "
    "metaiqa unique arniqa arniqa-live arniqa-csiq arniqa-tid arniqa-kadid arniqa-clive arniqa-flive arniqa-spaq "
    "maclip qualiclip qualiclip+ qualiclip+-clive qualiclip+-flive qualiclip+-spaq".split()
)


class PyiqaMetric:
    """One pyiqa metric, per picture, in its own unit and direction."""

    class Config(MetricConfig):
        """Which metric."""

        type: Literal["pyiqa"] = "pyiqa"
        metric: str
        """pyiqa's name, such as musiq or piqe."""
        weights: str | None = None
        """File that pyiqa loads instead of a download."""

        def default_name(self) -> str:
            """The metric's own name."""
            return self.metric

    needs_prompts: ClassVar[bool] = False

    def __init__(self, config: Config, *, device: str = "cpu") -> None:
        """Build the metric.

        Raises:
            RewardConfigError: pyiqa is missing, or its weights cannot be had.
        """
        reason = self.unusable(config)
        if reason:
            raise RewardConfigError(f"`{config.name}`: {reason}")
        import pyiqa

        options: dict[str, Any] = {"pretrained_model_path": config.weights} if config.weights else {}
        differentiable = self.differentiable(config)
        try:
            # as_loss only switches gradients on; per-picture scores need loss_reduction="none".
            if differentiable:
                options |= {"as_loss": True, "loss_reduction": "none"}
            self._metric = pyiqa.create_metric(config.metric, device=device, **options)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise RewardConfigError(
                f"`{config.name}`: pyiqa cannot build `{config.metric}`: {error}. Its weights are downloaded on first "
                "use; without a network set `weights` to a file that pyiqa reads."
            ) from error
        found = -1 if self._metric.lower_better else 1
        if found != self.direction(config):
            raise RewardConfigError(
                f"`{config.name}`: this pyiqa says that {config.metric} is better when "
                f"{'lower' if found < 0 else 'higher'}, our table of pyiqa 0.1.16 says the opposite; install "
                "pyiqa==0.1.16"
            )

    @classmethod
    def unusable(cls, config: MetricConfig) -> str | None:
        """See `Metric.unusable`."""
        assert isinstance(config, cls.Config)
        known: list[str] = sorted(_WITH_GRADIENT | _WITHOUT_GRADIENT)
        if config.metric not in known:
            return f"pyiqa has no no-reference metric `{config.metric}`.{nearest(config.metric, known)}"
        if importlib.util.find_spec("pyiqa") is None:
            return "pyiqa is not installed (noncommercial licence, optional): pip install 'acpo-dist[pyiqa]'"
        return None

    @classmethod
    def differentiable(cls, config: MetricConfig) -> bool:
        """From the table of metrics with a usable gradient."""
        assert isinstance(config, cls.Config)
        return config.metric in _WITH_GRADIENT

    @classmethod
    def direction(cls, config: MetricConfig) -> int:
        """See `Metric.direction`; checked against pyiqa's own word when the metric is built."""
        assert isinstance(config, cls.Config)
        return -1 if config.metric in _LOWER_IS_BETTER else 1

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Metric.__call__`."""
        return self._metric(images).reshape(len(images)).float()
