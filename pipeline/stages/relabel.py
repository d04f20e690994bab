"""A further round, first half: a trained student labels the archive images anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.engine.dry_run import DryRun
from pipeline.engine.progress import Tally
from pipeline.engine.runtime import Runtime
from pipeline.engine.shard_run import Executor, Job, run_job
from pipeline.files import file_sha256
from pipeline.formats.dense_labels import CONFIDENCE, LABEL
from pipeline.formats.images import encode_label, encode_png
from pipeline.formats.labels import BACKGROUND, IGNORE_INDEX
from pipeline.formats.objects import MAX_OBJECTS, encode_objects
from pipeline.formats.shards import read_manifest, write_tar
from pipeline.inference.held_out import RoundInputs, load_trained, predictions, split
from pipeline.inference.segmenter import Prediction
from pipeline.models.weights.checkpoint import WEIGHTS_NAME
from pipeline.params.base import PredictionSettings
from pipeline.training.relabelling import relabel
from pipeline.training.settings import TargetSettings

RELABEL_VERSION = 2  # to be raised with every change after which the same settings label otherwise


def run(
    inputs: RoundInputs,
    *,
    out_dir: Path,
    runtime: Runtime,
    stats_path: Path,
    executor: Executor | DryRun | None = None,
) -> None:
    """Write shards that are mask and label shards in one, of all samples that are not held out.

    Their labels are final: training takes them as they are, by the target `denseclip`. Samples of
    archive 0, the negatives, stay what they are; an image that a person has corrected has what that
    says, and a sample whose labels are rejected is left out. The stats count `student_objects`,
    `pseudo_objects`, `pixels` and `void_pixels`, and where there are some, `corrected` samples.

    Args:
        inputs: what the round is made from.
        out_dir: shards, replaced as a whole.
        runtime: device, precision and seed.
        stats_path: counts of this run, JSON.
        executor: where shards are made; here by default.

    Raises:
        PipelineError: shards that do not fit the params, a checkpoint that cannot be used or has
            other categories, a share that holds out nothing or everything, or a damaged correction
            or review.
    """
    store = inputs.open_samples()
    decided = inputs.decided(store)
    numbers, held_out = split(
        store, inputs.params.held_out, seed=runtime.seed, left_out=decided.left_out
    )
    rejected = {"rejected image": len(decided.left_out)} if decided.left_out else {}
    job = Job(
        "relabel",
        numbers,
        shard_size=inputs.params.shard_size,
        load=partial(Relabeller, inputs),
        inputs=[*map(read_manifest, inputs.shard_dirs), *decided.fingerprint],
        remedy="Run the mask stage again",
        left_out={"held-out image": len(held_out), **rejected},
        warnings=decided.warnings,
    )
    run_job(job, out_dir=out_dir, stats_path=stats_path, runtime=runtime, executor=executor)


class Relabeller:
    """Makes shards of images with what a trained student and their pseudo-labels say of them.

    Args:
        inputs: see `run`.
        runtime: see `run`.

    Attributes:
        settings: all that labels depend on besides the samples; representable in JSON.
    """

    def __init__(self, inputs: RoundInputs, runtime: Runtime) -> None:
        categories, params, targets = list(inputs.categories), inputs.params, inputs.targets
        settings = PredictionSettings.of(inputs.evaluate)
        self._segmenter = load_trained(params.after, categories, settings, runtime)
        self._store = inputs.open_samples()
        self._archives = inputs.archives(sample_bytes=0, mask_bytes=0)
        self._params = params
        self._num_categories = len(categories)
        self.settings: dict[str, Any] = {
            "version": RELABEL_VERSION,
            "categories": categories,
            "checkpoint": file_sha256(params.after / WEIGHTS_NAME),
            "score_threshold": params.score_threshold,
            "target": targets.model_dump(mode="json", include=set(TargetSettings.model_fields)),
            "prediction": settings.model_dump(mode="json"),
            "precision": str(runtime.amp_dtype or torch.float32).removeprefix("torch."),
        }

    def make(self, items: Sequence[int], path: Path, tally: Tally) -> int:
        """Write the samples of these numbers."""
        return write_tar(path, self._samples(items, tally))

    def close(self) -> None:
        """Nothing is held open."""

    def _samples(self, numbers: Sequence[int], tally: Tally) -> Iterator[dict[str, Any]]:
        asked = [number for number in numbers if self._is_open(number)]
        found = predictions(self._segmenter, self._store, asked, batch_size=self._params.batch_size)
        for number in numbers:
            prediction = next(found)[1] if self._is_open(number) else None
            yield self._sample(number, prediction, tally)
            tally.advance()

    def _is_open(self, number: int) -> bool:
        """Whether it is for the student to say what a sample shows: no negative, not corrected."""
        return (
            number not in self._archives.decided.corrected
            and self._store.json(number)["label_id"] != BACKGROUND
        )

    def _sample(self, number: int, prediction: Prediction | None, tally: Tally) -> dict[str, Any]:
        """The members of a sample; what is not open has no prediction."""
        stored, sample = self._store[number], self._archives[number]
        labels = sample.semantic
        if prediction is None:
            num_objects = min(sample.num_instances, MAX_OBJECTS)
            masks = sample.instances == np.arange(1, num_objects + 1)[:, None, None]
            if number in self._archives.decided.corrected:
                tally.count("corrected")
        else:
            threshold = self._params.score_threshold
            kept = [it for it in prediction.instances if it.score >= threshold][:MAX_OBJECTS]
            new = relabel(sample.semantic, sample.instances, prediction.semantic, kept)
            labels, masks = new.semantic, new.masks[:MAX_OBJECTS]
            tally.count("student_objects", new.num_kept)
            tally.count("pseudo_objects", len(masks) - new.num_kept)
        tally.count("pixels", labels.size)
        tally.count("void_pixels", int(np.count_nonzero(labels == IGNORE_INDEX)))
        return {
            "__key__": stored["__key__"],
            "jpg": stored["jpg"],
            "mask.png": encode_objects(masks),
            LABEL: encode_label(labels, self._num_categories),
            CONFIDENCE: encode_png(np.full(labels.shape, 255, dtype=np.uint8)),
            "json": stored["json"],
        }
