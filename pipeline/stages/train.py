"""Stage 5: mask and label shards -> checkpoint of a trained student, and loss curves."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from dvclive import Live
from scmrepo.exceptions import SCMError
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from pipeline.engine.cache import UseMark
from pipeline.engine.distributed import Group
from pipeline.engine.dry_run import DryRun
from pipeline.engine.progress import StageRun, Tally
from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.files import check_writable, digest, refuse_url, write_bytes
from pipeline.formats.decisions import Decisions
from pipeline.methods.students import (
    MicroBatch,
    Student,
    StudentParams,
    TrainingData,
    TrainingInputs,
    fresh_student,
    training_data,
)
from pipeline.models.weights.checkpoint import CONFIG_NAME, WEIGHTS_NAME, save_checkpoint
from pipeline.models.weights.training_state import read_state, restore, save_state
from pipeline.training.training_set import Batch, collate
from pipeline.vocabulary.categories import Names

# To be raised with every change after which the same settings give other weights.
TRAIN_VERSION = 4
STATE_NAME = "last.safetensors"


def run(
    *,
    masks_dir: Path,
    labels_dir: Path | None = None,
    corrections_dir: Path | None = None,
    review_path: Path | None = None,
    out_dir: Path,
    live_dir: Path,
    stats_path: Path,
    categories: list[str],
    background: list[str],
    params: StudentParams,
    runtime: Runtime,
    texts: Mapping[str, Sequence[str]] = MappingProxyType({}),
    resume: bool = True,
    group: Group | None = None,
) -> None:
    """Train a student on pseudo-labels (ZUTIS paper, 3.2 to 4.1).

    On the CPU, the same inputs and seed give the same bytes, whatever the number of workers and
    however often the run was cut off and started again. With every checkpoint the whole state of
    the training is kept in the cache folder, by all settings that it depends on, until the run has
    finished.

    Args:
        masks_dir: mask shards.
        labels_dir: label shards, joined to them by key; only targets of dense labels need any.
        corrections_dir: masks that a person has corrected, in place of the pseudo-labels of these
            images; None, or no such folder: none.
        review_path: what a person thinks of the labels (`pipeline.formats.review`): an image whose
            labels are rejected is left out, and counted. None: nothing.
        out_dir: folder of the checkpoint: model.safetensors and config.json, rewritten whole every
            `checkpoint_every` iterations and at the end.
        live_dir: DVCLive's folder: metrics.json and plots/metrics/*.tsv.
        stats_path: counts of the stage.
        categories: names by label id, from 1.
        background: names whose mean is the text embedding of label id 0.
        params: section `train`.
        runtime: device, precision, seed.
        texts: what stands for a category in prompts, see `Names`; of several the mean
            embedding.
        resume: continue from the last state of a run that was cut off.
        group: the processes that share every batch; they need the same folders. The main one
            writes.

    Raises:
        PipelineError: the shards do not fit the params, the batch cannot be shared evenly, the
            precision is float16, training diverges, or a line of `review_path` is malformed.
    """
    group = group or Group(runtime.device)
    _check_precision(runtime)
    _check_shares(params, group)
    if group.is_main:
        check_writable(Path(out_dir) / WEIGHTS_NAME)
    torch.manual_seed(runtime.seed)
    names = Names(categories, background, texts)
    length = params.iterations * params.batch_size
    decisions = Decisions.read(corrections_dir, review_path)
    data = training_data(
        params, TrainingInputs(masks_dir, labels_dir, names, length, runtime, decisions)
    )
    with StageRun(
        "train",
        stats_path=stats_path,
        total=params.iterations,
        unit="iteration",
        silent=not group.is_main,
    ) as stage:
        _report(data, stage, group)
        student = fresh_student(params, names, runtime)
        group.share_statistics(student.network)
        kept = _Kept(
            student,
            student.make_optimizer(),
            config=_checkpoint_config(student, names, params=params, seed=runtime.seed),
            out_dir=out_dir,
            state_path=_state_path(data, names, student, params=params, runtime=runtime),
        )
        with (
            _open_live(live_dir) if group.is_main else nullcontext() as live,
            UseMark(kept.state_path.parent) as mark,
        ):
            log = _LossLog(live, stage, group, student.losses, batch_size=params.batch_size)
            start = _start(kept, log, stage, group, total=params.iterations, resume=resume)
            steps = _steps(data, start=start, params=params, runtime=runtime, group=group)
            _train(kept, enumerate(steps, start + 1), log, stage, mark, params=params, group=group)
            for item, why in data.skipped():
                Tally.skip(stage, item, why)  # the stage itself counts iterations
    if group.is_main:
        _remove_state(kept.state_path)


def dry_run(dry: DryRun, *, params: StudentParams, cache_dir: Path) -> None:
    """Say what `run` would do."""
    states = len(list((cache_dir / "train").glob(f"*/{STATE_NAME}")))
    cut_off = f"; {states} runs that were cut off can be continued" if states else ""
    batches = f" of {params.batch_size} images{cut_off}"
    dry.items(params.iterations, unit="iterations", text=batches)


@dataclass(frozen=True)
class _Kept:
    """A student under training, and where it is kept.

    Attributes:
        student: what is trained.
        optimizer: over its parameters.
        config: what a checkpoint says of itself, without `step`.
        out_dir: folder of the checkpoint.
        state_path: the whole state, for a run that is cut off.
    """

    student: Student
    optimizer: Optimizer
    config: Mapping[str, Any]
    out_dir: Path
    state_path: Path

    def save(self, step: int, log: _LossLog) -> None:
        """Write the checkpoint of a step, those of milestones in folders of their own, and state.

        Of the log nothing may be pending.
        """
        network, config = self.student.network, {**self.config, "step": step}
        save_checkpoint(self.out_dir, network, config)
        if milestone := self.student.milestones.get(step):
            save_checkpoint(self.out_dir / milestone, network, config)
        save_state(self.state_path, network, self.optimizer, step=step, extra=log.rows)


def _start(
    kept: _Kept, log: _LossLog, stage: StageRun, group: Group, *, total: int, resume: bool
) -> int:
    """Go to where an earlier run was cut off; returns the iterations that are done."""
    start = _resume(kept, log, group) if resume else 0
    _check_common_start(start, group, kept.state_path)
    if start and group.is_main:
        print(f"train: resumed at step {start} of {total}", flush=True)
        stage.start_at(start)
        save_checkpoint(kept.out_dir, kept.student.network, {**kept.config, "step": start})
    return start


def _train(
    kept: _Kept,
    steps: Iterable[tuple[int, list[MicroBatch]]],
    log: _LossLog,
    stage: StageRun,
    mark: UseMark,
    *,
    params: StudentParams,
    group: Group,
) -> None:
    """Train on this process's micro-batches of each step, until the last one or a drift."""
    student, optimizer = kept.student, kept.optimizer
    # One step: rates, gradients of all micro-batches of all processes, update.
    for step, batches in steps:
        if student.has_drifted(log.rows):
            break
        student.set_learning_rates(optimizer, step - 1)
        optimizer.zero_grad()
        losses = _backward(student, batches, group=group, step=step)
        optimizer.step()
        log.add(losses)
        # Reading the losses makes the CPU wait for the device, so now and then only.
        saves = (
            step == params.iterations
            or step % params.checkpoint_every == 0
            or step in student.milestones
        )
        if saves or step % params.log_every == 0:
            log.write(step, learning_rate=optimizer.param_groups[-1]["lr"])
        if saves and group.is_main:
            kept.save(step, log)
            mark.take()
        stage.advance()
    if reason := student.has_drifted(log.rows):
        _go_back(kept.out_dir, student, reason, stage, group)


class _LossLog:
    """Means of the losses since the last line, to DVCLive and the progress bar.

    Attributes:
        rows: all that was written: step, means of the loss and its parts, learning rate.
    """

    def __init__(
        self,
        live: Live | None,
        stage: StageRun,
        group: Group,
        parts: Sequence[str],
        *,
        batch_size: int,
    ) -> None:
        self.rows: list[tuple[int, list[float]]] = []
        self._live = live
        self._stage = stage
        self._group = group
        self._batch_size = batch_size
        self._names = ("loss", *parts)
        self._totals = torch.zeros(len(self._names), device=group.device)
        self._num_measured = torch.zeros_like(self._totals)
        self._restart()

    def _restart(self) -> None:
        self._totals.zero_()
        self._num_measured.zero_()
        self._num_summed, self._since = 0, time.monotonic()

    def add(self, losses: Tensor) -> None:
        """Take in the loss of one step and its parts, without waiting for them.

        They are this process's part of the step's losses; a part that is NaN was not measured.
        """
        measured = ~losses.isnan()
        measured[0] = True
        self._totals += torch.where(measured, losses, 0)
        self._num_measured += measured
        self._num_summed += 1

    def write(self, step: int, *, learning_rate: float) -> None:
        """Log the means; reading them makes the CPU wait for the device.

        Raises:
            PipelineError: the loss is no longer finite.
        """
        means = (self._group.all_reduce(self._totals) / self._num_measured).tolist()
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
                for name, value in zip((*self._names, "learning_rate"), values, strict=True):
                    if not math.isnan(value):
                        self._live.log_metric(f"train/{name}", value)


def _check_precision(runtime: Runtime) -> None:
    """Refuse float16, in which small gradients vanish."""
    if runtime.amp_dtype == torch.float16:
        raise PipelineError(
            "precision: float16 needs gradients to be scaled, which training does not do; use "
            "bfloat16 or float32 for `pipeline train`"
        )


def _check_shares(params: StudentParams, group: Group) -> None:
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
    data: TrainingData,
    names: Names,
    student: Student,
    *,
    params: StudentParams,
    runtime: Runtime,
) -> Path:
    """Where the last training state of exactly these settings and inputs lies.

    The number of processes is no part of it, so that a run may go on with fewer of them.
    """
    settings = {
        "version": TRAIN_VERSION,
        "train": params.model_dump(
            mode="json", exclude={"encoder", "labels", "workers", "data", "unlabelled"}
        ),
        "categories": list(names.categories),
        "background": list(names.background),
        **_texts(names),
        "seed": runtime.seed,
        "shards": data.fingerprint,
        "encoder": student.fingerprint,
        "device": runtime.device.type,
        "precision": str(runtime.amp_dtype),
    }
    return runtime.cache_dir / "train" / digest(settings)[:32] / STATE_NAME


def _resume(kept: _Kept, log: _LossLog, group: Group) -> int:
    """Continue from the state that is kept, if there is one; return the finished iterations."""
    try:
        state = read_state(kept.state_path)
    except PipelineError as error:
        if group.is_main:
            print(f"train: {error}; training starts anew", flush=True)
        return 0
    if state is None:
        return 0
    restore(state, kept.student.network, kept.optimizer)
    log.replay(state.extra)
    return state.step


def _remove_state(path: Path) -> None:
    """Remove the state of a finished run, with what killed ones left half-written beside it."""
    shutil.rmtree(path.parent, ignore_errors=True)
    with suppress(OSError):
        path.parent.parent.rmdir()


def _report(data: TrainingData, stage: StageRun, group: Group) -> None:
    """Count the data, and warn at once, for training takes long, and at the end."""
    for name, value in data.counts.items():
        stage.count(name, value)
    for text in data.warnings:
        stage.warn(text)
        if group.is_main:
            print(f"train: warning: {text}", flush=True)


def _go_back(out_dir: Path, student: Student, reason: str, stage: StageRun, group: Group) -> None:
    """End training with the checkpoint of the last milestone, which is still there."""
    step = max(student.milestones)
    text = f"{reason}: training ended, with the weights of step {step}"
    stage.warn(text)
    if group.is_main:
        print(f"train: warning: {text}", flush=True)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            write_bytes(out_dir / name, (out_dir / student.milestones[step] / name).read_bytes())


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


def _backward(student: Student, batches: list[MicroBatch], *, group: Group, step: int) -> Tensor:
    """Give the parameters the gradients of the loss of all micro-batches of all processes.

    Returns:
        The loss and its parts of this process's micro-batches: its share of a sum.
    """
    counts = torch.stack([student.count(batch) for batch in batches]).sum(0)
    divisors = group.all_reduce(counts).clamp(min=1)
    shares: list[Tensor] = []
    for batch in batches:
        try:
            losses = student.loss(batch, divisors)
        except PipelineError as error:
            raise PipelineError(f"step {step}: {error}") from None
        losses[0].backward()
        shares.append(losses.detach())
    group.reduce_gradients(student.network.parameters())
    return torch.stack(shares).sum(0)


def _steps(
    data: TrainingData, *, start: int, params: StudentParams, runtime: Runtime, group: Group
) -> Iterator[list[MicroBatch]]:
    """This process's micro-batches of every iteration after the first `start`."""
    shares = _shares(start, params, group)
    loader: DataLoader[Any] = DataLoader(
        _Spoken(data),
        batch_sampler=shares,
        num_workers=params.workers,
        collate_fn=_collate,
        pin_memory=runtime.device.type == "cuda",
        generator=torch.Generator().manual_seed(runtime.seed),
    )
    batches = (
        _to_device(numbers, _checked(batch), runtime.device)
        for numbers, batch in zip(shares, loader, strict=True)
    )
    while micro_batches := list(islice(batches, params.accumulate)):
        yield micro_batches


class _Spoken(Dataset[Any]):
    """Training images, or what is wrong: torch wraps an error of a worker in its traceback."""

    def __init__(self, data: TrainingData) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, number: int) -> Any:
        try:
            return self._data[number]
        except PipelineError as error:
            return error


def _collate(images: Sequence[Any]) -> Batch | PipelineError:
    return next((it for it in images if isinstance(it, PipelineError)), None) or collate(images)


def _checked(batch: Batch | PipelineError) -> Batch:
    if isinstance(batch, PipelineError):
        raise batch
    return batch


def _shares(start: int, params: StudentParams, group: Group) -> list[list[int]]:
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


def _to_device(numbers: list[int], batch: Batch, device: torch.device) -> MicroBatch:
    return MicroBatch(
        numbers,
        batch.images.to(device, non_blocking=True).permute(0, 3, 1, 2),
        batch.semantic_masks.to(device, non_blocking=True),
        batch.instance_masks.to(device, non_blocking=True).split(batch.num_instances),
    )


def _checkpoint_config(
    student: Student, names: Names, *, params: StudentParams, seed: int
) -> dict[str, Any]:
    """What a checkpoint says of itself; `step` comes at saving."""
    return {
        "student": params.student,
        **student.config,
        "encoder": params.encoder.model_dump(mode="json"),
        "categories": list(names.categories),
        "background": list(names.background),
        **_texts(names),
        "templates": params.templates,
        "seed": seed,
        "train": params.model_dump(mode="json"),
    }


def _texts(names: Names) -> dict[str, Any]:
    """The entry `texts` of settings, where a category has other words than its name."""
    texts = {name: list(words) for name, words in names.texts.items()}
    return {"texts": texts} if texts else {}


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise PipelineError(
            f"train: the loss is {loss} at step {step}: training has diverged; lower "
            "train.learning_rate, train.encoder_learning_rate or train.logit_scale"
        )
