"""A trained DenseCLIP+, see `pipeline.methods.students.TrainedStudent`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import PipelineError, first_line
from pipeline.formats.labels import LabelMap
from pipeline.formats.predictions import Segmentation
from pipeline.models.clip import ClipEncoder
from pipeline.models.clip.checkpoint import checkpoint_clip, frozen_clip
from pipeline.models.clip.crop_names import CropNamer
from pipeline.models.layers.pixels import labels_of_pixels
from pipeline.models.layers.regions import labels_of_regions, regions_protocol
from pipeline.models.plus.graph import PlusGraph
from pipeline.models.plus.network import PlusNetwork, build_plus
from pipeline.models.plus.student import LABEL_0
from pipeline.models.weights.checkpoint import CONFIG_NAME, WEIGHTS_NAME, CheckpointConfig
from pipeline.models.weights.weights import hash_tensors, load_state, load_strict
from pipeline.params.base import PredictionSettings

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.vocabulary.categories import Names

IMPOSSIBLE = -1e4  # a logit; finite, so that it can be interpolated


def load_plus(
    folder: Path, config: CheckpointConfig, names: Names, runtime: Runtime
) -> PlusPredictor:
    """The network of a checkpoint, with any names unless its classifier is learned.

    Raises:
        PipelineError: weights or settings of another architecture, an encoder that cannot be
            loaded, a name that it does not know, or that a learned classifier does not.
    """
    architecture = dict(config.architecture)
    label_0 = architecture.pop(LABEL_0, "none")
    try:
        network = build_plus(**architecture)
    except (TypeError, PipelineError) as error:
        raise PipelineError(f"{folder / CONFIG_NAME}: architecture: {first_line(error)}") from None
    load_strict(network, load_state(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME)
    _, text = checkpoint_clip(folder, config, names, runtime)
    if text.shape[1] != architecture["channels"]:
        raise PipelineError(
            f"{folder / CONFIG_NAME}: encoder: its text embeddings are {text.shape[1]} wide, "
            f"but the network was trained with {architecture['channels']}"
        )
    rows = None
    if network.classifier is not None:
        rows = _learned_rows(folder, config, names, has_background=label_0 != "none")
    return PlusPredictor(
        network.to(runtime.device).eval(),
        text.to(runtime.device),
        label_ids=list(range(len(text))),
        label_0=label_0,
        rows=rows,
        architecture=architecture,
        runtime=runtime,
        frozen=frozen_clip(folder, config, runtime),
    )


def _learned_rows(
    folder: Path, config: CheckpointConfig, names: Names, *, has_background: bool
) -> list[int]:
    """Row of a learned classifier by label id of the names; that of label id 0 may be none, -1."""
    if unknown := [name for name in names.categories if name not in config.categories]:
        raise PipelineError(
            f"{folder}: its classifier is learned and knows no {unknown[0]!r}; it knows "
            f"{', '.join(config.categories)}"
        )
    first = 0 if has_background else -1
    return [first, *(1 + first + config.categories.index(name) for name in names.categories)]


class PlusPredictor:
    """A segmentation network with the text embeddings of some names.

    Args:
        network: on the device of `runtime`, in eval mode.
        text: (1 + K, C) unit rows by label id of the names, the background's first.
        label_ids: those that are asked for; predictions number them from 0 on.
        label_0: what answers for label id 0: `none`, `learned` or `names`.
        rows: row of a learned classifier by label id, in place of text.
        architecture: what the network was built with.
        runtime: device and precision.
        frozen: gives the encoder that the text is of, for `crop_names`.
    """

    patch_size = 1
    logit_scale = 1.0  # features are as long as their logits need

    def __init__(
        self,
        network: PlusNetwork,
        text: Tensor,
        *,
        label_ids: Sequence[int],
        label_0: str,
        rows: Sequence[int] | None,
        architecture: Mapping[str, Any],
        runtime: Runtime,
        frozen: Callable[[], ClipEncoder],
    ) -> None:
        self._network = network
        self._text = text
        self._label_ids = list(label_ids)
        self._label_0 = label_0
        self._rows = rows
        self._architecture = architecture
        self._runtime = runtime
        self._frozen = frozen

    @property
    def network(self) -> PlusNetwork:
        """It, in eval mode."""
        return self._network

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the text embeddings."""
        hasher = hashlib.sha256()
        hash_tensors(hasher, {"text": self._text[self._label_ids]})
        return hasher.hexdigest()

    def select(self, label_ids: Sequence[int]) -> PlusPredictor:
        """The same for some label ids, in this order, the background's first."""
        return PlusPredictor(
            self._network,
            self._text,
            label_ids=[self._label_ids[number] for number in label_ids],
            label_0=self._label_0,
            rows=self._rows,
            architecture=self._architecture,
            runtime=self._runtime,
            frozen=self._frozen,
        )

    @torch.no_grad()
    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], settings: PredictionSettings
    ) -> list[Segmentation]:
        """Label maps at `sizes` (H, W) of images (B, 3, H', W') in [0, 1]; no objects."""
        first = 0 if settings.background and self._label_0 != "none" else 1
        images = images.to(self._runtime.device)
        logits = self._logits(images, first)
        if settings.flip:
            logits = (logits + self._logits(images.flip(-1), first).flip(-1)) / 2
        return [
            Segmentation(self._label_map(one[None], image[None], size, first, settings), [])
            for one, image, size in zip(logits, images, sizes, strict=True)
        ]

    def _label_map(
        self,
        logits: Tensor,
        image: Tensor,
        size: tuple[int, int],
        first: int,
        settings: PredictionSettings,
    ) -> LabelMap:
        """Of one image (1, 3, H', W')."""
        labels = labels_of_pixels(
            logits,
            image,
            size,
            scale=self.logit_scale,
            settings=settings,
            has_background=first == 0,
            through=settings.through(image.shape[-2:]),
        )
        found = labels_of_regions(labels[0], first, settings)
        if settings.crop_names is None:
            return found
        text = self._text[self._label_ids[1:]]
        namer = CropNamer(self._frozen, self.scores, text, self.logit_scale, settings.crop_names)
        return namer.relabelled(found, logits[0, 1 - first :], image[0])

    def graph(self) -> PlusGraph:
        """See `pipeline.methods.students.TrainedStudent`."""
        label_ids = list(range(len(self._label_ids)))
        rows = None if self._rows is None else [self._rows[i] for i in self._label_ids]

        def scores(images: Tensor, text: Tensor) -> Tensor:
            return PlusPredictor(
                self._network,
                text,
                label_ids=label_ids,
                label_0=self._label_0,
                rows=rows,
                architecture=self._architecture,
                runtime=self._runtime,
                frozen=self._frozen,
            ).scores(images)

        return PlusGraph(self._network, self._text[self._label_ids], scores)

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Logits (B, 1 + K, h, w) float32 of images (B, 3, H', W') in [0, 1], by label id.

        Where nothing answers for label id 0, it is next to impossible.
        """
        if self._label_0 != "none":
            return self._logits(images, 0)
        return F.pad(self._logits(images, 1), (0, 0, 0, 0, 1, 0), value=IMPOSSIBLE)

    def _logits(self, images: Tensor, first: int) -> Tensor:
        """Logits (B, K', h, w) of the label ids that are asked for, from number `first` on."""
        asked = self._label_ids[first:]
        if self._rows is not None:
            return self._classified(images, self._text)[:, [self._rows[i] for i in asked]]
        if self._label_0 != "learned":
            return self._classified(images, self._text[asked])
        return self._classified(images, self._text[self._label_ids[1:]])[:, first:]

    def _classified(self, images: Tensor, text: Tensor) -> Tensor:
        with self._runtime.autocast():
            return self._network.classify(images.to(self._runtime.device), text)

    def protocol(self, settings: PredictionSettings) -> dict[str, Any]:
        """The architecture, and what regions take."""
        architecture = {f"network_{name}": value for name, value in self._architecture.items()}
        return {
            **architecture,
            "network_label_0": self._label_0,
            **regions_protocol(settings),
        }
