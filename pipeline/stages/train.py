"""Stage 5: label shards -> trained ZUTIS checkpoint and loss curves."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dvclive import Live
from scmrepo.exceptions import SCMError
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.engine.cache import UseMark
from pipeline.engine.distributed import Group
from pipeline.engine.progress import StageRun
from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.files import check_writable, digest, refuse_url
from pipeline.formats.labels import IGNORE_INDEX
from pipeline.formats.shards import read_manifest
from pipeline.models.clip import ClipEncoder, label_embeddings, load_clip
from pipeline.models.zutis.build import WEIGHTS_NAME, build_zutis, save_checkpoint
from pipeline.models.zutis.losses import mask_loss, num_counted, num_pairs, semantic_loss
from pipeline.models.zutis.network import IMAGENET_MEAN, IMAGENET_STD, Zutis
from pipeline.models.zutis.schedule import param_groups, set_learning_rates
from pipeline.models.zutis.training_state import read_state, restore, save_state
from pipeline.params.sections import TrainParams
from pipeline.training.training_set import Archives, Batch, Composition, TrainingSet, collate
from pipeline.vocabulary.prompts import templates

# To be raised with every change after which the same settings give other weights.
TRAIN_VERSION = 2
STATE_NAME = "last.safetensors"
LOSSES = ("loss", "semantic", "mask")


class _MicroBatch(NamedTuple):
    """Images that go through the network at once, on its device.

    Attributes:
        numbers: B numbers of training images.
        images: (B, 3, H, W) uint8, RGB.
        semantic_masks: (B, H, W) int16 label ids; IGNORE_INDEX is void.
        instance_masks: B boolean tensors (N, H, W).
    """

    numbers: list[int]
    images: Tensor
    semantic_masks: Tensor
    instance_masks: Sequence[Tensor]


class _Network(NamedTuple):
    """A fresh ZUTIS, text embeddings (1 + K, C) by label id, and what decided both."""

    model: Zutis
    text_embeddings: Tensor
    architecture: dict[str, Any]
    encoder_fingerprint: str


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
    resume: bool = True,
    group: Group | None = None,
) -> None:
    """Train ZUTIS on pseudo-labels (ZUTIS paper, 3.2 to 4.1).

    On the CPU, the same inputs and seed give the same bytes, whatever the number of workers and
    however often the run was cut off and started again. With every checkpoint the whole state of
    the training is kept in the cache folder, by all settings that it depends on, until the run has
    finished.

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
        resume: Continue from the last state of a run that was cut off.
        group: The processes that share every batch; they need the same folders. The main one
            writes.

    Raises:
        PipelineError: the shards do not fit the params, the batch cannot be shared evenly, or
            training diverges.
    """
    group = group or Group(runtime.device)
    _check_shares(params, group)
    if group.is_main:
        check_writable(Path(out_dir) / WEIGHTS_NAME)
    torch.manual_seed(runtime.seed)
    with StageRun(
        "train",
        stats_path=stats_path,
        total=params.iterations,
        unit="iteration",
        silent=not group.is_main,
    ) as stage:
        archives = _open_archives(labels_dir, categories, params=params, stage=stage)
        dataset = _training_set(archives, params=params, seed=runtime.seed)
        network = _load_network(categories, background, params=params, runtime=runtime)
        model = network.model
        config = _checkpoint_config(
            categories, background, network.architecture, params=params, seed=runtime.seed
        )
        optimizer = _make_optimizer(model, params)
        state_path = _state_path(
            labels_dir, categories, background, network, params=params, runtime=runtime
        )
        with (
            _open_live(live_dir) if group.is_main else nullcontext() as live,
            UseMark(state_path.parent) as mark,
        ):
            log = _LossLog(live, stage, group, batch_size=params.batch_size)
            start = _resume(state_path, model, optimizer, log, group) if resume else 0
            _check_common_start(start, group, state_path)
            if start and group.is_main:
                print(f"train: resumed at step {start} of {params.iterations}", flush=True)
                stage.start_at(start)
                save_checkpoint(out_dir, model, {**config, "step": start})
            steps = _steps(dataset, start=start, params=params, runtime=runtime, group=group)
            for step, batches in enumerate(steps, start=start + 1):
                set_learning_rates(optimizer, step - 1, params.iterations)
                optimizer.zero_grad()
                losses = _backward(
                    network, batches, params=params, runtime=runtime, group=group, step=step
                )
                optimizer.step()
                log.add(losses)
                saves = step == params.iterations or step % params.checkpoint_every == 0
                if saves or step % params.log_every == 0:
                    log.write(step, learning_rate=optimizer.param_groups[-1]["lr"])
                if saves and group.is_main:
                    save_checkpoint(out_dir, model, {**config, "step": step})
                    # The log has just been written, so nothing of it is pending.
                    save_state(state_path, model, optimizer, step=step, extra=log.rows)
                    mark.take()
                stage.advance()
    if group.is_main:
        _remove_state(state_path)


class _LossLog:
    """Means of the losses since the last line, to DVCLive and the progress bar.

    Attributes:
        rows: All that was written: step, the three means, learning rate.
    """

    def __init__(
        self, live: Live | None, stage: StageRun, group: Group, *, batch_size: int
    ) -> None:
        self.rows: list[tuple[int, list[float]]] = []
        self._live = live
        self._stage = stage
        self._group = group
        self._batch_size = batch_size
        self._totals = torch.zeros(len(LOSSES), device=group.device)
        self._restart()

    def _restart(self) -> None:
        self._totals.zero_()
        self._num_summed, self._since = 0, time.monotonic()

    def add(self, losses: Tensor) -> None:
        """Take in total, semantic and mask loss (3,) of one step, without waiting for them.

        They are this process's part of the step's losses.
        """
        self._totals += losses
        self._num_summed += 1

    def write(self, step: int, *, learning_rate: float) -> None:
        """Log the means; reading them makes the CPU wait for the device.

        Raises:
            PipelineError: the loss is no longer finite.
        """
        means = (self._group.all_reduce(self._totals) / self._num_summed).tolist()
        _check_finite(means[0], step)
        self.replay([(step, [*means, learning_rate])])
        rate = self._num_summed * self._batch_size / (time.monotonic() - self._since)
        self._stage.postfix(f"loss {means[0]:.3f}, {rate:.0f} images/s")
        self._restart()

    def replay(self, rows: Iterable[tuple[int, list[float]]]) -> None:
        """Log rows as they were logged before."""
        for step, values in rows:
            self.rows.append((step, values))
            if self._live is not None:
                self._live.step = step
                for name, value in zip((*LOSSES, "learning_rate"), values, strict=True):
                    self._live.log_metric(f"train/{name}", value)


def _check_shares(params: TrainParams, group: Group) -> None:
    """Refuse a batch that cannot be dealt out evenly."""
    parts = params.accumulate * group.size
    if params.batch_size % parts:
        processes = f" x {group.size} processes" if group.size > 1 else ""
        raise PipelineError(
            f"train.batch_size: {params.batch_size} cannot be divided by train.accumulate "
            f"{params.accumulate}{processes}; choose a multiple of {parts}"
        )


def _check_common_start(start: int, group: Group, state_path: Path) -> None:
    """Wait for all processes; refuse to go on if they would start at different steps."""
    if not group.agree(start):
        raise PipelineError(
            f"{state_path.parent}: the processes of this run find different training states here "
            f"(this one: step {start}); point PIPELINE_CACHE at a folder that all of them share"
        )


def _state_path(
    labels_dir: Path,
    categories: list[str],
    background: list[str],
    network: _Network,
    *,
    params: TrainParams,
    runtime: Runtime,
) -> Path:
    """Where the last training state of exactly these settings and inputs lies.

    The number of processes is no part of it, so that a run may go on with fewer of them.
    """
    settings = {
        "version": TRAIN_VERSION,
        "train": params.model_dump(mode="json", exclude={"encoder", "workers"}),
        "categories": categories,
        "background": background,
        "seed": runtime.seed,
        "labels": [shard["sha256"] for shard in read_manifest(labels_dir)["shards"]],
        "encoder": network.encoder_fingerprint,
        "device": runtime.device.type,
        "precision": str(runtime.amp_dtype),
    }
    return runtime.cache_dir / "train" / digest(settings)[:32] / STATE_NAME


def _resume(
    path: Path, model: Zutis, optimizer: torch.optim.Optimizer, log: _LossLog, group: Group
) -> int:
    """Continue from the state at `path`, if there is one; return the finished iterations."""
    try:
        state = read_state(path)
    except PipelineError as error:
        if group.is_main:
            print(f"train: {error}; training starts anew", flush=True)
        return 0
    if state is None:
        return 0
    restore(state, model, optimizer)
    log.replay(state.extra)
    return state.step


def _remove_state(path: Path) -> None:
    """Remove the state of a finished run, with what killed ones left half-written beside it."""
    shutil.rmtree(path.parent, ignore_errors=True)
    with suppress(OSError):
        path.parent.parent.rmdir()


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
    refuse_url(live_dir)
    try:
        return Live(str(live_dir), save_dvc_exp=False, dvcyaml=None, report=None)
    except SCMError as error:
        raise PipelineError(
            f"{live_dir}: DVCLive cannot use the git repository around it ({error}); "
            "make a first commit"
        ) from None


def _backward(
    network: _Network,
    batches: list[_MicroBatch],
    *,
    params: TrainParams,
    runtime: Runtime,
    group: Group,
    step: int,
) -> Tensor:
    """Give the parameters the gradients of the loss of all micro-batches of all processes.

    Returns:
        Total, semantic and mask loss (3,) of this process's micro-batches: its part of a sum.
    """
    divisors = _divisors(batches, params=params, group=group)
    shares = torch.zeros(len(LOSSES), device=runtime.device)
    for batch in batches:
        losses = _losses(network, batch, divisors, params=params, runtime=runtime, step=step)
        losses[0].backward()
        shares += losses.detach()
    group.reduce_gradients(network.model.parameters())
    return shares


def _divisors(
    batches: list[_MicroBatch], *, params: TrainParams, group: Group
) -> tuple[Tensor, Tensor]:
    """What semantic and mask loss of the global batch are divided by."""
    counts = torch.stack([_counts(batch, params=params) for batch in batches]).sum(0)
    pixels, pairs = group.all_reduce(counts).clamp(min=1)
    return pixels, pairs


def _counts(batch: _MicroBatch, *, params: TrainParams) -> Tensor:
    """Pixels and pairs, or images, of a micro-batch that count in its losses: (2,) int64."""
    pixels = num_counted(batch.semantic_masks, ignore_index=IGNORE_INDEX)
    if params.mask_loss_reduction == "mean":
        pairs = num_pairs(
            batch.instance_masks,
            num_layers=params.decoder_layers,
            num_queries=params.num_queries,
        )
    else:
        pairs = torch.tensor(len(batch.numbers)).to(pixels.device, non_blocking=True)
    return torch.stack((pixels, pairs))


def _losses(
    network: _Network,
    batch: _MicroBatch,
    divisors: tuple[Tensor, Tensor],
    *,
    params: TrainParams,
    runtime: Runtime,
    step: int,
) -> Tensor:
    """Total, semantic and mask loss of a micro-batch, stacked: (3,)."""
    with runtime.autocast():
        output = network.model(batch.images / 255)
    semantic = semantic_loss(
        output.patch_tokens,
        network.text_embeddings,
        batch.semantic_masks,
        logit_scale=params.logit_scale,
        ignore_index=IGNORE_INDEX,
        divisor=divisors[0],
    )
    try:
        mask = mask_loss(
            output.mask_probs,
            batch.instance_masks,
            reduction=params.mask_loss_reduction,
            matching=params.matching,
            divisor=divisors[1],
            generators=_generators(batch.numbers, seed=runtime.seed),
        )
    except PipelineError as error:
        raise PipelineError(f"step {step}: {error}") from None
    total = params.ce_weight * semantic + params.mask_weight * mask
    return torch.stack((total, semantic, mask))


def _generators(numbers: list[int], *, seed: int) -> list[torch.Generator]:
    """A generator for each training image, whoever computes its loss."""
    seeds = [int(digest([seed, number])[:15], 16) for number in numbers]
    return [torch.Generator().manual_seed(value) for value in seeds]


def _training_set(archives: Archives, *, params: TrainParams, seed: int) -> TrainingSet:
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
    return TrainingSet(
        archives, composition, seed=seed, length=params.iterations * params.batch_size
    )


def _steps(
    dataset: TrainingSet, *, start: int, params: TrainParams, runtime: Runtime, group: Group
) -> Iterator[list[_MicroBatch]]:
    """This process's micro-batches of every iteration after the first `start`."""
    shares = _shares(start, params, group)
    loader = DataLoader(
        dataset,
        batch_sampler=shares,
        num_workers=params.workers,
        collate_fn=collate,
        pin_memory=runtime.device.type == "cuda",
        generator=torch.Generator().manual_seed(runtime.seed),
    )
    batches = (
        _to_device(numbers, batch, runtime.device)
        for numbers, batch in zip(shares, loader, strict=True)
    )
    while micro_batches := list(islice(batches, params.accumulate)):
        yield micro_batches


def _shares(start: int, params: TrainParams, group: Group) -> list[list[int]]:
    """Numbers of this process's training images after `start` iterations, by micro-batch.

    Iteration i takes `batch_size` numbers from i `batch_size` on, dealt out to the processes in
    turn.
    """
    size = params.batch_size // (params.accumulate * group.size)
    return [
        list(range(first, first + size))
        for step in range(start, params.iterations)
        for first in range(
            step * params.batch_size + group.rank * size,
            (step + 1) * params.batch_size,
            size * group.size,
        )
    ]


def _to_device(numbers: list[int], batch: Batch, device: torch.device) -> _MicroBatch:
    return _MicroBatch(
        numbers,
        batch.images.to(device, non_blocking=True).permute(0, 3, 1, 2),
        batch.semantic_masks.to(device, non_blocking=True),
        batch.instance_masks.to(device, non_blocking=True).split(batch.num_instances),
    )


def _load_network(
    categories: list[str], background: list[str], *, params: TrainParams, runtime: Runtime
) -> _Network:
    """A fresh ZUTIS around the encoder, with its text embeddings."""
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
    fingerprint = clip.fingerprint()
    model = build_zutis(clip.visual.requires_grad_(True), **architecture)
    return _Network(model.to(runtime.device).train(), text_embeddings, architecture, fingerprint)


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
    architecture: dict[str, Any],
    *,
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
