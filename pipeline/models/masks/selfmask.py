"""SelfMask: one class-agnostic mask of the salient object of an image (Shin et al., 2022).

A DINO-style ViT encodes the image, a transformer decoder turns learned queries into mask
proposals, and an objectness head picks one of them. State-dict names are those of the published
checkpoints. Letters: B batch, L decoder layers, Q queries, D width, h w patch grid, N = h w
patches, H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.files import atomic_path, file_sha256, read_json, write_json
from pipeline.models.layers.decoder import Memory, TransformerDecoder
from pipeline.models.layers.perceptron import Perceptron
from pipeline.models.layers.vit import CLS_TOKENS, FEATURE_SCALE, SelfMaskConfig, ViTEncoder
from pipeline.models.masks.normalised_cut import further_settings, with_further_objects
from pipeline.models.weights.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pipeline.models.weights.weights import load_state, load_strict, save_tensors
from pipeline.models.weights.zoo import resolve_weights

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.methods.masks import SelfMaskParams

MAX_TOKENS = 16_384  # bound on what one image may cost: attention is quadratic in its area


@dataclass(frozen=True)
class SelfMaskOutput:
    """Mask proposals of every decoder layer; the last layer is the answer.

    Attributes:
        mask_logits: (B, L, Q, 2h, 2w) float32, over the image padded at the right and bottom to
            whole patches.
        objectness_logits: (B, L, Q) float32.
        cell_size: side in pixels of one cell of `mask_logits`.
    """

    mask_logits: Tensor
    objectness_logits: Tensor
    cell_size: int


class SelfMask(nn.Module):
    """The SelfMask network.

    Attributes:
        config: its geometry.
        mean, std: (1, 3, 1, 1) ImageNet statistics, applied in `forward`; not in the state dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: SelfMaskConfig | None = None) -> None:
        super().__init__()
        self.config = config or SelfMaskConfig()
        dim = self.config.dim
        self.query_embed = nn.Parameter(torch.empty(self.config.num_queries, dim).normal_())
        self.encoder = ViTEncoder(self.config)
        self.decoder = TransformerDecoder(
            dim, self.config.decoder_layers, self.config.num_heads, dim * self.config.mlp_ratio
        )
        self.ffn = Perceptron(dim, dim, dim, 1)  # objectness
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> SelfMaskOutput:
        """Propose masks for images (B, 3, H, W) in [0, 1], RGB, of any size.

        The decoder attends to the patch tokens as they are; only the masks use upsampled ones.
        """
        patch = self.config.patch_size
        tokens, grid = self._tokens(images)
        decoded = self.decoder(self.query_embed.expand(len(images), -1, -1), Memory(tokens))
        with torch.autocast(images.device.type, enabled=False):
            features = F.interpolate(
                tokens.float().transpose(1, 2).unflatten(2, grid),
                scale_factor=FEATURE_SCALE,
                mode="bilinear",
                align_corners=False,
            )
            mask_logits = torch.einsum("blqd,bdhw->blqhw", decoded.float(), features)
        return SelfMaskOutput(
            mask_logits=mask_logits,
            objectness_logits=self.ffn(decoded).squeeze(-1).float(),
            cell_size=patch // FEATURE_SCALE,
        )

    @torch.no_grad()
    def patch_features(self, images: Tensor) -> Tensor:
        """The encoder's output (B, D, h, w) for images (B, 3, H, W) in [0, 1], RGB."""
        tokens, grid = self._tokens(images)
        return tokens.transpose(1, 2).unflatten(2, grid)

    def _tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, h w, D) of the images, padded to whole patches, and their grid (h, w)."""
        patch = self.config.patch_size
        height, width = images.shape[-2:]
        padding = (0, -width % patch, 0, -height % patch)
        tokens = self.encoder(F.pad((images - self.mean) / self.std, padding))[:, CLS_TOKENS:]
        return tokens, (math.ceil(height / patch), math.ceil(width / patch))

    def extra_repr(self) -> str:
        """The geometry, for messages about weights that do not fit it."""
        return ", ".join(f"{name}={value}" for name, value in asdict(self.config).items())

    @torch.no_grad()
    def saliency(self, images: Tensor) -> Tensor:
        """Mask probabilities (B, H, W), float32, of each image's most object-like query.

        Args:
            images: (B, 3, H, W) in [0, 1], RGB.
        """
        output = self(images)
        best = output.objectness_logits[:, -1].argmax(dim=1)
        logits = output.mask_logits[torch.arange(len(images)), -1, best]
        probs = F.interpolate(
            logits.sigmoid()[:, None],
            scale_factor=output.cell_size,
            mode="bilinear",
            align_corners=False,
        )
        return probs[:, 0, : images.shape[-2], : images.shape[-1]]


def selfmask_loss(output: SelfMaskOutput, target_masks: Tensor) -> dict[str, Tensor]:
    """Training loss against one pseudo-mask per image.

    Close to section 3.3 of the paper, not equal to it. The target is averaged over the cells of
    the prediction, whose padding counts as background. For each image and decoder layer, on its
    own, the query with the lowest dice loss is matched with the target: bipartite matching with
    one object. The mask loss is dice plus binary cross-entropy of the matched query, averaged over
    images and layers; other queries are free. The objectness loss is binary cross-entropy between
    the objectness of *every* query and the soft IoU of its mask with the target, taken as a
    constant, so that the head ranks queries by quality (the paper ranks them by a hinge loss).

    Args:
        output: of the network in training, for B images.
        target_masks: (B, H, W) pseudo-masks, boolean or in [0, 1], of the size of the images.

    Returns:
        Scalars `mask`, `objectness` and their sum `total`.

    Raises:
        ValueError: the size of the targets is not that of the images.
    """
    target = _target_cells(output, target_masks)[:, None, None]  # (B, 1, 1, 2h, 2w)
    logits = output.mask_logits
    probs = logits.sigmoid()
    target_area = target.sum(dim=(-2, -1))
    probs_area = probs.sum(dim=(-2, -1))
    overlap = (probs * target).sum(dim=(-2, -1))
    dice = 1 - (2 * overlap + 1) / (probs_area + target_area + 1)  # (B, L, Q)
    matched = dice.argmin(dim=2, keepdim=True)
    matched_logits = logits.gather(2, matched[..., None, None].expand(-1, -1, 1, *logits.shape[3:]))
    cross_entropy = F.binary_cross_entropy_with_logits(
        matched_logits, target.expand_as(matched_logits)
    )
    mask_loss = dice.gather(2, matched).mean() + cross_entropy
    iou = (overlap / (probs_area + target_area - overlap).clamp(min=1e-6)).detach().clamp(0, 1)
    objectness_loss = F.binary_cross_entropy_with_logits(output.objectness_logits, iou)
    return {
        "mask": mask_loss,
        "objectness": objectness_loss,
        "total": mask_loss + objectness_loss,
    }


def _target_cells(output: SelfMaskOutput, target_masks: Tensor) -> Tensor:
    """(B, H, W) pixels -> (B, 2h, 2w) share of the target in each cell of the prediction."""
    cells = output.mask_logits.shape[-2:]
    height, width = target_masks.shape[-2:]
    padded_height, padded_width = (count * output.cell_size for count in cells)
    missing = (padded_height - height, padded_width - width)
    patch = output.cell_size * FEATURE_SCALE
    if not all(0 <= pad < patch for pad in missing):
        raise ValueError(
            f"targets of {height} x {width} pixels for masks over {padded_height} x {padded_width}"
        )
    padded = F.pad(target_masks.float(), (0, missing[1], 0, missing[0]))
    return F.avg_pool2d(padded[:, None], output.cell_size)[:, 0]


class SelfMaskSource:
    """SelfMask as a mask source, see `pipeline.methods.masks.MaskSource`."""

    def __init__(self, params: SelfMaskParams, runtime: Runtime) -> None:
        weights = resolve_weights(params.weights, runtime.cache_dir)
        self._model = load_selfmask(weights, runtime.device)
        self._runtime = runtime
        self._params = params
        self.threshold = params.threshold
        self.max_pixels = MAX_TOKENS * self._model.config.patch_size**2
        self.settings = {
            "source": params.source,
            "weights": file_sha256(weights),
            "architecture": asdict(self._model.config),
            "threshold": params.threshold,
            "precision": str(runtime.amp_dtype),
            **further_settings(params, runtime.seed),
        }

    def predict(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> probabilities (B, H, W) of the salient object."""
        with self._runtime.autocast():
            return self._model.saliency(images.to(self._runtime.device)).cpu()

    def predict_objects(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> probabilities (B, N, H, W), the salient object first."""
        salient = self.predict(images)
        if self._params.objects == 1:
            return salient[:, None]
        with self._runtime.autocast():
            features = self._model.patch_features(images.to(self._runtime.device))
        return with_further_objects(
            salient,
            features.float().cpu(),
            patch=self._model.config.patch_size,
            params=self._params,
            seed=self._runtime.seed,
            threshold=self.threshold,
        )


def load_selfmask(weights: Path, device: torch.device | str = "cpu") -> SelfMask:
    """Build SelfMask from a weights file, in evaluation mode.

    The geometry is that of `selfmask_nq20` unless a JSON file of the same name lies beside the
    weights: its key `architecture` then holds the fields of `SelfMaskConfig`.

    Args:
        weights: bare state dict (.safetensors, or the published .pt).
        device: where the network goes.

    Raises:
        PipelineError: the file is missing or of another architecture, or the JSON is wrong.
    """
    weights = Path(weights)
    model = SelfMask(_read_config(weights.with_suffix(".json")))
    load_strict(model, load_state(weights), str(weights))
    return model.to(device).eval()


def save_selfmask(model: SelfMask, weights: Path) -> None:
    """Write `weights` (.safetensors) and the JSON beside it, which `load_selfmask` reads.

    Args:
        model: the network.
        weights: file to write; its folder is made.
    """
    weights = Path(weights)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    with atomic_path(weights) as tmp_path:
        save_tensors(state, tmp_path)
    architecture = asdict(model.config)
    write_json(weights.with_suffix(".json"), {"architecture": architecture})


def _read_config(path: Path) -> SelfMaskConfig:
    if not path.exists():
        return SelfMaskConfig()
    content = read_json(path)
    architecture = content.get("architecture") if isinstance(content, dict) else None
    if not isinstance(architecture, dict):
        raise PipelineError(f"{path}: needs a key `architecture` with the fields of SelfMaskConfig")
    known = [field.name for field in fields(SelfMaskConfig)]
    unknown = sorted(architecture.keys() - set(known))
    if unknown:
        raise PipelineError(
            f"{path}: architecture: unknown {', '.join(unknown)}; known are {', '.join(known)}"
        )
    try:
        return SelfMaskConfig(**architecture)
    except ValueError as error:
        raise PipelineError(f"{path}: architecture: {error}") from None
