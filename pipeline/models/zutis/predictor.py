"""A trained ZUTIS, see `pipeline.methods.students.TrainedStudent`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import PipelineError, first_line
from pipeline.formats.labels import LabelMap
from pipeline.formats.predictions import Instance, Segmentation
from pipeline.models.clip import ClipEncoder
from pipeline.models.clip.checkpoint import checkpoint_clip, frozen_clip
from pipeline.models.clip.crop_names import CropNamer, no_encoder
from pipeline.models.layers.pamr import refined
from pipeline.models.layers.pixels import check_joint_foreground, labels_of_pixels
from pipeline.models.layers.regions import labels_of_regions, regions_protocol
from pipeline.models.weights.checkpoint import CONFIG_NAME, WEIGHTS_NAME, CheckpointConfig
from pipeline.models.weights.weights import hash_tensors, load_state, load_strict
from pipeline.models.zutis.build import build_zutis
from pipeline.models.zutis.graph import ZutisGraph
from pipeline.models.zutis.network import Zutis
from pipeline.models.zutis.postprocess import (
    instance_predictions,
    semantic_logits,
    semantic_prediction,
)
from pipeline.params.base import CropNamesParams, PredictionSettings

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.vocabulary.categories import Names


def load_zutis(
    folder: Path, config: CheckpointConfig, names: Names, runtime: Runtime
) -> ZutisPredictor:
    """The network of a checkpoint, with any names.

    Raises:
        PipelineError: weights or settings of another architecture, an encoder that cannot be
            loaded, or a name that it does not know.
    """
    clip, text = checkpoint_clip(folder, config, names, runtime)
    try:
        network = build_zutis(clip.visual, **config.architecture)
    except (TypeError, PipelineError) as error:
        raise PipelineError(f"{folder / CONFIG_NAME}: architecture: {first_line(error)}") from None
    load_strict(network, load_state(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME)
    return ZutisPredictor(
        network.to(runtime.device),
        text,
        architecture=config.architecture,
        runtime=runtime,
        logit_scale=config.logit_scale,
        frozen=frozen_clip(folder, config, runtime),
    )


class ZutisPredictor:
    """A ZUTIS network with the text embeddings of some names.

    Args:
        network: on the device of `runtime`.
        text_embeddings: (1 + K, C) unit rows by label id, the background's first.
        architecture: what the network was built with.
        runtime: device and precision.
        logit_scale: factor of the cosines in their softmax.
        frozen: gives the encoder as it was before training, for `crop_names`.
    """

    def __init__(
        self,
        network: Zutis,
        text_embeddings: Tensor,
        *,
        architecture: Mapping[str, Any],
        runtime: Runtime,
        logit_scale: float = 1.0,
        frozen: Callable[[], ClipEncoder] = no_encoder,
    ) -> None:
        self.patch_size: int = network.tower.patch_size
        self._network = network.eval()
        self._text = text_embeddings.to(runtime.device)
        self.logit_scale = logit_scale
        self._architecture = architecture
        self._runtime = runtime
        self._frozen = frozen

    @property
    def network(self) -> Zutis:
        """It, in eval mode."""
        return self._network

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the text embeddings."""
        hasher = hashlib.sha256()
        hash_tensors(hasher, {"text": self._text})
        return hasher.hexdigest()

    def select(self, label_ids: Sequence[int]) -> ZutisPredictor:
        """The same for some label ids, in this order, the background's first."""
        return ZutisPredictor(
            self._network,
            self._text[list(label_ids)],
            architecture=self._architecture,
            runtime=self._runtime,
            logit_scale=self.logit_scale,
            frozen=self._frozen,
        )

    @torch.no_grad()
    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], settings: PredictionSettings
    ) -> list[Segmentation]:
        """Predictions at `sizes` (H, W) of images (B, 3, H', W') in [0, 1].

        Raises:
            PipelineError: `joint_foreground` with a scale at which nothing could be background.
        """
        if settings.joint_foreground and settings.background:
            check_joint_foreground(self._text, self.logit_scale)
        images = images.to(self._runtime.device)
        mask_probs, patch_tokens = self._see(images)
        if settings.flip:
            # Of what is no whole patch the network leaves out the right of the one and the left of
            # the other: their mean lies nearer to the truth than either, which is stretched.
            mirrored = self._see(images.flip(-1))[1].flip(2)
            patch_tokens = F.normalize(patch_tokens + mirrored, dim=-1)
        return [
            Segmentation(
                self._label_map(tokens, image, size, settings),
                self._instances(probs, tokens, image, size, settings) if settings.instances else [],
            )
            for probs, tokens, image, size in zip(
                mask_probs, patch_tokens, images, sizes, strict=True
            )
        ]

    def _see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Proposals (B, Q, h, w) of the last decoder layer, and patch tokens (B, h, w, C)."""
        with self._runtime.autocast():
            output = self._network(images)
        return output.mask_logits[:, -1].float().sigmoid(), output.patch_tokens.float()

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Cosines (B, 1 + K, h, w) of the tokens of images (B, 3, H', W') in [0, 1], float32."""
        with self._runtime.autocast():
            output = self._network(images.to(self._runtime.device))
        return semantic_logits(output.patch_tokens.float(), self._text)

    def graph(self) -> ZutisGraph:
        """See `pipeline.methods.students.TrainedStudent`."""
        return ZutisGraph(self._network, self._text)

    def protocol(self, settings: PredictionSettings) -> dict[str, Any]:
        """The architecture, and how proposals become objects."""
        return {
            **{f"network_{name}": value for name, value in self._architecture.items()},
            "threshold": settings.threshold,
            "temperature": settings.temperature,
            "suppression": settings.suppression,
            "score_resolution": settings.score_resolution,
            **regions_protocol(settings),
        }

    def _label_map(
        self,
        patch_tokens: Tensor,
        image: Tensor,
        size: tuple[int, int],
        settings: PredictionSettings,
    ) -> LabelMap:
        first = 0 if settings.background else 1
        tokens, text = patch_tokens[None], self._text[first:]
        if settings.pamr is None and not settings.joint_foreground:
            semantic = semantic_prediction(tokens, text, size)
        else:
            semantic = labels_of_pixels(
                semantic_logits(tokens, text),
                image[None],
                size,
                scale=self.logit_scale,
                settings=settings,
                has_background=settings.background,
            )
        labels = labels_of_regions(semantic[0], first, settings)
        if settings.crop_names is None:
            return labels
        scores = semantic_logits(tokens, self._text[1:])[0]
        return self._namer(settings.crop_names).relabelled(labels, scores, image)

    def _namer(self, params: CropNamesParams) -> CropNamer:
        return CropNamer(self._frozen, self.scores, self._text[1:], self.logit_scale, params)

    def _instances(
        self,
        mask_probs: Tensor,
        patch_tokens: Tensor,
        image: Tensor,
        size: tuple[int, int],
        settings: PredictionSettings,
    ) -> list[Instance]:
        pamr = settings.pamr
        finer = None if pamr is None else refined(mask_probs[None], image[None], pamr)[0]
        named = None
        if settings.crop_names is not None:
            namer = self._namer(settings.crop_names)
            named = partial(namer.label_ids, image)
        return instance_predictions(
            mask_probs,
            patch_tokens,
            self._text,
            size,
            threshold=settings.threshold,
            temperature=settings.temperature,
            suppression=settings.suppression,
            score_resolution=settings.score_resolution,
            refined_probs=finer,
            name_regions=named,
        )
