"""Students: networks that learn from pseudo-labels, and then segment.

A new one is its network and a file that trains and runs it in a folder of `pipeline/models/`, and
here its params and an entry in `STUDENTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol, Self

from pydantic import BeforeValidator, model_validator

from pipeline.errors import PipelineError
from pipeline.formats.decisions import NOTHING_DECIDED, Decisions
from pipeline.formats.predictions import Segmentation
from pipeline.methods.dense import DenseClipParams, DenseClipRecipe
from pipeline.params.base import (
    Count,
    EncoderParams,
    NonNegative,
    NumWorkers,
    Positive,
    PredictionSettings,
    Probability,
    RelaxedPath,
    Section,
    Templates,
    Text,
)
from pipeline.params.benches import TrainingDataParams
from pipeline.params.sources import SourceParams
from pipeline.training.settings import Augmentation, Composition, TargetSettings
from pipeline.vocabulary.categories import Names

if TYPE_CHECKING:
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
    def milestones(self) -> Mapping[int, str]:
        """Updates of the weights -> folder, in that of the checkpoint, of the one kept then."""

    @property
    def network(self) -> nn.Module:
        """Its parameters are trained; its state dict is the checkpoint's weights."""

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the parts of the loss, and of what is watched beside them."""

    def make_optimizer(self) -> Optimizer:
        """The optimizer over the parameters, in groups."""

    def set_learning_rates(self, optimizer: Optimizer, step: int) -> None:
        """Give every group its rate for update number `step`, counted from 0."""

    def count(self, batch: MicroBatch) -> Tensor:
        """What the parts of the loss are divided by, (len(losses),) int64; counts add up."""

    def loss(self, batch: MicroBatch, divisors: Tensor) -> Tensor:
        """The loss and its parts, (1 + len(losses),), divided by the counts of a whole batch.

        A part is NaN in a step in which it is not measured.
        """

    def has_drifted(self, rows: Sequence[tuple[int, Sequence[float]]]) -> str | None:
        """Why training should end here, with the checkpoint of the last milestone; None: go on.

        `rows` are the updates at which something was logged, and what: as `loss` gives it, means.
        """


class TrainingData(Protocol):
    """Training images by number: image (H, W, 3) uint8, labels (H, W) int16, masks (N, H, W) bool.

    Number i is a pure function of the seed and i.
    """

    @property
    def counts(self) -> Mapping[str, int]:
        """What the stage counts of them."""

    @property
    def warnings(self) -> Sequence[str]:
        """What is odd about them."""

    @property
    def fingerprint(self) -> Any:
        """Of what they are made from, representable in JSON."""

    def skipped(self) -> Iterable[tuple[str, str]]:
        """Name and reason of what could not be read so far."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> tuple[Any, Any, Any]: ...


class TrainingInputs(NamedTuple):
    """What training data are made from.

    Attributes:
        masks_dir: mask shards.
        labels_dir: label shards, if the params need any.
        names: categories and background.
        length: number of training images.
        runtime: its seed is that of all draws.
        decisions: what a person has said of images of the masks' archives.
    """

    masks_dir: Path
    labels_dir: Path | None
    names: Names
    length: int
    runtime: Runtime
    decisions: Decisions = NOTHING_DECIDED


class TrainedStudent(Protocol):
    """A network that segments images by the names that it was loaded with.

    Attributes:
        patch_size: side in pixels of what one token stands for; no input is smaller.
        logit_scale: factor of the scores in their softmax, as it was trained.
    """

    patch_size: int
    logit_scale: float

    @property
    def network(self) -> nn.Module:
        """What several of these may share, whatever their names."""

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

    def scores(self, images: Tensor) -> Tensor:
        """Logits (B, 1 + K, h, w) float32 of images (B, 3, H', W') in [0, 1], by label id."""

    def protocol(self, settings: PredictionSettings) -> dict[str, Any]:
        """What decides a prediction, in the words of a protocol."""

    def graph(self) -> StudentGraph:
        """Network and text as one function of tensors, for export; PipelineError where not."""


class StudentGraph(Protocol):
    """A module (`nn.Module`) in evaluation mode, whose trace is right for images of any size.

    It is called with images, text or None for its own, and what `settings` names.

    Attributes:
        outputs: names of what it returns, and of their axes, see `pipeline.formats.onnx_graph`.
        settings: names of further inputs: scalars.
        text: (1 + K, C) its own.
        takes_text: whether other text makes a difference.
        mean, std: of R, G, B in [0, 1]: what it does to images first.
        smallest: side in pixels below which the graph takes no image.
    """

    outputs: Mapping[str, tuple[str, ...]]
    settings: tuple[str, ...]
    text: Tensor
    takes_text: bool
    mean: list[float]
    std: list[float]
    smallest: int

    def __call__(self, images: Tensor, text: Tensor | None, *settings: Tensor) -> Any:
        """Its outputs, alone or a tuple of them."""


class StudentParams(Section):
    """Stage 5: a student on the pseudo-labels, by the method that `student` names.

    `labels` is the folder that its labels come from: of shards, or of data with truth. It is what
    DVC watches. `templates` `name` embeds bare names, as ZUTIS's published code does; the paper's
    text says prompts.

    `batch_size` is that of an update of the weights, over all processes. `accumulate` takes it in
    so many parts, one after the other, which needs less memory and changes nothing but rounding,
    unless batch norms are trained: those see a part.
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

    @property
    def needs_labels(self) -> bool:
        """Whether label shards are read."""
        raise NotImplementedError

    @property
    def targets(self) -> TargetSettings:
        """What training sees of an archive's sample."""
        raise NotImplementedError


class TrainParams(Composition, TargetSettings, StudentParams):
    """A student of archive samples that are pasted together, as ZUTIS's.

    `labels` is that of the masks for the target `saliency`, that of the dense labels for the
    others and with `min_agreement`.
    """

    @property
    def targets(self) -> TargetSettings:
        return self


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


def _on_or_off(value: Any) -> Any:
    """YAML 1.1, which some tools write, reads `on` and `off` as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class DenseClipPlusParams(Augmentation, StudentParams):
    """DenseCLIP+: any segmentation network, taught by DenseCLIP (DenseCLIP paper, 3.4).

    `backbone` is `resnet50_v1c`, `resnet101_v1c` (OpenMMLab's) or `timm:NAME`, which starts from
    `backbone_weights`, a file or a name of `pipeline weights list`; null is random. `head` gives it
    features as wide as the text embeddings of `encoder`, the CLIP that guides.

    `data` is `archives`, whose images have no truth, or an entry as under `index:`, which has none
    either, or as under `benches:`, with truth. `setting` says how much of that is read:
    `annotation_free` nothing; `zero_shot` all but the categories of `unseen`, whose pixels are
    labelled by DenseCLIP; `adapted` the same, where they stay void; `supervised` everything.
    The `classifier` is the `text` embeddings, or `learned`. `background` is its row for label id 0:
    `learned`, from true background alone, since DenseCLIP never says it; the text of the `names` of
    the background, which DenseCLIP may say then; or `none`.

    `unlabelled` are more images, of a source as under `index:`, beside those with truth.

    DenseCLIP labels, as `guide` says, the image that the student sees (`teacher` `online`, as
    published), or label shards are read (`stored`). After `guided_iterations` the student labels
    for itself where `self_training` is `on`; `until_drift` ends that when the shares of the
    categories among its labels are further than `drift_tolerance` (half the sum of differences)
    from those at the switch: the paper has no rule. `loss_average` `all` divides the loss by all
    pixels, as the published code does, `counted` by those that are not void. Training fails if more
    than `max_error_rate` of the images, and more than one, cannot be read.
    """

    student: Literal["denseclip_plus"] = "denseclip_plus"
    templates: Templates = "prompts85"
    backbone: str = "resnet101_v1c"
    backbone_weights: Text | None = "resnet101_v1c"
    head: Literal["deeplabv2", "deeplabv3plus", "pspnet", "lraspp"] = "deeplabv2"
    output_stride: Literal[8, 16, 32] = 8
    data: TrainingDataParams = "archives"
    unlabelled: SourceParams | None = None
    setting: Literal["annotation_free", "zero_shot", "adapted", "supervised"] = "annotation_free"
    unseen: list[Text] = []
    classifier: Literal["text", "learned"] = "text"
    background: Literal["none", "learned", "names"] = "none"
    guide: DenseClipRecipe = DenseClipRecipe()
    teacher: Literal["online", "stored"] = "online"
    confidence_threshold: Probability = 0.0
    guided_iterations: Count = 2000
    self_training: Annotated[Literal["on", "off", "until_drift"], BeforeValidator(_on_or_off)] = (
        "off"
    )
    drift_tolerance: Probability = 0.3
    loss_average: Literal["all", "counted"] = "all"
    max_error_rate: Probability = 0.01
    batch_size: Count = 16
    learning_rate: Positive = 0.01
    final_learning_rate: NonNegative = 1e-4
    weight_decay: NonNegative = 5e-4

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what contradicts itself."""
        has_truth = not isinstance(self.data, str | SourceParams)
        needs_truth = self.setting != "annotation_free"
        if needs_truth and not has_truth:
            raise ValueError(
                f"setting {self.setting} reads true masks: give data as under `benches:`, such as "
                "{format: voc, root: ...}, or take setting annotation_free"
            )
        if self.unseen and self.setting not in ("zero_shot", "adapted"):
            raise ValueError(f"setting {self.setting} has no unseen categories")
        if self.setting in ("zero_shot", "adapted") and not self.unseen:
            raise ValueError(f"setting {self.setting} needs the names of unseen categories")
        if self.background == "learned" and self.setting == "annotation_free":
            raise ValueError("background learned needs true background: setting has none")
        if self.unlabelled and (self.setting in ("adapted", "supervised") or not has_truth):
            raise ValueError(
                f"unlabelled stands beside truth, and setting {self.setting} learns it"
            )
        if self.teacher == "stored" and self.data != "archives":
            raise ValueError(
                "teacher stored reads label shards, which are of archives: set data: archives, or "
                "teacher: online"
            )
        if self.classifier == "learned" and self.setting != "supervised":
            raise ValueError("classifier learned is for setting supervised")
        if not isinstance(self.data, str) and Path(str(self.labels)) != Path(str(self.data.root)):
            raise ValueError(
                f"labels: {self.labels} must be data.root: {self.data.root}, for DVC watches labels"
            )
        if self.crop_size < self.output_stride:
            raise ValueError(
                f"crop_size: {self.crop_size} is less than a cell of the last map, output_stride: "
                f"{self.output_stride}"
            )
        if self.self_training != "off" and self.guided_iterations >= self.iterations:
            raise ValueError(
                f"self_training: {self.self_training} begins after guided_iterations: "
                f"{self.guided_iterations}, of iterations: {self.iterations}"
            )
        if self.self_training != "off" and self.setting not in ("annotation_free", "zero_shot"):
            raise ValueError(f"setting {self.setting} leaves nothing to label for oneself")
        return self

    @property
    def labeller(self) -> DenseClipParams:
        """DenseCLIP as it guides."""
        return DenseClipParams(
            encoder=self.encoder, templates=self.templates, **self.guide.model_dump()
        )

    @property
    def needs_labels(self) -> bool:
        return self.teacher == "stored"

    @property
    def targets(self) -> TargetSettings:
        return TargetSettings(target="denseclip")


@dataclass(frozen=True)
class StudentMethod:
    """An entry of `STUDENTS`.

    Attributes:
        params: the class of its params.
        data: makes its training images by these.
        train: makes a fresh one by these.
        load: makes a trained one from the folder of a checkpoint and what its config says.
        gives_objects: whether it predicts objects beside label maps.
    """

    params: type[StudentParams]
    data: Callable[[Any, TrainingInputs], TrainingData]
    train: Callable[[Any, Names, Runtime], Student]
    load: Callable[[Path, CheckpointConfig, Names, Runtime], TrainedStudent]
    gives_objects: bool


def pasted_samples(params: TrainParams, inputs: TrainingInputs) -> TrainingData:
    """Samples of the archives, pasted together (ZUTIS paper, 3.2)."""
    from pipeline.training.training_set import Archives, TrainingSet

    archives = Archives(
        inputs.masks_dir,
        inputs.labels_dir,
        categories=inputs.names.categories,
        settings=params,
        decisions=inputs.decisions,
    )
    return TrainingSet(archives, params, seed=inputs.runtime.seed, length=inputs.length)


def _whole_images(params: DenseClipPlusParams, inputs: TrainingInputs) -> TrainingData:
    from pipeline.benchmarks.opening import open_truth
    from pipeline.training.images import (
        AnnotatedPool,
        ArchivePool,
        JointPool,
        PlusSet,
        Pool,
        SourcePool,
    )

    data, names = params.data, inputs.names
    pool: Pool
    if isinstance(data, str):
        pool = ArchivePool(
            inputs.masks_dir,
            inputs.labels_dir if params.needs_labels else None,
            categories=names.categories,
            background=params.background != "none",
            confidence_threshold=params.confidence_threshold,
            decisions=inputs.decisions,
        )
    elif isinstance(data, SourceParams):
        pool = SourcePool("train.data", data, field="train.data")
    else:
        pool = AnnotatedPool(
            open_truth(data, names.background, field="train.data"),
            categories=names.categories,
            unseen=params.unseen,
            background=params.background != "none",
            truth=params.setting,
        )
    if params.unlabelled is not None:
        field = "train.unlabelled"
        pool = JointPool([pool, SourcePool(field, params.unlabelled, field=field)])
    return PlusSet(
        pool,
        params,
        seed=inputs.runtime.seed,
        length=inputs.length,
        max_error_rate=params.max_error_rate,
    )


def _train_zutis(params: ZutisParams, names: Names, runtime: Runtime) -> Student:
    from pipeline.models.zutis.student import ZutisStudent

    return ZutisStudent(params, names, runtime)


def _load_zutis(
    folder: Path, config: CheckpointConfig, names: Names, runtime: Runtime
) -> TrainedStudent:
    from pipeline.models.zutis.predictor import load_zutis

    return load_zutis(folder, config, names, runtime)


def _train_plus(params: DenseClipPlusParams, names: Names, runtime: Runtime) -> Student:
    from pipeline.models.clip import load_clip
    from pipeline.models.dense.denseclip import DenseClip
    from pipeline.models.plus.student import fresh_plus

    encoder = load_clip(
        params.encoder, runtime.device, cache_dir=runtime.cache_dir, field="train.encoder"
    )
    return fresh_plus(
        params,
        names,
        encoder,
        make_teacher=lambda text: DenseClip(encoder, text, params.labeller).eval(),
        runtime=runtime,
    )


def _load_plus(
    folder: Path, config: CheckpointConfig, names: Names, runtime: Runtime
) -> TrainedStudent:
    from pipeline.models.plus.predictor import load_plus

    return load_plus(folder, config, names, runtime)


STUDENTS = {
    "zutis": StudentMethod(
        ZutisParams, pasted_samples, _train_zutis, _load_zutis, gives_objects=True
    ),
    "denseclip_plus": StudentMethod(
        DenseClipPlusParams, _whole_images, _train_plus, _load_plus, gives_objects=False
    ),
}


def training_data(params: StudentParams, inputs: TrainingInputs) -> TrainingData:
    """The training images of the student that the params are of.

    Raises:
        PipelineError: there are none, or they do not fit the params.
    """
    return STUDENTS[params.student].data(params, inputs)


def fresh_student(params: StudentParams, names: Names, runtime: Runtime) -> Student:
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
