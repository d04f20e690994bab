"""Students: networks that learn from pseudo-labels, and then segment.

A new one is its network and a file that trains and runs it in a folder of `pipeline/models/`, and
here its params and an entry in `STUDENTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self

from pipeline.errors import PipelineError
from pipeline.formats.predictions import Segmentation
from pipeline.params.base import (
    Count,
    EncoderParams,
    NonNegative,
    NumWorkers,
    Positive,
    PredictionSettings,
    RelaxedPath,
    Templates,
)
from pipeline.training.settings import Composition, TargetSettings
from pipeline.vocabulary.categories import Names

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from pipeline.engine.runtime import Runtime
    from pipeline.models.weights.checkpoint import CheckpointConfig


class MicroBatch(NamedTuple):
    """Images that go through a network at once, on its device.

    Attributes:
        numbers: B numbers of training images.
        images: (B, 3, H, W) uint8, RGB.
        semantic_masks: (B, H, W) int16 label ids; IGNORE_INDEX is void.
        instance_masks: B boolean tensors (N, H, W).
    """

    numbers: list[int]
    images: Tensor
    semantic_masks: Tensor
    instance_masks: Sequence[Tensor]


class Student(Protocol):
    """A network under training.

    Attributes:
        config: what a checkpoint says of the network, representable in JSON: at least its
            `architecture`.
        fingerprint: of the weights that training starts from.
    """

    config: dict[str, Any]
    fingerprint: str

    @property
    def network(self) -> nn.Module:
        """Its parameters are trained; its state dict is the checkpoint's weights."""

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the parts of the loss."""

    def make_optimizer(self) -> Optimizer:
        """The optimizer over the parameters, in groups."""

    def set_learning_rates(self, optimizer: Optimizer, step: int) -> None:
        """Give every group its rate for update number `step`, counted from 0."""

    def count(self, batch: MicroBatch) -> Tensor:
        """What the parts of the loss are divided by, (len(losses),) int64; counts add up."""

    def loss(self, batch: MicroBatch, divisors: Tensor) -> Tensor:
        """The loss and its parts, (1 + len(losses),), divided by the counts of a whole batch."""


class TrainedStudent(Protocol):
    """A network that segments images by the names that it was loaded with.

    Attributes:
        patch_size: side in pixels of what one token stands for; no input is smaller.
    """

    patch_size: int

    @property
    def fingerprint(self) -> str:
        """Of what its names became; with the checkpoint it decides the predictions."""

    def select(self, label_ids: Sequence[int]) -> Self:
        """The same for some label ids, in this order, the background's first."""

    def predict(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        settings: PredictionSettings,
    ) -> list[Segmentation]:
        """Segment images (B, 3, H', W') in [0, 1]; predictions are of `sizes` (H, W)."""

    def protocol(self, settings: PredictionSettings) -> dict[str, Any]:
        """What decides a prediction, in the words of a protocol."""


class TrainParams(Composition, TargetSettings):
    """Stage 5: a student on the pseudo-labels, by the method that `student` names.

    `labels` is the folder of shards that the target is made of: that of the masks for `saliency`,
    that of the dense labels for the others. `templates` `name` embeds bare names, as the published
    code does; the paper's text says prompts.

    `batch_size` is that of an update of the weights, over all processes. `accumulate` takes it in
    so many parts, one after the other, which needs less memory and changes nothing but rounding.
    """

    student: str
    labels: RelaxedPath | None = None
    encoder: EncoderParams = EncoderParams()
    templates: Templates = "name"
    iterations: Count = 20_000
    batch_size: Count = 8
    accumulate: Count = 1
    workers: NumWorkers = 2
    log_every: Count = 20
    checkpoint_every: Count = 1000


class ZutisParams(TrainParams):
    """ZUTIS.

    `logit_scale` multiplies the cosines in the cross-entropy (1 as published). Three defaults are
    part of what published weights expect, and so of a checkpoint: inputs with ImageNet's
    `normalisation` where CLIP has its own (`clip`), positions resized by a factor slightly off
    (`position_resize` `scale`; `grid` is exact), and a layer norm of the projected tokens over the
    whole map (`token_norm` `map`; `token`: each by itself, `none`: as in CLIP).
    Encoders other than CLIP's own ViT and ResNet take their own statistics and exact positions.
    `mask_loss_reduction` `sum` adds up pairs and layers, as published; `mean` averages them.
    `matching` says where proposals and objects are compared before they are matched: at all
    `pixels`, as published, or, faster, at 64 x 64 random `points` or on the grid of the `tokens`.
    """

    student: Literal["zutis"] = "zutis"
    learning_rate: Positive = 5e-5
    encoder_learning_rate: Positive = 5e-6
    weight_decay: NonNegative = 0.05
    ce_weight: NonNegative = 1.0
    mask_weight: NonNegative = 1.0
    mask_loss_reduction: Literal["sum", "mean"] = "sum"
    matching: Literal["pixels", "points", "tokens"] = "pixels"
    logit_scale: Positive = 1.0
    stop_gradient: bool = True
    normalisation: Literal["imagenet", "clip"] = "imagenet"
    position_resize: Literal["scale", "grid"] = "scale"
    token_norm: Literal["map", "token", "none"] = "map"
    num_queries: Count = 100
    decoder_layers: Count = 6
    num_heads: Count = 8
    feedforward_dim: Count = 2048


@dataclass(frozen=True)
class StudentMethod:
    """An entry of `STUDENTS`.

    Attributes:
        params: the class of its params.
        train: makes a fresh one by these.
        load: makes a trained one from the folder of a checkpoint and what its config says.
        gives_objects: whether it predicts objects beside label maps.
    """

    params: type[TrainParams]
    train: Callable[[Any, Names, Runtime], Student]
    load: Callable[[Path, CheckpointConfig, Names, Runtime], TrainedStudent]
    gives_objects: bool


def _train_zutis(params: ZutisParams, names: Names, runtime: Runtime) -> Student:
    from pipeline.models.zutis.student import ZutisStudent

    return ZutisStudent(params, names, runtime)


def _load_zutis(
    folder: Path, config: CheckpointConfig, names: Names, runtime: Runtime
) -> TrainedStudent:
    from pipeline.models.zutis.predictor import load_zutis

    return load_zutis(folder, config, names, runtime)


STUDENTS = {
    "zutis": StudentMethod(ZutisParams, _train_zutis, _load_zutis, gives_objects=True),
}


def fresh_student(params: TrainParams, names: Names, runtime: Runtime) -> Student:
    """The student that the params are of, as training starts from it.

    Raises:
        PipelineError: an encoder that cannot be loaded or is too large for `crop_size`, or a name
            that it does not know.
    """
    return STUDENTS[params.student].train(params, names, runtime)


def trained_student(
    folder: Path, config: CheckpointConfig, names: Names, runtime: Runtime
) -> TrainedStudent:
    """The student of a checkpoint, with any names.

    Raises:
        PipelineError: weights of another architecture, a kind that is not known, an encoder that
            cannot be loaded, or a name that it does not know.
    """
    return student_of(folder, config).load(folder, config, names, runtime)


def student_of(folder: Path, config: CheckpointConfig) -> StudentMethod:
    """The entry of a checkpoint's kind.

    Raises:
        PipelineError: there is none.
    """
    if config.student not in STUDENTS:
        raise PipelineError(
            f"{folder}: its config.json says student: {config.student!r}; known are "
            f"{', '.join(STUDENTS)}"
        )
    return STUDENTS[config.student]
