"""Learning rates of ZUTIS: parameter groups and the poly schedule (ZUTIS paper, section 4.1)."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from pipeline.models.zutis.network import Zutis


def poly_lr(
    base_lr: float,
    step: int,
    total_steps: int,
    *,
    power: float = 0.9,
    min_lr: float = 1e-6,
) -> float:
    """Learning rate after `step` of `total_steps` steps: base_lr (1 - step / total_steps)^power.

    The floor `min_lr` is absolute, so small base rates reach it earlier. A base rate of 0 stays 0
    (a frozen group). Beyond `total_steps` the floor holds.

    Raises:
        ValueError: `total_steps` is below 1 or `step` negative.
    """
    if total_steps < 1 or step < 0:
        raise ValueError(f"need total_steps >= 1 and step >= 0, got {total_steps} and {step}")
    if base_lr == 0:
        return 0.0
    remaining = max(1 - step / total_steps, 0.0)
    return max(base_lr * remaining**power, min_lr)


def param_groups(
    model: Zutis,
    *,
    lr: float = 5e-5,
    encoder_lr: float = 5e-6,
    weight_decay: float = 0.05,
) -> list[dict[str, Any]]:
    """Groups for AdamW: the encoder with its own rate, then decoder, queries, ffn1, ffn2.

    Weight decay applies to every tensor, norms and biases included, as published. `initial_lr` is
    what `set_learning_rates` starts from.
    """
    parts = [
        ("encoder", model.encoder.parameters(), encoder_lr),
        ("decoder", model.decoder.parameters(), lr),
        ("query_embed", [model.query_embed], lr),
        ("ffn1", model.ffn1.parameters(), lr),
        ("ffn2", model.ffn2.parameters(), lr),
    ]
    return [
        {
            "name": name,
            "params": list(params),
            "lr": rate,
            "initial_lr": rate,
            "weight_decay": weight_decay,
        }
        for name, params, rate in parts
    ]


def set_learning_rates(
    optimizer: Optimizer,
    step: int,
    total_steps: int,
    *,
    power: float = 0.9,
    min_lr: float = 1e-6,
) -> None:
    """Give every group its rate for update number `step`, counted from 0.

    Depends on nothing but the step, so a resumed run continues the same curve.
    """
    for group in optimizer.param_groups:
        group["lr"] = poly_lr(group["initial_lr"], step, total_steps, power=power, min_lr=min_lr)
