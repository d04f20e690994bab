"""Small benchmarks in their real formats on disk, with the label maps that readers must give.

Every writer fills a folder and returns image id -> semantic mask (H, W), written out by hand: the
label ids of its category list, 0 background, -1 void. JPEGs are RGB, gray and CMYK.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.benchmarks.voc import VocWriter
from tests.conftest import encoded_image

Maps = dict[str, NDArray[np.int16]]

VOC_CATEGORIES = ["cat", "dog"]
CONTEXT_CATEGORIES = ["bag", "sky", "wood"]
COCA_CATEGORIES = ["Yellow duck", "roller-skating"]
IMAGENET_S_CATEGORIES = [f"category {label_id}" for label_id in range(1, 301)]
CUB_CATEGORIES = ["bird"]
JPEG_MODES = ("RGB", "L", "CMYK")

# A cat of one pixel, two dogs that touch, void between cat and dogs.
VOC_SEMANTIC = [
    [1, -1, 2, 2, 2, 2],
    [-1, -1, 2, 2, 2, 2],
    [0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0],
]
VOC_OBJECTS = [
    [1, -1, 2, 2, 3, 3],
    [-1, -1, 2, 2, 3, 3],
    [0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0],
]


def write_voc(root: Path) -> Maps:
    """PASCAL VOC: lists `val` (3 images) and `known` (the second); the second shows nothing."""
    semantic, objects = np.array(VOC_SEMANTIC), np.array(VOC_OBJECTS)
    nothing, tall = np.zeros((4, 6), int), np.array([[2], [0], [0]])
    maps = {
        "2007_000001": (semantic, objects),
        "2007_000002": (nothing, nothing),
        "2007_000003": (tall, (tall > 0).astype(int)),
    }
    writer = VocWriter(root)
    for (image_id, pair), mode in zip(maps.items(), JPEG_MODES, strict=True):
        writer.add(image_id, jpeg(pair[0].shape, mode), *pair)
    writer.write_split("val", list(maps))
    writer.write_split("known", ["2007_000002"])
    return {image_id: pair[0].astype(np.int16) for image_id, pair in maps.items()}


def write_context(root: Path) -> Maps:
    """PASCAL Context as mmsegmentation converts it: gray PNGs of 8 bits, 0 every other class."""
    stored = {
        "2008_000002": [[1, 2, 2, 0], [0, 2, 3, 255]],
        "2008_000003": [[0, 0, 0]],
        "2010_000004": [[3]],
    }
    expected = {
        "2008_000002": [[1, 2, 2, 0], [0, 2, 3, -1]],
        "2008_000003": [[0, 0, 0]],
        "2010_000004": [[3]],
    }
    for (image_id, values), mode in zip(stored.items(), JPEG_MODES, strict=True):
        save_png(root / f"SegmentationClassContext/{image_id}.png", np.array(values, np.uint8))
        save_jpeg(root / f"JPEGImages/{image_id}.jpg", np.shape(values), mode)
    save_jpeg(root / "JPEGImages/2009_000009.jpg", (2, 2), "RGB")  # VOC2010 has more images
    save_text(root / "ImageSets/SegmentationContext/val.txt", *stored)
    save_text(root / "ImageSets/SegmentationContext/train.txt", "2008_000003")
    return as_maps(expected)


def write_coca(root: Path) -> Maps:
    """CoCA: two categories that have a file of the same name."""
    levels = {
        ("Yellow duck", "51499"): [[255, 255, 0], [0, 0, 0]],
        ("Yellow duck", "7"): [[0, 0], [0, 0], [0, 0]],
        ("roller-skating", "51499"): [[255]],
    }
    expected = {
        "Yellow_duck__51499": [[1, 1, 0], [0, 0, 0]],
        "Yellow_duck__7": [[0, 0], [0, 0], [0, 0]],
        "roller-skating__51499": [[2]],
    }
    for ((category, stem), values), mode in zip(levels.items(), JPEG_MODES, strict=True):
        save_png(root / f"binary/{category}/{stem}.png", np.array(values, np.uint8))
        save_jpeg(root / f"image/{category}/{stem}.jpg", np.shape(values), mode)
    return as_maps(expected)


def write_imagenet_s(root: Path, split: str = "validation") -> Maps:
    """ImageNet-S300: 300 folders, images in the first and the last; ids above 255 and void."""
    folders = [f"n{number:08}" for number in range(1, 301)]
    label_ids = {
        (folders[0], "ILSVRC2012_val_00000293"): [[1, 1, 0], [256, 300, 1000]],
        (folders[0], "ILSVRC2012_val_00002138"): [[0, 0]],
        (folders[-1], "ILSVRC2012_val_00000011"): [[300]],
    }
    expected = {
        "n00000001__ILSVRC2012_val_00000293": [[1, 1, 0], [256, 300, -1]],
        "n00000001__ILSVRC2012_val_00002138": [[0, 0]],
        "n00000300__ILSVRC2012_val_00000011": [[300]],
    }
    for part in (split, f"{split}-segmentation"):
        for folder in folders:
            (root / part / folder).mkdir(parents=True)
    for ((folder, stem), values), mode in zip(label_ids.items(), JPEG_MODES, strict=True):
        ids = np.array(values)
        rgb = np.stack([ids % 256, ids // 256, np.zeros_like(ids)], axis=-1).astype(np.uint8)
        save_png(root / f"{split}-segmentation/{folder}/{stem}.png", rgb)
        save_jpeg(root / f"{split}/{folder}/{stem}.JPEG", ids.shape, mode)
    return as_maps(expected)


def write_cub(root: Path) -> Maps:
    """CUB-200-2011: three test images and one for training, of two breeds."""
    files = {
        1: "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18",
        2: "001.Black_footed_Albatross/Black_Footed_Albatross_0009_34",
        3: "002.Laysan_Albatross/Laysan_Albatross_0002_1027",
        4: "002.Laysan_Albatross/Laysan_Albatross_0003_1033",
    }
    levels = {
        1: [[0, 51, 102], [153, 204, 255]],  # how many of five annotators said bird
        2: [[255, 255]],
        3: [[0], [0], [0]],
        4: [[255]],
    }
    expected = {
        "001_Black_footed_Albatross__Black_Footed_Albatross_0046_18": [[0, 0, 0], [1, 1, 1]],
        "002_Laysan_Albatross__Laysan_Albatross_0002_1027": [[0], [0], [0]],
        "002_Laysan_Albatross__Laysan_Albatross_0003_1033": [[1]],
    }
    for (number, file), mode in zip(files.items(), ("RGB", *JPEG_MODES), strict=True):
        values = np.array(levels[number], np.uint8)
        save_png(root / f"segmentations/{file}.png", values)
        save_jpeg(root / f"images/{file}.jpg", values.shape, mode)
    save_text(root / "images.txt", *(f"{number} {file}.jpg" for number, file in files.items()))
    save_text(root / "image_class_labels.txt", "1 1", "2 1", "3 2", "4 2")
    save_text(root / "train_test_split.txt", "1 0", "2 1", "3 0", "4 0")
    save_text(root / "classes.txt", "1 001.Black_footed_Albatross", "2 002.Laysan_Albatross")
    return as_maps(expected)


def as_maps(values: dict[str, list[list[int]]]) -> Maps:
    return {image_id: np.array(rows, np.int16) for image_id, rows in values.items()}


def jpeg(shape: tuple[int, ...], mode: str = "RGB") -> bytes:
    """A JPEG of one colour, (H, W) pixels."""
    return encoded_image(Image.new("RGB", (shape[1], shape[0]), "teal").convert(mode), "JPEG")


def save_jpeg(path: Path, shape: tuple[int, ...], mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(shape, mode))


def save_png(path: Path, values: NDArray[np.integer]) -> None:
    """A PNG of (H, W) greys of 8 or 16 bits, or (H, W, 3) RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, "PNG")


def save_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
