"""Fixtures shared by all tests: a small index dataset and a tiny CLIP with random weights."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

from pipeline.engine.runtime import Runtime
from pipeline.params.base import EncoderParams

TINY_CLIP_CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}


# Few tests that take long. Begun last, they would keep one core busy while the other has no more.
BEGUN_FIRST = ("test_notebook", "test_ray", "test_ablations", "test_lifts", "test_reproduce")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files go to the workers in this order, see `--no-loadscope-reorder`."""
    items.sort(key=lambda item: item.path.stem not in BEGUN_FIRST)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The same sums in the same order, and no fight over the cores, in what tests start too."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, alone or in company."""
    torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator."""
    return np.random.default_rng(0)


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    """Float32 on the CPU, with a cache of its own."""
    return Runtime(device=torch.device("cpu"), amp_dtype=None, seed=0, cache_dir=tmp_path / "cache")


def encoded_image(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    """An image as a file's content."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise_image(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    """An RGB image of random blocks, different for each seed."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture
def make_image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Function that writes `count` different JPEGs 0.jpg, 1.jpg, ... to a folder it makes."""

    def make(name: str = "images", count: int = 8) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for number in range(count):
            image = noise_image(number, width=20 + number, height=30 - number)
            (folder / f"{number}.jpg").write_bytes(encoded_image(image, "JPEG", quality=95))
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Model-config JSON and weights file of a random CLIP: 32 x 32 input, embeddings of 16."""
    folder = tmp_path_factory.mktemp("tiny_clip")
    model_path, weights_path = folder / "tiny.json", folder / "tiny.safetensors"
    model_path.write_text(json.dumps(TINY_CLIP_CONFIG))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(CLIP(**TINY_CLIP_CONFIG).state_dict(), weights_path)
    return model_path, weights_path


@pytest.fixture
def encoder(tiny_clip: tuple[Path, Path]) -> EncoderParams:
    """The tiny CLIP as params name it."""
    model, weights = map(str, tiny_clip)
    return EncoderParams(model=model, pretrained=weights)
