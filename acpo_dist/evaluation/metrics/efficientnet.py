"""EfficientNet-Lite0 as a feature extractor: a small ImageNet classifier whose published weights fit in 19 MB."""

import re
from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn
from typing_extensions import override

_SIDE = 224
_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# The first block has no expansion: its depthwise convolution is followed by a pointwise one.
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


class EfficientNetLite0(nn.Module):
    """The pooled features before the classifier, (N, 1280), of RGB images in [0, 1] of any size.

    Loads timm's names and the names of `efficientnet-lite-pytorch`.
    """

    def __init__(self) -> None:
        """Build the network with random weights."""
        super().__init__()
        self.network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)

    @override
    def forward(self, images: Tensor) -> Tensor:
        return self.network.forward_head(self.network.forward_features(self._prepared(images)), pre_logits=True)

    def logits(self, images: Tensor) -> Tensor:
        """Return ImageNet logits, (N, 1000), of RGB images in [0, 1]."""
        return self.network(self._prepared(images))

    @override
    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        # The names of `efficientnet-lite-pytorch` begin with an underscore.
        renamed = self._renamed(state_dict) if any(name.startswith("_") for name in state_dict) else state_dict
        return self.network.load_state_dict(renamed, strict=strict, assign=assign)

    def _prepared(self, images: Tensor) -> Tensor:
        resized = nn.functional.interpolate(images, (_SIDE, _SIDE), mode="bicubic", antialias=True, align_corners=False)
        return (resized.clamp(0, 1) - 0.5) / 0.5

    def _renamed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        places = [
            f"{stage}.{index}" for stage, blocks in enumerate(self.network.blocks) for index in range(len(blocks))
        ]
        renamed = {}
        for name, value in weights.items():
            found = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", name)
            if found:
                number, layer, rest = int(found[1]), found[2], found[3]
                names = _FIRST if number == 0 else _BLOCK
                renamed[f"blocks.{places[number]}.{names.get(layer, layer)}.{rest}"] = value
            else:
                layer, _, rest = name.partition(".")
                renamed[f"{_STEM.get(layer, layer)}.{rest}"] = value
        return renamed
