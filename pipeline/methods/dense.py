"""DenseCLIP as a segmenter: the training-free baseline beside a network, or alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from pipeline.engine.runtime import Runtime
from pipeline.formats.labels import LabelMap, label_map
from pipeline.methods.inputs import PredictionSettings, to_tensor
from pipeline.models.clip import ClipEncoder, label_embeddings, load_clip
from pipeline.models.dense.denseclip import DenseClip, label_and_confidence
from pipeline.params.sections import PseudoLabelParams
from pipeline.vocabulary.categories import unasked_names
from pipeline.vocabulary.prompts import templates


class Labeller:
    """DenseCLIP alone as a segmenter: label maps, no objects."""

    def __init__(
        self,
        encoder: ClipEncoder,
        text_embeddings: Tensor,
        *,
        categories: Sequence[str],
        background: Sequence[str],
        params: PseudoLabelParams,
        settings: PredictionSettings,
        runtime: Runtime,
    ) -> None:
        """Put the parts together; `Labeller.load` makes them.

        Args:
            encoder: on the device of `runtime`.
            text_embeddings: (1 + K, C) unit rows by label id, the background's first.
            categories: K names.
            background: names that label id 0 stands for.
            params: section `pseudo_label` of params.yaml.
            settings: size of the input, and whether a pixel may be background.
            runtime: device and precision.
        """
        self.categories = list(categories)
        self.background = list(background)
        self.params = params
        self._encoder = encoder
        self._text = text_embeddings
        self._settings = settings
        self._runtime = runtime
        self._first = 0 if settings.background else 1
        self._model = denseclip_for(encoder, text_embeddings[self._first :], params)

    @classmethod
    def load(
        cls,
        params: PseudoLabelParams,
        *,
        categories: Sequence[str],
        background: Sequence[str],
        settings: PredictionSettings,
        runtime: Runtime,
    ) -> Labeller:
        """Load the encoder of section `pseudo_label` and embed the names.

        As for a `Segmenter`, a name of the background that is asked for is none.

        Raises:
            PipelineError: an encoder that cannot be loaded, or a name that it does not know.
        """
        encoder = load_clip(
            params.encoder.model,
            params.encoder.pretrained,
            runtime.device,
            cache_dir=runtime.cache_dir,
        )
        background = unasked_names(background, categories)
        text = embed_labels(encoder, categories=categories, background=background, params=params)
        return cls(
            encoder,
            text,
            categories=categories,
            background=background,
            params=params,
            settings=settings,
            runtime=runtime,
        )

    def select(self, categories: Sequence[str]) -> Labeller:
        """A labeller for some of the categories, which shares the encoder.

        Raises:
            ValueError: one of them is not among `categories`.
        """
        rows = [0, *(1 + self.categories.index(name) for name in categories)]
        return Labeller(
            self._encoder,
            self._text[rows],
            categories=categories,
            background=self.background,
            params=self.params,
            settings=self._settings,
            runtime=self._runtime,
        )

    @torch.no_grad()
    def labels(self, image: Image.Image) -> LabelMap:
        """Label ids (H, W) of an RGB image, 0 is background."""
        pixels = to_tensor(image, self._settings, patch_size=self._encoder.patch_size)
        with self._runtime.autocast():
            scores = self._model(pixels[None].to(self._runtime.device)).float()
        labels, _ = label_and_confidence(scores, (image.height, image.width))
        return label_map(labels[0].cpu().numpy(), self._first)


def build_denseclip(
    encoder: ClipEncoder,
    *,
    categories: Sequence[str],
    background: Sequence[str],
    params: PseudoLabelParams,
) -> DenseClip:
    """DenseCLIP for a category list; label id 0 is the background."""
    text = embed_labels(encoder, categories=categories, background=background, params=params)
    return denseclip_for(encoder, text, params)


def embed_labels(
    encoder: ClipEncoder,
    *,
    categories: Sequence[str],
    background: Sequence[str],
    params: PseudoLabelParams,
) -> Tensor:
    """Unit text embeddings (1 + K, C) by label id, the background's first."""
    return label_embeddings(
        encoder,
        background=background,
        categories=categories,
        templates=templates(params.templates),
    )


def denseclip_for(encoder: ClipEncoder, text: Tensor, params: PseudoLabelParams) -> DenseClip:
    """DenseCLIP that tells the rows (K, C) of `text` apart."""
    return DenseClip(
        encoder,
        text,
        normalisation=params.normalisation,
        published_activation=params.published_activation,
        dense_attention=params.dense_attention,
        prompt_denoising=params.prompt_denoising,
        key_smoothing=params.key_smoothing,
        key_affinity=params.key_affinity,
        position_resize=params.position_resize,
        logit_scale=params.logit_scale,
    ).eval()
