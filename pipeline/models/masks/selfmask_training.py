"""The loop that trains SelfMask on votes, whatever they are of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.models.masks.selfmask import SelfMask, selfmask_loss
from pipeline.models.weights.training_state import resume, save_state

WARM_UP, SAVE_EVERY, SHOW_EVERY = 50, 200, 50
WEIGHT_DECAY, MAX_NORM, LAST_SHARE = 0.05, 1.0, 0.01


def fit_selfmask(
    model: SelfMask,
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    state_path: Path,
    *,
    iterations: int,
    learning_rate: float,
    title: str,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Train SelfMask; a run that was cut off continues from its last state.

    AdamW, whose rate rises over the first steps and falls by half a cosine.

    Args:
        model: the network, on its device; it is left in evaluation mode.
        batches: gives the batches from a step on, one for each that is left: images (B, 3, H, W) in
            [0, 1] and masks (B, H, W). A batch is to depend on its step alone.
        state_path: file of the state.
        iterations: steps in all.
        learning_rate: the highest.
        title: of the progress bar.
        autocast: gives the context of the network's precision.

    Raises:
        PipelineError: the state is damaged or of another network.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    start = resume(state_path, model, optimizer)
    model.train()
    bar = tqdm(total=iterations, initial=start, desc=title)
    for step, (images, masks) in enumerate(batches(start), start + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _rate(step - 1, iterations)
        with autocast():
            output = model(images.to(device))
        loss = selfmask_loss(output, masks.to(device))["total"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        bar.update()
        if step % SHOW_EVERY == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % SAVE_EVERY == 0 or step == iterations:
            save_state(state_path, model, optimizer, step=step, extra=None)
    bar.close()
    model.eval()


def _rate(step: int, iterations: int) -> float:
    """Share of the highest learning rate after `step` of the steps."""
    cosine = 0.5 * (1 + 2 * LAST_SHARE + math.cos(math.pi * step / iterations))
    return min(1.0, (step + 1) / WARM_UP, cosine)
