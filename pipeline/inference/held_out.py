"""A further round: what it is made from, which images it trains on and which it is judged by."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from pipeline.engine.batching import slices
from pipeline.engine.progress import Tally
from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.files import digest
from pipeline.formats.decisions import Decisions, SampleDecisions
from pipeline.formats.images import load_image
from pipeline.formats.shards import SampleStore, open_samples
from pipeline.inference.prediction import Prediction
from pipeline.inference.segmenter import Segmenter
from pipeline.methods.students import TrainParams
from pipeline.params.base import PredictionSettings
from pipeline.params.sections import EvaluateParams, RoundParams
from pipeline.scoring.confusion import ConfusionMatrix
from pipeline.training.training_set import MASK_BYTES, MASK_MEMBERS, SAMPLE_BYTES, Archives

SHARE_DIGITS = 13  # hexadecimal ones, which a float holds


@dataclass(frozen=True)
class RoundInputs:
    """What a round is made from; picklable.

    Attributes:
        masks_dir: mask shards.
        labels_dir: label shards, where the target of `train` is made of them.
        categories: names by label id, from 1.
        params: the round's entry under `rounds`.
        targets: section `train`: what training saw of a sample.
        evaluate: section `evaluate`: how a student predicts.
        corrections_dir: masks that a person has corrected; None, or no such folder: none.
        review_path: what a person thinks of the labels (`pipeline.formats.review`); None: nothing.
    """

    masks_dir: Path
    labels_dir: Path | None
    categories: Sequence[str]
    params: RoundParams
    targets: TrainParams
    evaluate: EvaluateParams
    corrections_dir: Path | None = None
    review_path: Path | None = None

    @property
    def shard_dirs(self) -> list[Path]:
        """The folders of shards that are read."""
        return [self.masks_dir, *([self.needed_labels_dir] if self.needed_labels_dir else [])]

    @property
    def needed_labels_dir(self) -> Path | None:
        """`labels_dir`, if the target is made of dense labels."""
        return self.labels_dir if self.targets.needs_labels else None

    def open_samples(self) -> SampleStore:
        """The samples of the archives."""
        return open_samples(self.masks_dir, members=MASK_MEMBERS)

    def decided(self, store: SampleStore) -> SampleDecisions:
        """What a person has said of them."""
        decisions = Decisions.read(self.corrections_dir, self.review_path)
        return decisions.of_samples(store, self.categories)

    def archives(
        self, *, sample_bytes: int = SAMPLE_BYTES, mask_bytes: int = MASK_BYTES
    ) -> Archives:
        """The samples, decoded as training sees them, so many bytes of them in memory."""
        return Archives(
            self.masks_dir,
            self.needed_labels_dir,
            categories=self.categories,
            settings=self.targets,
            decisions=Decisions.read(self.corrections_dir, self.review_path),
            sample_bytes=sample_bytes,
            mask_bytes=mask_bytes,
        )

    def training(self, relabelled_dir: Path) -> TrainParams:
        """How the next student is trained: the labels are final, objects are told apart in them."""
        final = {"target": "denseclip", "split_components": False, "min_agreement": None}
        return self.targets.model_copy(update={**final, "labels": relabelled_dir})


@dataclass(frozen=True)
class Agreement:
    """How a student labels images that it has not seen.

    Attributes:
        miou: mean intersection over union with the pseudo-labels, in [0, 1], over the label ids
            that these have; one confusion matrix over all images, void left out.
        shares: (1 + K,) share of each label id among the student's pixels that are compared.
    """

    miou: float
    shares: np.ndarray

    def drift_from(self, other: Agreement) -> float:
        """Half the sum of the differences of the shares, in [0, 1]."""
        return float(np.abs(self.shares - other.shares).sum() / 2)


def split(
    store: SampleStore, share: float, *, seed: int, left_out: Collection[int] = ()
) -> tuple[list[int], list[int]]:
    """Numbers of the samples to train on, and of those held out, chosen by the image's bytes.

    An image in several archives is held out of all of them, or of none. Samples that are left out
    are in neither part, and change nothing of what becomes of the others.

    Raises:
        PipelineError: one of the two is empty.
    """
    parts: tuple[list[int], list[int]] = ([], [])
    for index in sorted({*range(len(store))}.difference(left_out)):
        image = sha256(store.member(index, "jpg")).hexdigest()
        drawn = int(digest([seed, image])[:SHARE_DIGITS], 16) / 16**SHARE_DIGITS
        parts[drawn < share].append(index)
    if not all(parts):
        none, count = "all are" if parts[1] else "none is", len(store) - len(left_out)
        raise PipelineError(
            f"rounds: held_out: {share:g} of {count} archive images: {none} held out; give "
            "another share, or more images (k)"
        )
    return parts


def load_trained(
    checkpoint_dir: Path,
    categories: Sequence[str],
    settings: PredictionSettings,
    runtime: Runtime,
) -> Segmenter:
    """The student of a checkpoint, which must know the categories by the same label ids.

    Raises:
        PipelineError: it does not, or cannot be loaded.
    """
    segmenter = Segmenter.load(checkpoint_dir, settings=settings, runtime=runtime)
    if segmenter.categories != list(categories):
        raise PipelineError(
            f"{checkpoint_dir}: trained with other categories than those of params.yaml; train "
            "again (dvc repro)"
        )
    return segmenter


def predictions(
    segmenter: Segmenter, store: SampleStore, numbers: Sequence[int], *, batch_size: int
) -> Iterator[tuple[int, Prediction]]:
    """What a student says of some samples, in order."""
    for part in slices(numbers, batch_size):
        images = [load_image(store.member(number, "jpg")) for number in part]
        yield from zip(part, segmenter.predict(images), strict=True)


def agreement(
    segmenter: Segmenter,
    archives: Archives,
    store: SampleStore,
    numbers: Sequence[int],
    *,
    batch_size: int,
    tally: Tally,
) -> Agreement:
    """Compare a student's label maps with the pseudo-labels of some samples.

    Args:
        segmenter: the student.
        archives: gives the pseudo-labels, as training sees them.
        store: the samples that `archives` are made of.
        numbers: which of them.
        batch_size: images at once.
        tally: counts them.

    Raises:
        PipelineError: all their pixels are void.
    """
    matrix = ConfusionMatrix(1 + len(segmenter.categories))
    for number, prediction in predictions(segmenter, store, numbers, batch_size=batch_size):
        target = np.asarray(archives[number].semantic, dtype=np.int16)
        matrix.update(target=target, prediction=prediction.semantic)
        tally.advance()
    total = matrix.counts.sum()
    if not total:
        raise PipelineError(
            f"rounds: held_out: all pixels of {len(numbers)} images are void: there is nothing to "
            "compare; raise held_out"
        )
    present = np.flatnonzero(matrix.counts.sum(axis=1)).tolist()
    return Agreement(matrix.compute(present).miou, matrix.counts.sum(axis=0) / total)
