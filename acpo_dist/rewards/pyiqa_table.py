"""Facts about every no-reference metric of pyiqa 0.1.16, collected by this project; contains no code or data of pyiqa.

Range and direction repeat pyiqa's own metadata, which is used if pyiqa is installed and which a test compares.
Gradient, smallest image and batching were measured on piqe, entropy, cnniqa, musiq, wadiqam_nr, uranker and metaiqa
(tests/unit/test_reward_pyiqa.py), the gradients of brisque, niqe and piqe with published weights on real images
(benchmarks/published_metrics.py, docs/evidence.md); for other metrics that need a download they are taken from pyiqa's
documentation and source.
"""

import functools
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

CODE_LICENCE = "code: PolyForm Noncommercial 1.0.0 and S-Lab 1.0"


@dataclass(frozen=True, kw_only=True)
class PyiqaFacts:
    """Facts about a metric that are known without building it."""

    score_range: str
    """Range in pyiqa's notation: lowest, highest; `~` means about."""
    trained_on: str = ""
    """Training data of its weights, which has its own terms; empty without weights."""
    lower_better: bool = False
    differentiable: bool = True
    """Whether the gradient with respect to the image is usable."""
    gradient_step: float | None = None
    """Largest signed step of that gradient, in 1/255, that improved at least nine of ten images; None: not measured."""
    download: bool = True
    """Whether it downloads weights (or parameters, or a backbone) on first use."""
    minimum: int = 32
    """Smallest height and width."""
    channels_last: bool = False
    """Whether its network supports the channels-last layout, which is faster on a CPU."""
    batched: bool = True
    """Whether it scores several images at once; otherwise they are passed one by one."""
    local: Literal["params", "bare", "file"] | None = None
    """Form of a file in `weights`: a state dict under the key `params`, bare, or any (`file`); None: not supported.

    State dicts are repacked for pyiqa, so both forms and safetensors are accepted.
    """
    backbone: str = ""
    """Download that is needed even if the weights are local."""
    options: tuple[tuple[str, Any], ...] = ()
    """Option that pyiqa needs to read a local file, because it derives it from the name of the download."""
    refused: str = ""
    """Reason why it cannot be a reward or a judge here."""

    @property
    def licence(self) -> str:
        """Short note on the licence; the authors' own terms apply."""
        weights = f"; weights: terms of their authors, trained on {self.trained_on}" if self.trained_on else ""
        return CODE_LICENCE + weights


_UNIT = PyiqaFacts(score_range="0, 1")
_ABOUT_UNIT = PyiqaFacts(score_range="~0, ~1")
_NATURAL = PyiqaFacts(
    score_range="~0, ~100", lower_better=True, differentiable=False, minimum=96, local="file",
    trained_on="natural images",
)  # fmt: skip
_MUSIQ = PyiqaFacts(score_range="~0, ~100", minimum=1, local="bare")
_NIMA = replace(_ABOUT_UNIT, minimum=1, local="params", backbone="timm inception_resnet_v2")
_MANIQA = replace(_ABOUT_UNIT, minimum=1, local="params", backbone="timm vit_base_patch8_224")
_TRES = PyiqaFacts(score_range="~0, ~100", minimum=1, local="bare", backbone="torchvision resnet50")
_TOPIQ = replace(_ABOUT_UNIT, local="params", backbone="timm resnet50")
_FACE = replace(
    _TOPIQ, differentiable=False, batched=False, trained_on="GFIQA faces", backbone="timm resnet50 and a face detector",
)  # fmt: skip
_IAA = PyiqaFacts(score_range="1, 10", local="params", trained_on="AVA", backbone="timm swin_base_patch4_window12_384")
_CLIPIQA = replace(_UNIT, trained_on="OpenAI's CLIP data")
_LIQE = PyiqaFacts(score_range="1, 5", minimum=224, local="params", backbone="OpenAI CLIP ViT-B/32")
_ARNIQA = replace(_UNIT, backbone="torchvision resnet50")
_LARGE = PyiqaFacts(
    score_range="1, 5", differentiable=False, batched=False, trained_on="images and texts of a large multimodal model"
)
_SETS = PyiqaFacts(
    score_range="0, ~", differentiable=False, lower_better=True, trained_on="ImageNet",
    refused="compares sets of images, so it has no score per image",
)  # fmt: skip

PYIQA: dict[str, PyiqaFacts] = {
    "piqe": PyiqaFacts(score_range="0, 100", differentiable=False, download=False, lower_better=True, minimum=8),
    "entropy": PyiqaFacts(score_range="0, 8", differentiable=False, download=False, minimum=1),
    "niqe": replace(_NATURAL, differentiable=True, gradient_step=0.2),
    "niqe_matlab": _NATURAL,
    "ilniqe": replace(_NATURAL, minimum=1),
    "brisque": replace(
        _NATURAL, score_range="~0, ~150", minimum=32, trained_on="LIVE", differentiable=True, gradient_step=0.5
    ),
    "brisque_matlab": replace(_NATURAL, minimum=32, trained_on="LIVE"),
    "nrqm": replace(_NATURAL, score_range="~0, ~10", lower_better=False, minimum=64, trained_on="Ma et al. 2017"),
    "pi": replace(_NATURAL, score_range="~0, ~", local=None, trained_on="Ma et al. 2017 and natural images"),
    "cnniqa": replace(_ABOUT_UNIT, minimum=7, local="params", trained_on="KonIQ-10k", channels_last=True),
    "wadiqam_nr": PyiqaFacts(score_range="~-1, ~0.1", minimum=33, local="params", trained_on="KonIQ-10k"),
    "uranker": PyiqaFacts(score_range="~-1, ~2", minimum=1, local="params", trained_on="URankerSet (underwater)"),
    "metaiqa": replace(_UNIT, minimum=1, local="bare", trained_on="TID2013 and KADID-10k"),
    "musiq": replace(_MUSIQ, trained_on="KonIQ-10k"),
    "musiq-ava": replace(_MUSIQ, score_range="1, 10", trained_on="AVA", options=(("num_class", 10),)),
    "musiq-paq2piq": replace(_MUSIQ, trained_on="PaQ-2-PiQ"),
    "musiq-spaq": replace(_MUSIQ, trained_on="SPAQ"),
    "nima": replace(_NIMA, score_range="0, 10", trained_on="AVA"),
    "nima-koniq": replace(_NIMA, trained_on="KonIQ-10k"),
    "nima-spaq": replace(_NIMA, trained_on="SPAQ"),
    "nima-vgg16-ava": replace(_NIMA, score_range="0, 10", trained_on="AVA", backbone="timm vgg16"),
    "paq2piq": PyiqaFacts(
        score_range="~0, ~100", local="bare", trained_on="PaQ-2-PiQ", backbone="torchvision resnet18"
    ),
    "dbcnn": replace(_ABOUT_UNIT, local="params", trained_on="KonIQ-10k", backbone="torchvision vgg16 and its SCNN"),
    "unique": PyiqaFacts(score_range="~-3, ~3", trained_on="six data sets mixed", backbone="torchvision resnet34"),
    "hyperiqa": replace(_ABOUT_UNIT, minimum=1, local="params", trained_on="KonIQ-10k", backbone="timm resnet50"),
    "maniqa": replace(_MANIQA, trained_on="KonIQ-10k"),
    "maniqa-pipal": replace(_MANIQA, trained_on="PIPAL"),
    "maniqa-kadid": replace(_MANIQA, trained_on="KADID-10k"),
    "tres": replace(_TRES, trained_on="KonIQ-10k"),
    "tres-flive": replace(_TRES, trained_on="FLIVE"),
    "topiq_nr": replace(_TOPIQ, trained_on="KonIQ-10k"),
    "topiq_nr-flive": replace(_TOPIQ, trained_on="FLIVE"),
    "topiq_nr-spaq": replace(_TOPIQ, trained_on="SPAQ"),
    "topiq_nr-face": replace(_FACE, trained_on="CGFIQA faces"),
    "topiq_nr-face-v1": _FACE,
    "topiq_nr_swin-face": replace(
        _FACE, trained_on="CGFIQA faces", backbone="timm swin_base_patch4_window12_384 and a face detector"
    ),
    "topiq_iaa": _IAA,
    "topiq_iaa_res50": replace(_IAA, backbone="timm resnet50"),
    "laion_aes": PyiqaFacts(
        score_range="~1, ~10", minimum=1, local="params", trained_on="SAC, Logos and AVA",
        backbone="OpenAI CLIP ViT-L/14",
    ),
    "clipiqa": _CLIPIQA,
    "clipiqa+": replace(_CLIPIQA, trained_on="KonIQ-10k"),
    "clipiqa+_vitL14_512": replace(_CLIPIQA, trained_on="KonIQ-10k"),
    "clipiqa+_rn50_512": replace(_CLIPIQA, trained_on="KonIQ-10k"),
    "liqe": replace(_LIQE, trained_on="KonIQ-10k"),
    "liqe_mix": replace(_LIQE, trained_on="six data sets mixed"),
    "maclip": replace(_CLIPIQA, minimum=224, batched=False),
    "qualiclip": replace(_CLIPIQA, trained_on="KADIS-700k"),
    "qualiclip+": replace(_CLIPIQA, trained_on="KonIQ-10k"),
    "qualiclip+-clive": replace(_CLIPIQA, trained_on="CLIVE"),
    "qualiclip+-flive": replace(_CLIPIQA, trained_on="FLIVE"),
    "qualiclip+-spaq": replace(_CLIPIQA, trained_on="SPAQ"),
    "afine_nr": PyiqaFacts(
        score_range="-2, 2", lower_better=True, differentiable=False, batched=False, trained_on="several data sets",
        local="file", backbone="OpenAI CLIP ViT-B/32",
    ),
    **{
        name: replace(_ARNIQA, trained_on=data)
        for name, data in {
            "arniqa": "KonIQ-10k", "arniqa-live": "LIVE", "arniqa-csiq": "CSIQ", "arniqa-tid": "TID2013",
            "arniqa-kadid": "KADID-10k", "arniqa-clive": "CLIVE", "arniqa-flive": "FLIVE", "arniqa-spaq": "SPAQ",
        }.items()
    },
    "qalign": _LARGE,
    "qalign_8bit": _LARGE,
    "qalign_4bit": _LARGE,
    "qrealign": replace(_LARGE, score_range="0, 1"),
    "qrealign-mini": replace(_LARGE, score_range="0, 1"),
    "qrealign-lite": replace(_LARGE, score_range="0, 1"),
    "qrealign-pro": replace(_LARGE, score_range="0, 1"),
    "compare2score": replace(_LARGE, score_range="0, 100"),
    "fgresq": replace(_UNIT, differentiable=False, trained_on="fine-grained restoration pairs", local="file"),
    "clipscore": PyiqaFacts(
        score_range="0, 2.5", trained_on="OpenAI's CLIP data",
        refused="compares an image with a caption; use the built-in type `clip_score`",
    ),
    "fid": _SETS,
    "sfid": _SETS,
    "fid_dinov2": replace(_SETS, trained_on="DINOv2's data"),
    "inception_score": replace(_SETS, lower_better=False),
}  # fmt: skip
"""All names in pyiqa 0.1.16's list of no-reference metrics."""


def facts_of(name: str) -> dict[str, Any]:
    """Return direction and range of a metric: pyiqa's own metadata if it is installed, else this table's."""
    facts = PYIQA[name]
    ours = {"lower_better": facts.lower_better, "score_range": facts.score_range}
    theirs = metadata().get(name, {})
    return ours | {key: theirs[key] for key in ours if key in theirs}


@functools.cache
def metadata() -> dict[str, dict[str, Any]]:
    """Return pyiqa's description of its metrics by name; empty if pyiqa is not installed.

    Read from its source file, because importing pyiqa takes seconds.
    """
    package = importlib.util.find_spec("pyiqa")
    folders = package.submodule_search_locations if package else None
    if not folders:
        return {}
    spec = importlib.util.spec_from_file_location("_pyiqa_metadata", Path(folders[0]) / "default_model_configs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.DEFAULT_CONFIGS)
