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
from pipeline.models.clip import label_embeddings, load_clip
from pipeline.models.losses import mask_loss, semantic_loss
from pipeline.models.schedule import param_groups, set_learning_rates
from pipeline.models.zutis import Zutis
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
    device = runtime.device
    with StageRun(
        "train", stats_path=stats_path, total=params.iterations, unit="iteration"
    ) as stage:
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
        batches = _batches(archives, params=params, runtime=runtime)

        model, text_embeddings = _load_model(categories, background, params=params, device=device)
        config = _checkpoint_config(categories, background, params=params, seed=runtime.seed)
        groups = param_groups(
            model,
            lr=params.learning_rate,
            encoder_lr=params.encoder_learning_rate,
            weight_decay=params.weight_decay,
        )
        optimizer = torch.optim.AdamW(groups, fused=True)

        with _open_live(live_dir) as live:
            totals, num_summed, since = torch.zeros(3, device=device), 0, time.monotonic()
            for step, batch in enumerate(batches, start=1):
                set_learning_rates(optimizer, step - 1, params.iterations)
                losses = _losses(
                    model, batch, text_embeddings, params=params, runtime=runtime, step=step
                )
                optimizer.zero_grad()
                losses[0].backward()
                optimizer.step()
                totals += losses.detach()
                num_summed += 1

                is_last = step == params.iterations
                saves = is_last or step % params.checkpoint_every == 0
                if saves or step % params.log_every == 0:
                    # Reading a number makes the CPU wait for the device; so does the matching.
                    means = (totals / num_summed).tolist()
                    _check_finite(means[0], step)
                    live.step = step
                    for name, value in zip(("loss", "semantic", "mask"), means, strict=True):
                        live.log_metric(f"train/{name}", value)
                    live.log_metric("train/learning_rate", optimizer.param_groups[-1]["lr"])
                    rate = num_summed * params.batch_size / (time.monotonic() - since)
                    stage.postfix(f"loss {means[0]:.3f}, {rate:.0f} images/s")
                    totals, num_summed, since = torch.zeros_like(totals), 0, time.monotonic()
                if saves:
                    save_checkpoint(out_dir, model, {**config, "step": step})
                stage.advance()


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
        mask = mask_loss(output.mask_probs, instance_masks)
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
    categories: list[str], background: list[str], *, params: TrainParams, device: torch.device
) -> tuple[Zutis, Tensor]:
    """A fresh ZUTIS around the encoder, and text embeddings (1 + K, C) by label id."""
    clip = load_clip(params.encoder.model, params.encoder.pretrained, device)
    if params.crop_size < clip.patch_size:
        raise PipelineError(
            f"train.crop_size: {params.crop_size} is less than one patch of "
            f"{params.encoder.model} ({clip.patch_size} pixels)"
        )
    text_embeddings = label_embeddings(
        clip, background=background, categories=categories, templates=templates(params.templates)
    )
    model = build_zutis(clip.visual.requires_grad_(True), **_architecture(params))
    return model.to(device).train(), text_embeddings


def _architecture(params: TrainParams) -> dict[str, Any]:
    """The arguments of `build_zutis` beside the encoder."""
    return {
        "num_queries": params.num_queries,
        "decoder_layers": params.decoder_layers,
        "num_heads": params.num_heads,
        "feedforward_dim": params.feedforward_dim,
        "stop_gradient": params.stop_gradient,
    }


def _checkpoint_config(
    categories: list[str], background: list[str], *, params: TrainParams, seed: int
) -> dict[str, Any]:
    """What a checkpoint says of itself; `step` comes at saving."""
    return {
        "architecture": _architecture(params),
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
