"""ZUTIS under training, see `pipeline.methods.students.Student`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from pipeline.errors import PipelineError
from pipeline.files import digest
from pipeline.formats.labels import IGNORE_INDEX
from pipeline.models.clip import ClipEncoder, load_clip
from pipeline.models.clip.labels import label_embeddings
from pipeline.models.zutis.build import build_zutis
from pipeline.models.zutis.losses import mask_loss, num_counted, num_pairs, semantic_loss
from pipeline.models.zutis.schedule import param_groups, set_learning_rates
from pipeline.vocabulary.prompts import templates

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.methods.students import MicroBatch, ZutisParams
    from pipeline.vocabulary.categories import Names


class ZutisStudent:
    """A fresh ZUTIS around an encoder, with the text embeddings of its names."""

    losses = ("semantic", "mask")
    milestones: Mapping[int, str] = MappingProxyType({})

    def __init__(self, params: ZutisParams, names: Names, runtime: Runtime) -> None:
        clip = load_clip(
            params.encoder, runtime.device, cache_dir=runtime.cache_dir, field="train.encoder"
        )
        if params.crop_size < clip.patch_size:
            raise PipelineError(
                f"train.crop_size: {params.crop_size} is less than one patch of "
                f"{params.encoder.model} ({clip.patch_size} pixels)"
            )
        self._params = params
        self._runtime = runtime
        self._text_embeddings = label_embeddings(clip, names, templates(params.templates))
        architecture = _architecture(params, clip)
        self.config: dict[str, Any] = {
            "architecture": architecture,
            "logit_scale": params.logit_scale,
        }
        self.fingerprint = clip.fingerprint()
        network = build_zutis(clip.visual.requires_grad_(True), **architecture)
        self.network = network.to(runtime.device).train()

    def make_optimizer(self) -> Optimizer:
        """AdamW, the encoder with a rate of its own."""
        params = self._params
        groups = param_groups(
            self.network,
            lr=params.learning_rate,
            encoder_lr=params.encoder_learning_rate,
            weight_decay=params.weight_decay,
        )
        return AdamW(groups, fused=True)

    def set_learning_rates(self, optimizer: Optimizer, step: int) -> None:
        """The poly schedule (ZUTIS paper, section 4.1)."""
        set_learning_rates(optimizer, step, self._params.iterations)

    def count(self, batch: MicroBatch) -> Tensor:
        """Pixels that count, and pairs of proposals and objects, or images: (2,) int64."""
        pixels = num_counted(batch.semantic_masks, ignore_index=IGNORE_INDEX)
        if self._params.mask_loss_reduction == "mean":
            pairs = num_pairs(
                batch.instance_masks,
                num_layers=self._params.decoder_layers,
                num_queries=self._params.num_queries,
            )
        else:
            pairs = torch.tensor(len(batch.numbers)).to(pixels.device, non_blocking=True)
        return torch.stack((pixels, pairs))

    def loss(self, batch: MicroBatch, divisors: Tensor) -> Tensor:
        """Total, semantic and mask loss of a micro-batch, stacked: (3,)."""
        params = self._params
        with self._runtime.autocast():
            output = self.network(batch.images / 255)
        semantic = semantic_loss(
            output.patch_tokens,
            self._text_embeddings,
            batch.semantic_masks,
            logit_scale=params.logit_scale,
            ignore_index=IGNORE_INDEX,
            divisor=divisors[0],
        )
        mask = mask_loss(
            output.mask_probs,
            batch.instance_masks,
            reduction=params.mask_loss_reduction,
            matching=params.matching,
            divisor=divisors[1],
            generators=_generators(batch.numbers, seed=self._runtime.seed),
        )
        total = params.ce_weight * semantic + params.mask_weight * mask
        return torch.stack((total, semantic, mask))

    def has_drifted(self, rows: Sequence[tuple[int, Sequence[float]]]) -> None:
        """Never: its labels stay what they are."""


def _generators(numbers: list[int], *, seed: int) -> list[torch.Generator]:
    """A generator for each training image, whoever computes its loss."""
    seeds = [int(digest([seed, number])[:15], 16) for number in numbers]
    return [torch.Generator().manual_seed(value) for value in seeds]


def _architecture(params: ZutisParams, clip: ClipEncoder) -> dict[str, Any]:
    """The arguments of `build_zutis` beside the encoder."""
    mean, std = clip.statistics(params.normalisation)
    return {
        "num_queries": params.num_queries,
        "decoder_layers": params.decoder_layers,
        "num_heads": params.num_heads,
        "feedforward_dim": params.feedforward_dim,
        "stop_gradient": params.stop_gradient,
        "mean": mean,
        "std": std,
        "position_resize": params.position_resize,
        "token_norm": params.token_norm,
    }
