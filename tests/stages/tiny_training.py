"""A training of a tiny ZUTIS on drawn squares: label shards, params, runs and what they leave."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.engine.runtime import Runtime
from pipeline.formats.images import encode_jpeg, encode_label, encode_png
from pipeline.methods.students import StudentParams, TrainParams, ZutisParams
from pipeline.params.base import EncoderParams
from pipeline.params.reading import read_params
from pipeline.stages import train
from tests.formats.shard_folders import write_shards
from tests.processes import Fork, fork_pipeline

CATEGORIES = ["cat", "dog"]
BACKGROUND = ["background", "grass"]
SEED = 5


def write_labels(folder: Path, *, shard_size: int = 4) -> Path:
    """Mask and label shards in one: four squares a category, of its colour, and one negative."""
    noted = {"pseudo_label": {"categories": CATEGORIES}}
    write_shards(_shard_samples(), folder, shard_size=shard_size, settings=noted)
    return folder


def _shard_samples() -> Iterator[dict[str, Any]]:
    colours = {0: (120, 120, 120), 1: (250, 30, 30), 2: (30, 30, 250)}
    for number, label_id in enumerate((1, 1, 1, 1, 2, 2, 2, 2, 0)):
        mask = np.zeros((40, 36), dtype=bool)
        if label_id:
            mask[2 + number : 26, 4 : 20 + number] = True
        pixels = np.full((40, 36, 3), 120, dtype=np.uint8)
        pixels[mask] = colours[label_id]
        yield {
            "__key__": f"{number:04d}_{label_id}",
            "jpg": encode_jpeg(Image.fromarray(pixels)),
            "mask.png": encode_png(mask),
            "label.png": encode_label(np.zeros(mask.shape, dtype=int), 2),
            "confidence.png": encode_png(np.zeros(mask.shape, dtype=np.uint8)),
            "json": {
                "category": ["background", *CATEGORIES][label_id],
                "label_id": label_id,
                "sha256": f"{number:064d}",
            },
        }


def small_params(encoder: EncoderParams, **changes: Any) -> TrainParams:
    settings: dict[str, Any] = {
        "encoder": encoder,
        "iterations": 3,
        "batch_size": 2,
        "crop_size": 32,
        "scale_range": [0.7, 1.2],
        "max_paste": 3,
        "negative_canvas": 0.5,
        "num_queries": 5,
        "decoder_layers": 2,
        "num_heads": 4,
        "feedforward_dim": 32,
        "workers": 0,
        "log_every": 2,
        "learning_rate": 1e-3,
        "encoder_learning_rate": 1e-3,
    }
    return ZutisParams(**{**settings, **changes})


def run(shards_dir: Path, root: Path, params: StudentParams, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "masks_dir": shards_dir,
        "labels_dir": shards_dir,
        "out_dir": root / "zutis",
        "live_dir": root / "live",
        "stats_path": root / "stats.json",
        "categories": CATEGORIES,
        "background": BACKGROUND,
        "runtime": Runtime(torch.device("cpu"), None, seed=SEED, cache_dir=root / "cache"),
    }
    train.run(params=params, **{**settings, **changes})
    return root


def curve(root: Path, name: str) -> list[tuple[int, float]]:
    rows = (root / "live/plots/metrics/train" / f"{name}.tsv").read_text().splitlines()[1:]
    return [(int(step), float(value)) for step, value in (row.split("\t") for row in rows)]


def outputs(root: Path) -> dict[str, bytes]:
    """Files of checkpoint and curves by name."""
    folders = (root / "zutis", root / "live")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(files)}


def train_words(labels_dir: Path, root: Path, params: StudentParams) -> list[str]:
    """Words of the command that trains into `root`, for which it writes a params file."""
    settings = {
        "seed": SEED,
        "device": "cpu",
        "categories": CATEGORIES,
        "background": BACKGROUND,
        "index": {"unused": {"root": "unused"}},
        "train": params.model_dump(mode="json"),
    }
    root.mkdir(exist_ok=True)
    params_path = root / "params.yaml"
    params_path.write_text(json.dumps(settings))
    assert read_params(params_path).train == params
    options = {
        "--masks": labels_dir,
        "--labels": labels_dir,
        "--out": root / "zutis",
        "--live": root / "live",
        "--stats": root / "stats.json",
    }
    words = [str(word) for option in options.items() for word in option]
    return ["--params", str(params_path), "train", *words]


def start_training(labels_dir: Path, root: Path, params: StudentParams) -> Fork:
    """`pipeline train` into `root`, as a process of its own."""
    words = train_words(labels_dir, root, params)
    return fork_pipeline(*words, cwd=root, PIPELINE_CACHE=root / "cache")


def states(root: Path) -> list[Path]:
    return list(root.glob("cache/train/*/last.safetensors"))


def version(root: Path) -> list[int]:
    """What changes when a state is written."""
    return [path.stat().st_ino for path in states(root)]
