"""Learning rates of DenseCLIP+: one rate for all, falling to a floor that is its last value."""

from __future__ import annotations


def poly_lr(
    base_lr: float, step: int, total_steps: int, *, power: float = 0.9, min_lr: float = 1e-4
) -> float:
    """Rate of update `step` of `total_steps`.

    (base_lr - min_lr) (1 - step / total_steps)^power + min_lr,
    as MMSegmentation's; ZUTIS's floor, which cuts the curve off, is another.

    Raises:
        ValueError: `step` is none of the updates.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"update {step} of {total_steps}")
    return (base_lr - min_lr) * (1 - step / total_steps) ** power + min_lr
