"""The stages of the index dataset over the bare forward of their networks.

What counts is the time that a stage itself reports: from its first image to the last byte written,
without loading the weights, which does not grow with the index.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.formats.images import decode_label, decode_png, load_image
from pipeline.formats.shards import open_samples
from pipeline.formats.sources import sample_key
from pipeline.formats.tables import ArchiveRow, embedding_matrix, write_archives
from pipeline.methods.dense import DenseClipParams
from pipeline.methods.masks import SelfMaskParams
from pipeline.models.clip import load_clip
from pipeline.models.dense.denseclip import load_denseclip
from pipeline.models.dense.labels import label_and_confidence
from pipeline.models.masks.selfmask import SelfMask, SelfMaskConfig, load_selfmask, save_selfmask
from pipeline.params.base import EncoderParams
from pipeline.params.sections import EmbedParams
from pipeline.params.sources import SourceParams
from pipeline.stages import embed, mask, pseudo_label
from pipeline.vocabulary.categories import Names
from speed.bilateral import published_solve
from speed.harness import Bench, Curve, Pair, Timed
from speed.inputs import TINY_VISION, MakeRuntime, cpu_runtime, jpeg, photo, write_clip

Vision = dict[str, Any]

VIT_B_32 = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
VIT_B_16 = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16}
VIT_L_14_336 = {"image_size": 336, "layers": 24, "width": 1024, "patch_size": 14}
TINY_SELFMASK = SelfMaskConfig(
    dim=32, depth=2, num_heads=2, num_queries=4, decoder_layers=2, mlp_ratio=2
)
CATEGORIES = [f"category {number}" for number in range(1, 21)]
EMBEDDING_TOLERANCE = 2e-3  # they are stored in float16
AGREEMENT = 0.999


def _write_index(folder: Path, count: int, *, quick: bool) -> list[bytes]:
    """A folder of photos; their files."""
    width, height = (64, 48) if quick else (500, 375)
    (folder / "index").mkdir()
    files = [jpeg(photo(number, width, height)) for number in range(count)]
    for number, data in enumerate(files):
        (folder / "index" / f"{number:05d}.jpg").write_bytes(data)
    return files


def _write_encoder(folder: Path, vision: Vision, *, quick: bool) -> EncoderParams:
    dim = 768 if vision["width"] == 1024 else 512
    return write_clip(
        folder, embed_dim=64 if quick else dim, vision=TINY_VISION if quick else vision
    )


def _stage(folder: Path, run: Callable[[Path, Path, Path], None]) -> Timed:
    """Run a stage without anything in its cache; `run` gets cache, output and stats paths."""
    cache_dir, out_dir, stats_path = folder / "cache", folder / "out", folder / "stats/stage.json"
    shutil.rmtree(cache_dir, ignore_errors=True)
    run(cache_dir, out_dir, stats_path)
    return Timed(json.loads((folder / "times/stage.json").read_text())["seconds"], out_dir)


def _members(shard_dir: Path, name: str) -> Iterator[bytes]:
    """One member of every sample of a folder of shards, in order."""
    store = open_samples(shard_dir)
    return (store.member(index, name) for index in range(len(store)))


def _pixels(files: list[bytes]) -> Tensor:
    """(N, 3, H, W) in [0, 1]."""
    arrays = np.stack([np.asarray(load_image(data)) for data in files])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float().contiguous() / 255


def prepare_embed(
    folder: Path,
    quick: bool,
    *,
    make: MakeRuntime = cpu_runtime,
    vision: Vision = VIT_B_32,
    count: int = 64,
    batch_size: int = 32,
    workers: int = 2,
) -> Pair:
    """Bare forward, and the stage, on the device of the runtime."""
    files = _write_index(folder, count, quick=quick)
    runtime = make(folder / "cache")
    params = EmbedParams(
        encoder=_write_encoder(folder, vision, quick=quick), batch_size=batch_size, workers=workers
    )
    encoder = load_clip(params.encoder, runtime.device)
    images = torch.stack([encoder.preprocess(load_image(data)) for data in files])
    images = images.to(runtime.device)

    @torch.inference_mode()
    def bare() -> Tensor:
        with runtime.autocast():
            parts = [encoder.encode_images(part) for part in images.split(params.batch_size)]
        return torch.cat(parts).float().cpu()

    def run(cache_dir: Path, out_dir: Path, stats_path: Path) -> None:
        embed.run(
            name="index",
            source=SourceParams(root=folder / "index"),
            out_dir=out_dir,
            params=params,
            runtime=make(cache_dir),
            stats_path=stats_path,
        )

    def check(embeddings: Tensor, out_dir: Path) -> str:
        stored = embedding_matrix(pq.read_table(out_dir)["embedding"])
        difference = float(np.abs(stored - embeddings.numpy()).max())
        assert difference <= EMBEDDING_TOLERANCE, f"embeddings differ by {difference:.1e}"
        return f"embeddings within {difference:.0e}"

    return Pair(bare, lambda: _stage(folder, run), check)


def prepare_mask(
    folder: Path,
    quick: bool,
    *,
    make: MakeRuntime = cpu_runtime,
    count: int = 3,
    batch_size: int = 16,
    workers: int = 2,
) -> Pair:
    """Bare forward, and the stage with its solver, on the device of the runtime."""
    files = _write_index(folder, count, quick=quick)
    runtime = make(folder / "cache")
    weights = _write_selfmask(folder, TINY_SELFMASK if quick else SelfMaskConfig())
    network = load_selfmask(weights, runtime.device)
    archives_path = _write_archives(folder, files)
    images = _pixels(files).to(runtime.device).split(batch_size)
    # Masks of random weights may be empty, and those are not refined: half of the pixels are in.
    with runtime.autocast():
        probs = torch.cat([network.saliency(part).cpu() for part in images])
    threshold = float(probs.median())
    coarse = (probs > threshold).numpy()

    @torch.inference_mode()
    def bare() -> Tensor:
        with runtime.autocast():
            return torch.cat([network(part).objectness_logits for part in images]).cpu()

    def run(cache_dir: Path, out_dir: Path, stats_path: Path) -> None:
        mask.run(
            archives_path=archives_path,
            out_dir=out_dir,
            params=SelfMaskParams(
                weights=weights, threshold=threshold, batch_size=batch_size, workers=workers
            ),
            runtime=make(cache_dir),
            stats_path=stats_path,
        )

    def check(_: Tensor, out_dir: Path) -> str:
        masks = np.stack([decode_png(data) > 0 for data in _members(out_dir, "mask.png")])
        expected = [
            published_solve(np.asarray(load_image(data)), mask) > 0.5
            for data, mask in zip(files, coarse, strict=True)
        ]
        agreement = float((masks == np.stack(expected)).mean())
        assert agreement >= AGREEMENT, f"{1 - agreement:.1%} of the pixels differ"
        return f"the network's masks after the published solver ({agreement:.2%} of the pixels)"

    return Pair(bare, lambda: _stage(folder, run), check)


def _write_selfmask(folder: Path, config: SelfMaskConfig) -> Path:
    """Weights of a SelfMask, all random."""
    weights = folder / "selfmask.safetensors"
    torch.manual_seed(0)
    save_selfmask(SelfMask(config), weights)
    return weights


def _write_archives(folder: Path, files: list[bytes]) -> Path:
    """The index as the archive of one category."""
    path = folder / "archives.parquet"
    write_archives(path, [_row(folder, number, data) for number, data in enumerate(files)])
    return path


def _row(folder: Path, number: int, data: bytes) -> ArchiveRow:
    """The row of an index image in the archive of the first category."""
    name = f"{number:05d}.jpg"
    image = load_image(data)
    return ArchiveRow(
        category=CATEGORIES[0],
        label_id=1,
        rank=1 + number,
        key=sample_key("index", name),
        similarity=0.5,
        source="index",
        path=str(folder / "index" / name),
        member=None,
        offset=None,
        width=image.width,
        height=image.height,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def prepare_pseudo_label(
    folder: Path,
    quick: bool,
    *,
    make: MakeRuntime = cpu_runtime,
    count: int = 6,
    batch_size: int = 16,
    workers: int = 2,
) -> Pair:
    """Bare forward, and the stage, on the device of the runtime."""
    files = _write_index(folder, count, quick=quick)
    runtime = make(folder / "cache")
    params = DenseClipParams(
        encoder=_write_encoder(folder, VIT_B_16, quick=quick),
        templates="name",
        batch_size=batch_size,
        workers=workers,
    )
    model = load_denseclip(params, Names(CATEGORIES), runtime)
    _write_masks(folder, files)
    images = _pixels(files).to(runtime.device)

    @torch.inference_mode()
    def bare() -> Tensor:
        with runtime.autocast():
            parts = [model(part) for part in images.split(params.batch_size)]
        return torch.cat(parts).float().cpu()

    def run(cache_dir: Path, out_dir: Path, stats_path: Path) -> None:
        pseudo_label.run(
            mask_dir=folder / "masks",
            out_dir=out_dir,
            categories=CATEGORIES,
            params=params,
            runtime=make(cache_dir),
            stats_path=stats_path,
        )

    def check(scores: Tensor, out_dir: Path) -> str:
        expected, _ = label_and_confidence(scores, (images.shape[2], images.shape[3]))
        stored = np.stack([decode_label(data) for data in _members(out_dir, "label.png")])
        agreement = float((stored == expected.numpy()).mean())
        assert agreement >= AGREEMENT, f"{1 - agreement:.1%} of the labels differ"
        return f"labels of the bare network's scores ({agreement:.2%} of the pixels)"

    return Pair(bare, lambda: _stage(folder, run), check)


def _write_masks(folder: Path, files: list[bytes]) -> None:
    """Mask shards of the index, made by a tiny network: what is in them does not matter here."""
    mask.run(
        archives_path=_write_archives(folder, files),
        out_dir=folder / "masks",
        params=SelfMaskParams(weights=_write_selfmask(folder, TINY_SELFMASK), refine=False),
        runtime=cpu_runtime(folder / "mask-cache"),
        stats_path=folder / "mask-stats.json",
    )


def _prepare_many_masks(folder: Path, num_images: int, _: int) -> None:
    """Archives of many small photos, each a file of its own content."""
    _write_selfmask(folder, TINY_SELFMASK)
    photos = [jpeg(photo(number, 128, 96)) for number in range(min(num_images, 64))]
    (folder / "index").mkdir()
    rows = []
    for number in range(num_images):
        # What follows the end of a JPEG belongs to its hash and not to its pixels.
        data = photos[number % len(photos)] + number.to_bytes(8, "big")
        (folder / "index" / f"{number:05d}.jpg").write_bytes(data)
        rows.append(_row(folder, number, data))
    write_archives(folder / "archives.parquet", rows)


def _mask_many(folder: Path) -> None:
    mask.run(
        archives_path=folder / "archives.parquet",
        out_dir=folder / "out",
        params=SelfMaskParams(weights=folder / "selfmask.safetensors", workers=0),
        runtime=cpu_runtime(folder / "cache"),
        stats_path=folder / "stats.json",
    )


CURVE = Curve(
    name="mask",
    title="mask: archive images of 128 x 96, tiny SelfMask, solver",
    sizes=(500, 2_000, 8_000),
    bytes_of_item=lambda _: 30_000,
    prepare=_prepare_many_masks,
    run=_mask_many,
)

BENCHES = [
    Bench(
        name="embed",
        title="embed, 64 photos of 500 x 375, ViT-B/32 at 224, over the bare forward",
        target=1.15,
        stretch=1.05,
        prepare=prepare_embed,
        overhead=True,
    ),
    Bench(
        name="mask",
        title="mask, 3 photos of 500 x 375, SelfMask ViT-S/8 with solver, over the bare forward",
        target=1.15,
        stretch=1.05,
        prepare=prepare_mask,
        overhead=True,
    ),
    Bench(
        name="pseudo_label",
        title="pseudo_label, 6 photos of 500 x 375, ViT-B/16, over the bare forward",
        target=1.15,
        stretch=1.05,
        prepare=prepare_pseudo_label,
        overhead=True,
    ),
]
