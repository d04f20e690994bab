"""Linking of objects to tracks: drawn shapes that move, and a plain second reading."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from pipeline.formats.predictions import Instance
from pipeline.inference.tracking import Tracker

SIZE = (40, 80)


def box(
    x: int, y: int, *, side: int = 10, label: int = 1, look: int | None = None, score: float = 1.0
) -> Instance | None:
    """A square at a place, cut off by the image's border; None outside."""
    mask = np.zeros(SIZE, bool)
    mask[max(0, y) : max(0, y + side), max(0, x) : max(0, x + side)] = True
    embedding = None if look is None else np.eye(4, dtype=np.float32)[look]
    return from_mask(mask, label=label, embedding=embedding, score=score)


def from_mask(
    mask: np.ndarray, *, label: int, embedding: np.ndarray | None, score: float = 1.0
) -> Instance | None:
    if not mask.any():
        return None
    rows, columns = np.nonzero(mask)
    x0, y0, x1, y1 = columns.min(), rows.min(), columns.max(), rows.max()
    crop = mask[y0 : y1 + 1, x0 : x1 + 1]
    return Instance(label, score, crop, (x0, y0, x1, y1), mask.shape, embedding)


def follow(frames: list[list[Instance | None]], **options: float) -> list[list[int]]:
    tracker = Tracker(**options)
    return [tracker.update([item for item in frame if item is not None]) for frame in frames]


def test_a_moving_object_keeps_its_track() -> None:
    assert follow([[box(3 * step, 5)] for step in range(20)]) == [[1]] * 20


def test_objects_that_cross_are_told_apart_by_how_they_look() -> None:
    """Two of one category on one line; the better one, listed first, changes half-way."""
    frames = []
    for step in range(13):
        right, left = box(5 * step, 10, look=0), box(60 - 5 * step, 10, look=1)
        frames.append([right, left] if step < 7 else [left, right])
    assert follow(frames) == [[1, 2]] * 7 + [[2, 1]] * 6


def test_objects_that_pass_beside_each_other_are_told_apart_by_their_masks() -> None:
    frames = [[box(3 * step, 2), box(60 - 3 * step, 22)] for step in range(20)]
    assert follow(frames) == [[1, 2]] * 20


def test_one_that_is_hidden_for_some_frames_comes_back_and_a_later_one_is_new() -> None:
    seen, empty = [box(30, 10)], []
    assert follow([seen, empty, empty, seen], patience=2)[3] == [1]
    assert follow([seen, empty, empty, empty, seen], patience=2)[4] == [2]
    assert follow([seen, seen], patience=0) == [[1], [1]]
    assert follow([seen, empty, seen], patience=0) == [[1], [], [2]]


def test_one_that_leaves_and_comes_back_at_the_border() -> None:
    places = [9, 3, -3, -8, -12, -12, -8, -3, 3, 9]
    found = follow([[box(x, 10)] for x in places], threshold=0.2)
    assert [ids for ids in found if ids] == [[1]] * 8
    assert found[4:6] == [[], []]


def test_empty_frames_and_categories() -> None:
    assert follow([[], [box(0, 0)], [], [box(0, 0, label=2)]]) == [[], [1], [], [2]]
    assert Tracker().tracks == []


def test_frames_of_another_size_start_new_tracks_without_looks() -> None:
    small = from_mask(np.ones((4, 4), bool), label=1, embedding=None)
    assert follow([[box(0, 0)], [small], [small]]) == [[1], [2], [2]]


@pytest.mark.parametrize(("overlap", "linked"), [(4, False), (5, True)])
def test_a_pair_needs_the_threshold(overlap: int, linked: bool) -> None:
    """Rows of 5 of 10 pixels in common: IoU 5 / 10 against a row of 5."""
    row = np.zeros(SIZE, bool)
    row[0, :10] = True
    part = np.zeros(SIZE, bool)
    part[0, :overlap] = True
    frames = [[from_mask(mask, label=1, embedding=None)] for mask in (row, part)]
    assert (follow(frames) == [[1], [1]]) is linked


def test_what_is_known_of_a_track() -> None:
    tracker = Tracker()
    for frame in ([box(0, 0)], [], [box(1, 0), box(50, 20, label=2)]):
        tracker.update(frame)
    facts = [(t.track_id, t.label_id, t.first, t.last, t.frames) for t in tracker.tracks]
    assert facts == [(1, 1, 0, 2, 2), (2, 2, 2, 2, 1)]


def plain_follow(frames: list[list[Instance]], threshold: float, patience: int) -> list[list[int]]:
    """The method written out: every assignment is tried, masks are compared pixel by pixel."""
    tracks: list[tuple[int, Instance, int]] = []
    found, count = [], 0
    for time, frame in enumerate(frames):
        alive = [track for track in tracks if time - track[2] <= patience + 1]
        gains = np.zeros((len(frame), len(alive)))
        for row, item in enumerate(frame):
            for column, (_, other, _) in enumerate(alive):
                union = (item.mask | other.mask).sum()
                value = (item.mask & other.mask).sum() / union
                value = (value + max(0.0, float(item.embedding @ other.embedding))) / 2
                if item.label_id == other.label_id and value >= threshold:
                    gains[row, column] = value
        padded = np.zeros((len(frame), len(alive) + len(frame)))  # the last stand for none
        padded[:, : len(alive)] = gains
        best = max(
            permutations(range(padded.shape[1]), len(frame)),
            key=lambda chosen: sum(padded[row, column] for row, column in enumerate(chosen)),
        )
        ids = []
        for row, column in enumerate(best):
            if padded[row, column] > 0:
                number = alive[column][0]
            else:
                count += 1
                number = count
            ids.append(number)
        updated = {number: (number, item, time) for number, item in zip(ids, frame, strict=True)}
        tracks = [*(t for t in alive if t[0] not in updated), *updated.values()]
        found.append(ids)
    return found


def test_the_same_as_a_plain_reading(rng: np.random.Generator) -> None:
    for _ in range(30):
        frames = []
        for _ in range(6):
            items = []
            for _ in range(rng.integers(0, 4)):
                mask = np.zeros(SIZE, bool)
                x, y, width, height = rng.integers(0, 12, 4)
                mask[y : y + 4 + height, x : x + 4 + width] = True
                mask &= rng.random(SIZE) < 0.9
                look = rng.standard_normal(3).astype(np.float32)
                look /= np.linalg.norm(look)
                items.append(from_mask(mask, label=int(rng.integers(1, 3)), embedding=look))
            frames.append(items)
        options = {"threshold": 0.4, "patience": int(rng.integers(0, 3))}
        assert follow(frames, **options) == plain_follow(frames, **options)
