"""The plain reading of DenseCLIP+'s training images beside the pipeline's, draw by draw."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.formats.images import encode_label, load_image
from pipeline.formats.labels import IGNORE_INDEX
from pipeline.training.augmentation import augment
from pipeline.training.settings import Augmentation
from speed.inputs import ellipses, photo
from speed.plus_step import MEAN, STD, plain_sample


@pytest.mark.parametrize("size", [(60, 45), (45, 60), (90, 20), (30, 30)])
@pytest.mark.parametrize("photometric", [0.0, 1.0])
def test_equal_draws_give_equal_crops(
    size: tuple[int, int], photometric: float, tmp_path: Path
) -> None:
    width, height = size
    labels = np.ones((height, width), dtype=np.int16)
    for label_id, mask in enumerate(ellipses(0, 3, (height, width)), start=2):
        labels[mask] = label_id
    labels[:3] = IGNORE_INDEX
    Image.fromarray(np.asarray(photo(0, width, height))).save(tmp_path / "image.png")
    (tmp_path / "label.png").write_bytes(encode_label(labels, 4))
    small: dict[str, Any] = {"crop_size": 40, "base_size": [160, 40], "max_share": 0.6}
    settings = Augmentation(**small, photometric=photometric)
    image = load_image(tmp_path / "image.png")
    for seed in range(25):
        pixels, seen = plain_sample(
            tmp_path / "image.png", tmp_path / "label.png", settings, random.Random(seed)
        )
        ours, our_labels = augment(image, labels, settings, random.Random(seed))
        assert (seen.numpy() == our_labels).all()
        difference = np.abs(pixels.permute(1, 2, 0).numpy() * STD + MEAN - ours)
        # Colours go through OpenCV's HSV of 8 bits twice.
        assert difference.max() <= 2.01 if photometric == 0 else difference.mean() < 4
