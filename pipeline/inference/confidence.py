"""How sure a model is of a name, pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import PipelineError, listing
from pipeline.vocabulary.categories import plain_name

if TYPE_CHECKING:
    from torch import Tensor


def find_name(
    name: str,
    categories: Sequence[str],
    *,
    field: str = "confidence",
    among: str = "the names asked for",
) -> int:
    """The place of a name among some others, by default those asked for, however it is written.

    Raises:
        PipelineError: it is none of them; they are listed.
    """
    places = {plain_name(known): place for place, known in enumerate(categories)}
    if (place := places.get(plain_name(name))) is None:
        raise PipelineError(f"{field}: {name!r} is not among {among}: {listing(categories)}")
    return place


def confidence_map(
    scores: Tensor,
    number: int,
    image: Image.Image,
    *,
    scale: float | None,
    through: Sequence[Sequence[int]] = (),
) -> NDArray[np.float32]:
    """Probability (H, W) in [0, 1] of one label at each pixel of an image.

    Args:
        scores: (1, K, h, w) of the image.
        number: of the label, from 0.
        image: its size is that of the map.
        scale: factor of the scores in their softmax; None where they are probabilities.
        through: (H, W) of resizings of the scores before that.
    """
    from pipeline.models.dense.labels import probability

    size = (image.height, image.width)
    found = probability(scores.float(), number, size, scale=scale, through=through)
    return np.asarray(found[0].cpu().numpy(), dtype=np.float32)
