"""A CLIP with its preprocessing: images and texts to one embedding space.

Letters: B images, N texts, T context length, C joint embedding, D tower width, S input side,
h x w patch grid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from pipeline.models.clip.features import square_side
from pipeline.models.clip.names import NAMES_FIELD, resolve_name
from pipeline.models.clip.timm_towers import use_fast_layout
from pipeline.models.clip.tokenizer import Tokenizer
from pipeline.models.clip.tower import DenseTower, Facet
from pipeline.models.clip.towers import dense_tower
from pipeline.models.weights.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pipeline.models.weights.weights import hash_tensors


class ClipEncoder(nn.Module):
    """A frozen CLIP in float32: images and texts to one embedding space.

    Attributes:
        clip: the open_clip model, in evaluation mode.
        preprocess: PIL image -> (3, S, S) float in [0, 1]: open_clip's evaluation transform
            (resized and cropped as its weights' tag says; without one, bicubic resize of the short
            side and centre crop) short of the normalisation.
        embed_dim: C.
        image_size: S.
        tokenizer: of the text tower.
        source: where the configuration comes from, for messages.
        mean, std: (1, 3, 1, 1) buffers, applied by every method that takes images in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        clip: nn.Module,
        *,
        config: dict[str, Any],
        preprocess: PreprocessCfg,
        tokenizer: Tokenizer,
        source: str = "this encoder",
    ) -> None:
        super().__init__()
        self.source = source
        self.clip: Any = clip.eval().requires_grad_(False)
        use_fast_layout(self.visual)
        self.config = config
        self.embed_dim: int = config["embed_dim"]
        self.image_size = square_side(preprocess.size)
        statistics = (tuple(preprocess.mean), tuple(preprocess.std))
        openai = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        self._has_own_statistics = "preprocess" not in config and statistics != openai
        self._geometry = [preprocess.resize_mode, preprocess.interpolation, preprocess.fill_color]
        self.preprocess: Callable[[Image.Image], Tensor] = _transform(preprocess)
        self.tokenizer = tokenizer
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1), False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1), False)

    @property
    def visual(self) -> nn.Module:
        """The image tower."""
        return cast(nn.Module, self.clip.visual)

    @cached_property
    def tower(self) -> DenseTower:
        """The image tower as a map of features and a head; `embed` and `retrieve` need none.

        Raises:
            PipelineError: it has no map.
        """
        return dense_tower(self.visual)

    @property
    def patch_size(self) -> int:
        """Pixels, along a side, that a position of the tower's map stands for (ResNets: 32)."""
        return self.tower.patch_size

    @property
    def logit_scale(self) -> Tensor:
        """Factor of cosines in CLIP's softmax, already exponentiated; a scalar."""
        return cast(Tensor, self.clip.logit_scale.detach().exp().reshape(()))

    def statistics(
        self, normalisation: Literal["imagenet", "clip"]
    ) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of R, G, B in [0, 1] for dense features.

        The papers' code took ImageNet's where CLIP has its own. What it did not know gets its own
        always, which may be far from ImageNet's: other towers (SigLIP, MobileCLIP), and the tags
        of a CLIP that were not trained with OpenAI's.
        """
        if normalisation == "clip" or not self.tower.published or self._has_own_statistics:
            return self.mean.flatten().tolist(), self.std.flatten().tolist()
        return list(IMAGENET_MEAN), list(IMAGENET_STD)

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> the network's input."""
        return (images - self.mean) / self.std

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] -> unit embeddings (B, C), float32."""
        return F.normalize(self.clip.encode_image(self.normalise(images)).float(), dim=-1)

    def known_names(self, names: Sequence[str], *, field: str = NAMES_FIELD) -> list[str]:
        """The names as this encoder knows them; a CLIP knows every name as it stands.

        Args:
            names: as they were written.
            field: where they come from, for the message.

        Raises:
            PipelineError: the encoder has a closed list of names, and one is not in it.
        """
        known = self.config.get("names")
        if known is None:
            return list(names)
        return [resolve_name(name, known, source=self.source, field=field) for name in names]

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> token ids (N, T), int64, as the text tower expects them.

        Raises:
            PipelineError: a word lies outside the vocabulary that the weights were cut to.
        """
        return self.tokenizer(list(texts))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Texts -> raw text features (N, C), float32, not normalised."""
        features = [
            self.clip.encode_text(tokens.to(self.mean.device)).float()
            for tokens in self.tokenize(texts).split(batch)
        ]
        return torch.cat(features)

    @torch.no_grad()
    def patch_features(self, images: Tensor, *, layer: int = -1, facet: Facet = "key") -> Tensor:
        """Features of the patches of images of any size, for clustering.

        The input is zero-padded right and bottom (after normalisation) to a multiple of the patch
        size; position embeddings are resized to the grid.

        Args:
            images: (B, 3, H, W) in [0, 1].
            layer: block of a ViT; for other networks, one of their stages.
            facet: "token": output of that block; "key", "value": its attention keys or values, all
                heads side by side (for CLIP's ResNet, those of the attention pooling, last stage
                only). A network without attention gives its output for each.

        Returns:
            (B, D, h, w), with h = ceil(H / patch), w = ceil(W / patch), but for earlier
            stages, whose maps are finer.

        Raises:
            PipelineError: there is no such layer, or the tower has no map.
        """
        return self.tower.patch_features(self.normalise(images), layer=layer, facet=facet)

    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights: changes whenever results may change."""
        hasher = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        hash_tensors(hasher, self.state_dict())
        hasher.update(json.dumps([self.mean.tolist(), self.std.tolist()]).encode())
        hasher.update(json.dumps(self._geometry).encode())
        return hasher.hexdigest()


def _transform(preprocess: PreprocessCfg) -> Callable[[Image.Image], Tensor]:
    settings = {**vars(preprocess), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return image_transform_v2(PreprocessCfg(**settings), is_train=False)  # type: ignore[no-any-return]
