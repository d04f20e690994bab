"""Backbones of DenseCLIP+: the published ResNetV1c, or any network of timm that gives maps.

All layers are trained, batch norms too. Letters: B batch, H W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from pipeline.errors import PipelineError, did_you_mean, first_line
from pipeline.models.weights.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pipeline.models.weights.weights import check_strict, load_strict, read_weights

BACKBONES = {"resnet50_v1c": "resnet50c", "resnet101_v1c": "resnet101c"}  # ours to timm's
TIMM = "timm:"
LOW_STRIDE = 4
OUTPUT_STRIDES = (8, 16, 32)
UNEVEN = (71, 105)  # of a probe: maps must come of sides that no stride divides
OPENMMLAB_STEM = {"stem.7.": "bn1.", "stem.": "conv1."}  # how its ResNetV1c differs from timm's
# On a CPU a step with depthwise convolutions takes less time in this layout, by a fifth and more.
CHANNELS_LAST = (EfficientNetFeatures, MobileNetV3Features)
# What timm raises where it has no maps, or takes no output stride.
TIMM_ERRORS = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)


class Backbone(nn.Module):
    """Two maps of an image: a fine one of simple features, and the last one.

    Attributes:
        name: as `build_backbone` takes it.
        low_channels: channels of the map at stride 4.
        channels: channels of the last map.
        strides: of the two maps, in pixels.
        trunk: timm's network, without its classifier.
    """

    def __init__(self, name: str, trunk: Any) -> None:
        super().__init__()
        self.name = name
        self.trunk = trunk
        strides = trunk.feature_info.reduction()
        if LOW_STRIDE not in strides:
            raise PipelineError(
                f"backbone: {name}: no map at stride {LOW_STRIDE}; its strides are {strides}"
            )
        self._low = len(strides) - 1 - strides[::-1].index(LOW_STRIDE)
        self.low_channels, self.channels = (
            trunk.feature_info.channels()[i] for i in (self._low, -1)
        )
        self.strides: tuple[int, int] = (LOW_STRIDE, strides[-1])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, H, W) -> (B, low_channels, H/4, W/4), (B, channels, h, w)."""
        maps = self.trunk(images)
        return maps[self._low], maps[-1]

    def extra_repr(self) -> str:
        """The name, for messages."""
        return self.name


def build_backbone(name: str, *, output_stride: int = 8) -> Backbone:
    """A backbone with fresh weights; nothing is downloaded.

    `resnet50_v1c` and `resnet101_v1c` are those of the published code: deep stem, stride on the
    3x3 convolution, and in place of the strides of the last two stages dilations 2 and 4, of which
    the first block of a stage has half. Fresh weights are Kaiming normal (fan-out) in both, with
    the last batch norm of a block at 0.

    Args:
        name: of `BACKBONES`, or `timm:NAME` for a network of timm that has `features_only`.
        output_stride: of the last map, 8, 16 or 32; timm's networks that cannot be dilated keep
            their own, see `strides`.

    Raises:
        PipelineError: unknown, without a map at stride 4, or without maps (B, C, h, w) of images
            of any size; or the stride is another.
    """
    if output_stride not in OUTPUT_STRIDES:
        raise PipelineError(f"output_stride: {output_stride}; expected one of {OUTPUT_STRIDES}")
    if name in BACKBONES:
        return Backbone(name, _features(BACKBONES[name], output_stride=output_stride))
    timm_name = _timm_name(name)
    try:
        trunk = _features(timm_name, output_stride=output_stride)
    except TIMM_ERRORS:  # it has no such option
        trunk = _built(name, timm_name)
    if isinstance(trunk, CHANNELS_LAST):
        trunk.to(memory_format=torch.channels_last)
    backbone = Backbone(name, trunk)
    _probe(backbone)
    return backbone


def _timm_name(name: str) -> str:
    """What timm calls a backbone.

    Raises:
        PipelineError: it is none of ours, and timm has no network of that name in it.
    """
    timm_name = BACKBONES.get(name, name.removeprefix(TIMM))
    if name not in BACKBONES and not (name.startswith(TIMM) and timm.is_model(timm_name)):
        known = [*BACKBONES, *(TIMM + other for other in timm.list_models())]
        raise PipelineError(
            f"backbone: {name!r}: {did_you_mean(name, known)}expected one of "
            f"{', '.join(BACKBONES)}, or {TIMM}NAME with a network of timm"
        )
    return timm_name


def _features(timm_name: str, **options: Any) -> Any:
    return timm.create_model(timm_name, pretrained=False, features_only=True, **options)


def _built(name: str, timm_name: str) -> Any:
    """The network at its own stride.

    Raises:
        PipelineError: timm has no maps of it.
    """
    try:
        return _features(timm_name)
    except TIMM_ERRORS as error:
        reason = first_line(error) or type(error).__name__
        raise PipelineError(f"backbone: {name}: timm has no maps of it ({reason})") from None


def _probe(backbone: Backbone) -> None:
    """Try a backbone on an image of uneven sides.

    Raises:
        PipelineError: it takes images of some sizes only, or has its channels last.
    """
    was_training = backbone.training
    try:
        with torch.no_grad():
            low, last = backbone.eval()(torch.zeros(1, 3, *UNEVEN))
    except TIMM_ERRORS as error:
        raise PipelineError(
            f"backbone: {backbone.name}: does not take images of any size "
            f"({first_line(error) or type(error).__name__})"
        ) from None
    finally:
        backbone.train(was_training)
    if low.shape[1] != backbone.low_channels or last.shape[1] != backbone.channels:
        raise PipelineError(f"backbone: {backbone.name}: its maps are not (B, C, h, w)")


def load_backbone(
    backbone: Backbone,
    path: Path,
    *,
    read: Callable[[Path], Mapping[str, Tensor]] = read_weights,
) -> None:
    """Load published weights into a backbone; those of the classifier are left out.

    Args:
        backbone: nothing in it changes where the file does not fit.
        path: a state dict in the names of timm, torchvision (plain ResNets) or OpenMMLab
            (ResNetV1c), all of them bare or all below one prefix, as `backbone.` or
            `visual.trunk.`; then what is beside the prefix is left out, too.
        read: what makes that state dict of the file.

    Raises:
        PipelineError: it cannot be read, or does not have what the backbone needs, and that alone;
            the message lists the tensors.
    """
    source = f"{path} (as {backbone.name})"
    load_strict(_trunk(backbone), _own_state(backbone, read(Path(path))), source)


def backbone_state(
    backbone: Backbone, state: Mapping[str, Tensor], source: Path | str
) -> dict[str, Tensor]:
    """What `load_backbone` takes of a state dict, under timm's names.

    Args:
        backbone: may be on "meta".
        state: see `load_backbone`.
        source: where `state` comes from, for the message.

    Raises:
        PipelineError: it does not fit.
    """
    own = _own_state(backbone, state)
    check_strict(_trunk(backbone), own, source)
    return own


def _trunk(backbone: Backbone) -> nn.Module:
    """The network whose names are those of timm's files: some are in a wrapper."""
    return cast(nn.Module, getattr(backbone.trunk, "model", backbone.trunk))


def _own_state(backbone: Backbone, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's part of a file, renamed, and what of the file has no place in its network."""
    expected = {_flat(name): name for name in _trunk(backbone).state_dict()}
    with torch.device("meta"):
        whole = timm.create_model(_timm_name(backbone.name), pretrained=False)
    left_out = whole.state_dict().keys() - expected.values()
    prefix = _common_prefix(state, expected)
    own = {}
    for name, value in state.items():
        if name.startswith(prefix):
            bare = _timm_layer(name.removeprefix(prefix), expected)
            own[expected.get(_flat(bare), bare)] = value
    own = {name: value for name, value in own.items() if name not in left_out}
    return _counters(own, expected.values()) | own


def _flat(name: str) -> str:
    """timm writes `stages_0.` in a network of maps for `stages.0.` in the whole one."""
    return name.replace("_", ".")


def _common_prefix(state: Mapping[str, Tensor], expected: Collection[str]) -> str:
    """The prefix below which most of the expected names are; none if there are none."""
    counts = Counter(
        name[:start] for name in state for start in _starts(name) if _flat(name[start:]) in expected
    )
    return max(counts, key=lambda prefix: counts[prefix], default="")


def _starts(name: str) -> Iterator[int]:
    """Where the parts of a dotted name begin."""
    yield 0
    yield from (index + 1 for index, letter in enumerate(name) if letter == ".")


def _timm_layer(name: str, expected: Collection[str]) -> str:
    """A name of OpenMMLab's ResNetV1c as timm's; others as they are."""
    if _flat(name) in expected:
        return name
    for theirs, ours in OPENMMLAB_STEM.items():
        renamed = ours + name.removeprefix(theirs)
        if name.startswith(theirs) and _flat(renamed) in expected:
            return renamed
    return name


def _counters(own: Collection[str], expected: Collection[str]) -> dict[str, Tensor]:
    """Zeros for the counters of batch norms, which old files lack; nothing needs them."""
    counters = (name for name in expected if name.endswith(".num_batches_tracked"))
    return {
        name: torch.tensor(0)
        for name in counters
        if name not in own and name.replace("num_batches_tracked", "running_mean") in own
    }


def backbone_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of R, G, B in [0, 1] that the published weights of a backbone expect.

    Raises:
        PipelineError: as `build_backbone`.
    """
    config = timm.get_pretrained_cfg(_timm_name(name))
    if config is None:
        return IMAGENET_MEAN, IMAGENET_STD
    return (*config.mean,), (*config.std,)
