from __future__ import annotations

import numpy as np
import pytest

from pipeline.formats.labels import IGNORE_INDEX
from pipeline.formats.predictions import Instance
from pipeline.training.relabelling import relabel


def instance(mask: np.ndarray, label_id: int, score: float = 0.9) -> Instance:
    rows, columns = np.nonzero(mask)
    box = columns.min(), rows.min(), columns.max(), rows.max()
    crop = mask[box[1] : box[3] + 1, box[0] : box[2] + 1]
    return Instance(label_id, score, crop, tuple(map(int, box)), mask.shape)


def row(*values: int) -> np.ndarray:
    return np.array([values], dtype=np.int16)


def test_an_object_takes_the_place_of_the_pseudo_mask_that_it_covers() -> None:
    target = row(0, 1, 1, 1, 1, 0, 0)
    prediction = row(0, 0, 1, 1, 1, 1, 0)
    new = relabel(target, row(0, 1, 1, 1, 1, 0, 0), prediction, [instance(prediction > 0, 1)])
    # Where they disagree on its extent, nobody knows; the student's outline is that of the object.
    np.testing.assert_array_equal(new.semantic, row(0, IGNORE_INDEX, 1, 1, 1, IGNORE_INDEX, 0))
    np.testing.assert_array_equal(new.masks, [prediction > 0])
    assert new.num_kept == 1


def test_an_object_elsewhere_stands_beside_the_pseudo_mask() -> None:
    target = row(1, 1, 1, 0, 0, 0)
    objects = [instance(row(0, 0, 0, 0, 2, 2) > 0, 2)]
    new = relabel(target, row(1, 1, 1, 0, 0, 0), row(0, 0, 0, 0, 2, 2), objects)
    np.testing.assert_array_equal(new.semantic, row(1, 1, 1, 0, 2, 2))
    np.testing.assert_array_equal(new.masks, [row(0, 0, 0, 0, 1, 1) > 0, row(1, 1, 1, 0, 0, 0) > 0])


def test_an_object_of_which_the_pseudo_mask_has_a_half_or_less_is_kept_whole() -> None:
    target = row(0, 1, 1, 0, 0, 0)
    prediction = row(0, 1, 1, 1, 1, 0)
    new = relabel(target, target, prediction, [instance(prediction > 0, 1)])
    np.testing.assert_array_equal(new.semantic, prediction)


def test_around_an_object_of_another_name_nobody_knows() -> None:
    target = row(0, 1, 1, 1, 0, IGNORE_INDEX)
    prediction = row(0, 2, 2, 2, 2, 2)
    new = relabel(target, row(0, 1, 1, 1, 0, 0), prediction, [instance(prediction > 0, 2)])
    # What the pseudo-labels leave open is the student's to say.
    np.testing.assert_array_equal(new.semantic, row(0, *[IGNORE_INDEX] * 4, 2))


def test_what_two_name_otherwise_is_void() -> None:
    target = row(1, 1, 1, 0, 0)
    # No object was kept: the map alone; its background overrules nothing.
    new = relabel(target, row(1, 1, 1, 0, 0), row(2, 1, 0, 2, 0), [])
    np.testing.assert_array_equal(new.semantic, row(IGNORE_INDEX, 1, 1, IGNORE_INDEX, 0))
    np.testing.assert_array_equal(new.masks, [row(1, 1, 1, 0, 0) > 0])
    # The same with an object of another name.
    new = relabel(
        target, row(1, 1, 1, 0, 0), row(0, 2, 2, 2, 2), [instance(row(0, 1, 1, 1, 1) > 0, 2)]
    )
    np.testing.assert_array_equal(new.semantic, row(*[IGNORE_INDEX] * 3, 2, 2))


def plain(
    target: np.ndarray, pseudo: np.ndarray, prediction: np.ndarray, objects: list[Instance]
) -> tuple[np.ndarray, list[set[tuple[int, int]]]]:
    """The rules, pixel by pixel."""
    pixels = [tuple(map(int, at)) for at in np.argwhere(np.ones(target.shape, bool))]
    owner = {at: next((n for n, it in enumerate(objects) if it.mask[at]), None) for at in pixels}
    covered = {}
    for number in set(pseudo.ravel().tolist()) - {0}:
        own = [at for at in pixels if pseudo[at] == number]
        share = sum(owner[at] is not None for at in own) / len(own)
        covered[number] = share > 0.5
    fresh = {
        number: sum(target[at] > 0 for at in own) <= len(own) / 2
        for number in range(len(objects))
        if (own := [at for at in pixels if owner[at] == number])
    }
    semantic = np.empty(target.shape, np.int16)
    groups: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for at in pixels:
        old, seen = int(target[at]), int(prediction[at])
        place = owner[at]
        if place is not None:
            label = objects[place].label_id
            semantic[at] = label if old in (-1, label) or (old == 0 and fresh[place]) else -1
            groups.setdefault((0, place), set()).add(at)
            continue
        semantic[at] = -1 if seen not in (0, old) or covered.get(int(pseudo[at]), False) else old
        if pseudo[at] and not covered[int(pseudo[at])]:
            groups.setdefault((1, int(pseudo[at])), set()).add(at)
    return semantic, [groups[key] for key in sorted(groups)]


@pytest.mark.parametrize("seed", range(60))
def test_it_is_what_a_plain_reading_of_the_rules_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = [(5, 7), (1, 1), (1, 6), (8, 3)][seed % 4]
    target = rng.integers(-1, 4, shape).astype(np.int16)
    pseudo = rng.integers(0, 4, shape).astype(np.uint8)
    prediction = rng.integers(0, 4, shape).astype(np.int16)
    masks = [rng.random(shape) < rng.random() for _ in range(rng.integers(0, 5))]
    objects = [instance(mask, int(rng.integers(1, 4))) for mask in masks if mask.any()]
    new = relabel(target, pseudo, prediction, objects)
    semantic, groups = plain(target, pseudo, prediction, objects)
    np.testing.assert_array_equal(new.semantic, semantic)
    assert [set(map(tuple, np.argwhere(mask).tolist())) for mask in new.masks] == groups
    assert new.masks.shape == (len(groups), *shape)


def test_maps_of_several_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        relabel(row(0, 0), row(0, 0, 0), row(0, 0), [])
