"""Labels of a further round: what a trained student sees, joined with what it was trained on.

Letters: N objects, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.labels import BACKGROUND, IGNORE_INDEX, LABEL_TYPE, LabelMap
from pipeline.formats.predictions import Instance


class Relabelled(NamedTuple):
    """What a further round sees of an image.

    Attributes:
        semantic: (H, W) int16 label ids; IGNORE_INDEX is void.
        masks: (N, H, W) bool, none of which overlap: the student's objects, then pseudo-masks.
        num_kept: of the masks, those of the student.
    """

    semantic: LabelMap
    masks: NDArray[np.bool_]
    num_kept: int


def relabel(
    target: NDArray[np.integer],
    pseudo_objects: NDArray[np.integer],
    prediction: LabelMap,
    objects: Sequence[Instance],
) -> Relabelled:
    """Join a student's prediction of an image with the pseudo-labels that it was trained on.

    Inside of the student's objects a pixel has the category of the first object that has it, unless
    the target names another category: then it is void. So is what the target calls background of an
    object more than half of which it names: the two disagree on how far the object goes. Elsewhere
    the target stays, but is void where the student's label map names another category; its
    background overrules nothing.

    Of a pseudo-mask's object that the student's objects cover by more than half, they have taken
    the place: what remains of it is void. What remains of any other one is an object.

    Args:
        target: (H, W) label ids of the pseudo-labels; IGNORE_INDEX is void.
        pseudo_objects: (H, W) numbers of the pseudo-mask's objects, from 1; 0 is none.
        prediction: (H, W) label ids of the student.
        objects: of the student, those that are kept, by falling score.

    Raises:
        ValueError: the three maps differ in shape.
    """
    if not target.shape == pseudo_objects.shape == prediction.shape:
        raise ValueError(
            f"target {target.shape}, pseudo-objects {pseudo_objects.shape} and prediction "
            f"{prediction.shape} must have one shape"
        )
    semantic = target.astype(LABEL_TYPE)
    semantic[(prediction != BACKGROUND) & (prediction != semantic)] = IGNORE_INDEX
    named = target > BACKGROUND
    taken = np.zeros(target.shape, dtype=bool)
    masks: list[NDArray[np.bool_]] = []
    for instance in objects:
        mask = instance.mask & ~taken
        semantic[mask] = instance.label_id
        semantic[mask & named & (target != instance.label_id)] = IGNORE_INDEX
        if _mostly(mask, named):
            semantic[mask & (target == BACKGROUND)] = IGNORE_INDEX
        taken |= mask
        if mask.any():
            masks.append(mask)
    num_kept = len(masks)
    for number in range(1, int(pseudo_objects.max(initial=0)) + 1):
        whole = pseudo_objects == number
        rest = whole & ~taken
        if _mostly(whole, taken):
            semantic[rest] = IGNORE_INDEX
        elif rest.any():
            masks.append(rest)
    return Relabelled(semantic, np.array(masks, dtype=bool).reshape(-1, *target.shape), num_kept)


def _mostly(whole: NDArray[np.bool_], inside: NDArray[np.bool_]) -> bool:
    """Whether more than half of one region lies in another."""
    return bool(2 * np.count_nonzero(whole & inside) > np.count_nonzero(whole))
