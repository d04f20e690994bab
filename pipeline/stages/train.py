"""Stage 5: label shards -> trained ZUTIS checkpoint and loss curves."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from dvclive import Live
from scmrepo.exceptions import SCMError
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.data.labels import IGNORE_INDEX
from pipeline.data.prompts import templates
from pipeline.data.training_set import Archives, Batch, Composition, TrainingSet, collate
from pipeline.errors import PipelineError
from pipeline.files import check_writable
from pipeline.models.build import WEIGHTS_NAME, build_zutis, save_checkpoint
from pipeline.models.clip import ClipEncoder, label_embeddings, load_clip
from pipeline.models.losses import mask_loss, semantic_loss
from pipeline.models.schedule import param_groups, set_learning_rates
from pipeline.models.zutis import IMAGENET_MEAN, IMAGENET_STD, Zutis
from pipeline.params import TrainParams
from pipeline.runtime import Runtime, StageRun


def run(
    *,
    labels_dir: Path,
    out_dir: Path,
    live_dir: Path,
    stats_path: Path,
    categories: list[str],
    background: list[str],
    params: TrainParams,
    runtime: Runtime,
) -> None:
    """Train ZUTIS on pseudo-labels (ZUTIS paper, 3.2 to 4.1).

    On the CPU, the same inputs and seed give the same bytes, whatever the number of workers.

    Args:
        labels_dir: Label shards of the pseudo-label stage.
        out_dir: Folder of the checkpoint: model.safetensors and config.json, rewritten whole every
            `checkpoint_every` iterations and at the end.
        live_dir: DVCLive's folder: metrics.json and plots/metrics/*.tsv.
        stats_path: Counts of the stage.
        categories: Names by label id, from 1.
        background: Names whose mean is the text embedding of label id 0.
        params: Section `train`.
        runtime: Device, precision, seed.

    Raises:
        PipelineError: the shards do not fit the params, or training diverges.
    """
    check_writable(Path(out_dir) / WEIGHTS_NAME)
    torch.manual_seed(runtime.seed)
    with StageRun(
        "train", stats_path=stats_path, total=params.iterations, unit="iteration"
    ) as stage:
        archives = _open_archives(labels_dir, categories, params=params, stage=stage)
        batches = _batches(archives, params=params, runtime=runtime)
        model, text_embeddings, architecture = _load_model(
            categories, background, params=params, runtime=runtime
        )
        config = _checkpoint_config(
            categories, background, architecture=architecture, params=params, seed=runtime.seed
        )
        optimizer = _make_optimizer(model, params)
        with _open_live(live_dir) as live:
            log = _LossLog(live, stage, batch_size=params.batch_size, device=runtime.device)
            for step, batch in enumerate(batches, start=1):
                set_learning_rates(optimizer, step - 1, params.iterations)
                losses = _losses(
                    model, batch, text_embeddings, params=params, runtime=runtime, step=step
                )
                optimizer.zero_grad()
                losses[0].backward()
                optimizer.step()
                log.add(losses)
                saves = step == params.iterations or step % params.checkpoint_every == 0
                if saves or step % params.log_every == 0:
                    log.write(step, learning_rate=optimizer.param_groups[-1]["lr"])
                if saves:
                    save_checkpoint(out_dir, model, {**config, "step": step})
                stage.advance()


class _LossLog:
    """Means of the losses since the last line, to DVCLive and the progress bar."""

    def __init__(
        self, live: Live, stage: StageRun, *, batch_size: int, device: torch.device
    ) -> None:
        self._live = live
        self._stage = stage
        self._batch_size = batch_size
        self._totals = torch.zeros(3, device=device)
        self._restart()

    def _restart(self) -> None:
        self._totals.zero_()
        self._num_summed, self._since = 0, time.monotonic()

    def add(self, losses: Tensor) -> None:
        """Take in total, semantic and mask loss (3,) of one step, without waiting for them."""
        self._totals += losses.detach()
        self._num_summed += 1

    def write(self, step: int, *, learning_rate: float) -> None:
        """Log the means; reading them makes the CPU wait for the device.

        Raises:
            PipelineError: the loss is no longer finite.
        """
        means = (self._totals / self._num_summed).tolist()
        _check_finite(means[0], step)
        self._live.step = step
        for name, value in zip(("loss", "semantic", "mask"), means, strict=True):
            self._live.log_metric(f"train/{name}", value)
        self._live.log_metric("train/learning_rate", learning_rate)
        rate = self._num_summed * self._batch_size / (time.monotonic() - self._since)
        self._stage.postfix(f"loss {means[0]:.3f}, {rate:.0f} images/s")
        self._restart()


def _open_archives(
    labels_dir: Path, categories: list[str], *, params: TrainParams, stage: StageRun
) -> Archives:
    """The archives of the label shards, counted."""
    archives = Archives(
        labels_dir,
        categories=categories,
        target=params.target,
        confidence_threshold=params.confidence_threshold,
        conflict=params.conflict,
        split_components=params.split_components,
    )
    stage.count("archive_images", sum(len(part) for part in archives.objects.values()))
    stage.count("negatives", len(archives.negatives))
    stage.count("empty_masks", archives.num_empty)
    return archives


def _make_optimizer(model: Zutis, params: TrainParams) -> torch.optim.Optimizer:
    groups = param_groups(
        model,
        lr=params.learning_rate,
        encoder_lr=params.encoder_learning_rate,
        weight_decay=params.weight_decay,
    )
    return torch.optim.AdamW(groups, fused=True)


def _open_live(live_dir: Path) -> Live:
    """A logger that writes below `live_dir` only: no experiment, no dvc.yaml, no report."""
    try:
        return Live(str(live_dir), save_dvc_exp=False, dvcyaml=None, report=None)
    except SCMError as error:
        raise PipelineError(
            f"{live_dir}: DVCLive cannot use the git repository around it ({error}); "
            "make a first commit"
        ) from None


def _losses(
    model: Zutis,
    batch: Batch,
    text_embeddings: Tensor,
    *,
    params: TrainParams,
    runtime: Runtime,
    step: int,
) -> Tensor:
    """Total, semantic and mask loss of a batch, stacked: (3,)."""
    device = runtime.device
    images = batch.images.to(device, non_blocking=True).permute(0, 3, 1, 2) / 255
    semantic_masks = batch.semantic_masks.to(device, non_blocking=True)
    instance_masks = batch.instance_masks.to(device, non_blocking=True).split(batch.num_instances)
    with runtime.autocast():
        output = model(images)
    semantic = semantic_loss(
        output.patch_tokens,
        text_embeddings,
        semantic_masks,
        logit_scale=params.logit_scale,
        ignore_index=IGNORE_INDEX,
    )
    try:
        mask = mask_loss(
            output.mask_probs,
            instance_masks,
            reduction=params.mask_loss_reduction,
            matching=params.matching,
        )
    except PipelineError as error:
        raise PipelineError(f"step {step}: {error}") from None
    total = params.ce_weight * semantic + params.mask_weight * mask
    return torch.stack((total, semantic, mask))


def _batches(archives: Archives, *, params: TrainParams, runtime: Runtime) -> Iterable[Batch]:
    composition = Composition(
        crop_size=params.crop_size,
        scale_range=(params.scale_range[0], params.scale_range[1]),
        flip=params.flip,
        colour_jitter=params.colour_jitter,
        greyscale=params.greyscale,
        blur=params.blur,
        max_paste=params.max_paste,
        same_archive=params.same_archive,
        negative_canvas=params.negative_canvas,
        keep_last_row_column=params.keep_last_row_column,
    )
    length = params.iterations * params.batch_size
    return DataLoader(
        TrainingSet(archives, composition, seed=runtime.seed, length=length),
        batch_size=params.batch_size,
        num_workers=params.workers,
        collate_fn=collate,
        pin_memory=runtime.device.type == "cuda",
        generator=torch.Generator().manual_seed(runtime.seed),
    )


def _load_model(
    categories: list[str], background: list[str], *, params: TrainParams, runtime: Runtime
) -> tuple[Zutis, Tensor, dict[str, Any]]:
    """A fresh ZUTIS around the encoder, text embeddings (1 + K, C) by label id, architecture."""
    clip = load_clip(
        params.encoder.model,
        params.encoder.pretrained,
        runtime.device,
        cache_dir=runtime.cache_dir,
    )
    if params.crop_size < clip.patch_size:
        raise PipelineError(
            f"train.crop_size: {params.crop_size} is less than one patch of "
            f"{params.encoder.model} ({clip.patch_size} pixels)"
        )
    text_embeddings = label_embeddings(
        clip, background=background, categories=categories, templates=templates(params.templates)
    )
    architecture = _architecture(params, clip)
    model = build_zutis(clip.visual.requires_grad_(True), **architecture)
    return model.to(runtime.device).train(), text_embeddings, architecture


def _architecture(params: TrainParams, clip: ClipEncoder) -> dict[str, Any]:
    """The arguments of `build_zutis` beside the encoder."""
    own = params.normalisation == "clip"
    return {
        "num_queries": params.num_queries,
        "decoder_layers": params.decoder_layers,
        "num_heads": params.num_heads,
        "feedforward_dim": params.feedforward_dim,
        "stop_gradient": params.stop_gradient,
        "mean": clip.mean.flatten().tolist() if own else list(IMAGENET_MEAN),
        "std": clip.std.flatten().tolist() if own else list(IMAGENET_STD),
        "position_resize": params.position_resize,
        "token_norm": params.token_norm,
    }


def _checkpoint_config(
    categories: list[str],
    background: list[str],
    *,
    architecture: dict[str, Any],
    params: TrainParams,
    seed: int,
) -> dict[str, Any]:
    """What a checkpoint says of itself; `step` comes at saving."""
    return {
        "architecture": architecture,
        "encoder": params.encoder.model_dump(mode="json"),
        "categories": categories,
        "background": background,
        "templates": params.templates,
        "logit_scale": params.logit_scale,
        "seed": seed,
        "train": params.model_dump(mode="json"),
    }


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise PipelineError(
            f"train: the loss is {loss} at step {step}: training has diverged; lower "
            "train.learning_rate, train.encoder_learning_rate or train.logit_scale"
        )
