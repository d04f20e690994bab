"""Objects of consecutive frames, linked to tracks by mask and embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from pipeline.formats.predictions import Instance
from pipeline.formats.rle import Rle, encode_crop, mask_ious

THRESHOLD = 0.5
PATIENCE = 10


@dataclass
class Track:
    """One object over time.

    Attributes:
        track_id: from 1, in the order of appearance.
        label_id: its category.
        first, last: the frames in which it was first and last seen, as `update` counts them.
        frames: in how many it was seen.
        rle: mask when it was last seen.
        embedding: likewise, or None.
    """

    track_id: int
    label_id: int
    first: int
    last: int
    frames: int
    rle: Rle
    embedding: NDArray[np.float32] | None


class Tracker:
    """Links the objects of a frame to those of the frames before.

    Of all one-to-one assignments of objects to tracks of the same category the one with the
    highest sum of affinities is taken (Hungarian method), among pairs that reach the threshold.
    The affinity is the mean of mask IoU and cosine of the embeddings, the IoU alone where one has
    no embedding. What is left starts a track.

    Args:
        threshold: least affinity of a pair.
        patience: frames that a track may miss; it keeps its last mask meanwhile.

    Attributes:
        tracks: all so far, by `track_id`.
    """

    def __init__(self, *, threshold: float = THRESHOLD, patience: int = PATIENCE) -> None:
        self._threshold = threshold
        self._patience = patience
        self._frame = -1
        self._alive: list[Track] = []
        self.tracks: list[Track] = []

    def update(self, instances: Sequence[Instance]) -> list[int]:
        """Take in the next frame; `track_id` of each of its objects."""
        self._frame += 1
        oldest = self._frame - self._patience - 1
        self._alive = [track for track in self._alive if track.last >= oldest]
        rles = [encode_crop(item.crop, item.bbox_xyxy, item.size) for item in instances]
        linked = assign(affinities(self._alive, instances, rles), threshold=self._threshold)
        ids = []
        for number, (instance, rle) in enumerate(zip(instances, rles, strict=True)):
            row = linked.get(number)
            track = self._start(instance, rle) if row is None else self._alive[row]
            track.last, track.rle, track.embedding = self._frame, rle, instance.embedding
            track.frames += 1
            ids.append(track.track_id)
        return ids

    def _start(self, instance: Instance, rle: Rle) -> Track:
        track_id = len(self.tracks) + 1
        frame = self._frame
        track = Track(track_id, instance.label_id, frame, frame, 0, rle, instance.embedding)
        self.tracks.append(track)
        self._alive.append(track)
        return track


def affinities(
    tracks: Sequence[Track], instances: Sequence[Instance], rles: Sequence[Rle]
) -> NDArray[np.float64]:
    """Affinity (T, N) in [0, 1] of tracks and objects; 0 where their categories differ.

    Args:
        tracks: T of them.
        instances: N objects of a frame.
        rles: their masks.
    """
    values = mask_ious([track.rle for track in tracks], rles)
    for row, track in enumerate(tracks):
        for column, instance in enumerate(instances):
            if track.label_id != instance.label_id:
                values[row, column] = 0
            elif track.embedding is not None and instance.embedding is not None:
                cosine = float(track.embedding @ instance.embedding)
                values[row, column] = (values[row, column] + max(0.0, cosine)) / 2
    return values


def assign(values: NDArray[np.float64], *, threshold: float) -> dict[int, int]:
    """Row by column of the pairs with the highest sum among those that reach the threshold."""
    possible = np.where(values >= threshold, values, 0)
    rows, columns = linear_sum_assignment(possible, maximize=True)
    return {
        int(column): int(row)
        for row, column in zip(rows, columns, strict=True)
        if possible[row, column] > 0
    }
