"""One whole training step: forward, losses, backward, update of the weights."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.models.zutis.losses import mask_loss, semantic_loss
from pipeline.models.zutis.schedule import param_groups
from speed.harness import Bench, Pair
from speed.inputs import MakeRuntime, cpu_runtime, zutis_network
from speed.losses import loss_inputs, published_losses
from speed.plain_zutis import published_forward

LOSS_TOLERANCE = 1e-4
NUM_INSTANCES = 3


def prepare_step(folder: Path, quick: bool, *, batch: int, make: MakeRuntime) -> Pair:
    """The published step in float32 and ours as the stage makes it; data are on the device."""
    runtime = make(folder)
    network = zutis_network(quick=quick).to(runtime.device).train()
    weights = {
        name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()
    }
    inputs = loss_inputs(
        quick=quick, num_instances=NUM_INSTANCES, batch=batch, device=runtime.device
    )
    side = inputs.semantic_masks.shape[-1]
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(2))
    images = images.to(runtime.device)
    groups = param_groups(network)
    published_optimizer = torch.optim.AdamW(_same_groups(groups, network, weights))
    our_optimizer = torch.optim.AdamW(groups, fused=True)

    def published() -> float:
        mask_probs, tokens = published_forward(weights, images)
        loss, _ = published_losses(
            mask_probs, tokens, inputs.text, inputs.semantic_masks, inputs.instance_masks
        )
        return _update(published_optimizer, loss)

    def ours() -> float:
        with runtime.autocast():
            output = network(images)
        semantic = semantic_loss(output.patch_tokens, inputs.text, inputs.semantic_masks)
        mask = mask_loss(output.mask_probs, inputs.instance_masks)
        return _update(our_optimizer, semantic + mask)

    return Pair(published, ours, _check)


def _same_groups(
    groups: list[dict], network: torch.nn.Module, weights: dict[str, Tensor]
) -> list[dict]:
    """The optimizer's groups for the copies of the weights."""
    names = {id(value): name for name, value in network.named_parameters()}
    settings = [{key: deepcopy(group[key]) for key in group if key != "params"} for group in groups]
    return [
        {**setting, "params": [weights[names[id(value)]] for value in group["params"]]}
        for setting, group in zip(settings, groups, strict=True)
    ]


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _check(published: float, ours: float) -> str:
    difference = abs(published - ours) / abs(published)
    assert difference <= LOSS_TOLERANCE, f"losses of the first step differ by {difference:.1e}"
    return f"loss of the first step within {difference:.0e}; gradients: see the rows above"


BENCHES = [
    Bench(
        name="train_step",
        title=f"training step: batch 2, 384 x 384, ViT-B/16, {NUM_INSTANCES} instances an image",
        target=3.5,
        stretch=5.0,
        prepare=partial(prepare_step, batch=2, make=cpu_runtime),
    )
]
