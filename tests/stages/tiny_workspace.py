"""All batch stages on a small world with tiny random networks, as functions of folders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.benchmarks.voc import VocWriter
from pipeline.engine.runtime import Runtime
from pipeline.engine.shard_run import Executor
from pipeline.formats.sources import list_images
from pipeline.formats.tables import ArchiveRow, write_archives
from pipeline.methods.dense import DenseClipParams
from pipeline.methods.masks import SelfMaskParams
from pipeline.models.masks.selfmask import SelfMask, SelfMaskConfig, save_selfmask
from pipeline.params.base import EncoderParams
from pipeline.params.benches import BenchParams, VocBench
from pipeline.params.sections import BankParams, EmbedParams, EvaluateParams, RetrieveParams
from pipeline.params.sources import SourceParams
from pipeline.stages import bank, embed, mask, predict_bench, pseudo_label, retrieve
from tests.conftest import encoded_image, noise_image
from tests.stages.tiny_checkpoint import CATEGORIES, write_checkpoint

SHARDED = ("embed", "mask", "bank", "pseudo_label", "predict_bench")
STAGES = (*SHARDED, "retrieve")
SELFMASK = SelfMaskConfig(
    dim=16, depth=1, num_heads=2, num_queries=3, decoder_layers=1, mlp_ratio=2, grid=4
)


@dataclass(frozen=True)
class Workspace:
    """Images, archives, masks, a checkpoint and a benchmark.

    Attributes:
        root: folder of all that the stages read.
        encoder: the tiny CLIP.
        images: folder of the index dataset.
    """

    root: Path
    encoder: EncoderParams

    @property
    def images(self) -> Path:
        return self.root / "images"

    def run(
        self, stage: str, out: Path, *, executor: Executor | None = None, **options: Any
    ) -> Path:
        """Run a stage below a folder `out`, which has its cache, too; returns its output."""
        runtime = Runtime(
            device=torch.device("cpu"), amp_dtype=None, seed=0, cache_dir=out / "cache"
        )
        step: Callable[..., None] = getattr(self, f"_{stage}")
        step(out / "made", runtime, out / "stats.json", executor, **options)
        return out / "made"

    def _embed(self, out: Path, runtime: Runtime, stats: Path, executor: Executor | None) -> None:
        embed.run(
            name="pool",
            source=SourceParams(root=self.images),
            out_dir=out,
            params=EmbedParams(
                encoder=self.encoder, batch_size=4, shard_size=10, workers=1, max_error_rate=0.2
            ),
            runtime=runtime,
            stats_path=stats,
            executor=executor,
        )

    def _retrieve(
        self, out: Path, runtime: Runtime, stats: Path, executor: Executor | None
    ) -> None:
        retrieve.run(
            embeddings_dir=self.root / "embeddings",
            sources=["made"],
            out_path=out / "archives.parquet",
            categories=CATEGORIES,
            background=["background"],
            k=7,
            params=RetrieveParams(templates="name", overlap="best", num_negatives=3, block_rows=4),
            encoder=self.encoder,
            runtime=runtime,
            stats_path=stats,
            executor=executor,
        )

    @property
    def mask_params(self) -> SelfMaskParams:
        return SelfMaskParams(
            weights=self.root / "selfmask.safetensors",
            batch_size=2,
            shard_size=10,
            workers=1,
            max_error_rate=0.2,
        )

    def _mask(
        self,
        out: Path,
        runtime: Runtime,
        stats: Path,
        executor: Executor | None,
        *,
        archives: str = "archives",
    ) -> None:
        mask.run(
            archives_path=self.root / f"{archives}.parquet",
            out_dir=out,
            params=self.mask_params,
            runtime=runtime,
            stats_path=stats,
            executor=executor,
        )

    def _some_masks(
        self, out: Path, runtime: Runtime, stats: Path, executor: Executor | None
    ) -> None:
        self._mask(out, runtime, stats, executor, archives="some_archives")

    def _bank(
        self,
        out: Path,
        runtime: Runtime,
        stats: Path,
        executor: Executor | None,
        *,
        benches: Mapping[str, BenchParams] | None = None,
        **params: Any,
    ) -> None:
        """Of the archives of half of the images, and of others."""
        settings = {"sample": 20, "batch_size": 2, "shard_size": 10, "workers": 1, **params}
        bank.run(
            masks_dir=self.root / "some_masks/made",
            embeddings_dir=self.root / "embeddings",
            sources=["made"],
            out_dir=out,
            categories=CATEGORIES,
            background=["background"],
            benches=benches or {},
            load_masks=partial(mask.MaskMaker, self.mask_params),
            params=BankParams(**settings),
            labeller=DenseClipParams(encoder=self.encoder, templates="name"),
            runtime=runtime,
            stats_path=stats,
            executor=executor,
        )

    def _pseudo_label(
        self, out: Path, runtime: Runtime, stats: Path, executor: Executor | None
    ) -> None:
        pseudo_label.run(
            mask_dir=self.root / "masks/made",
            out_dir=out,
            categories=CATEGORIES,
            params=DenseClipParams(
                encoder=self.encoder, templates="name", batch_size=2, shard_size=10, workers=1
            ),
            runtime=runtime,
            stats_path=stats,
            executor=executor,
        )

    def _predict_bench(
        self, out: Path, runtime: Runtime, stats: Path, executor: Executor | None
    ) -> None:
        predict_bench.run(
            bench_name="tiny",
            bench=VocBench(format="voc", root=self.root / "voc", categories=CATEGORIES),
            checkpoint_dir=self.root / "zutis",
            out_dir=out,
            params=EvaluateParams(batch_size=2),
            baseline=DenseClipParams(encoder=self.encoder, templates="name"),
            background=["background"],
            runtime=runtime,
            stats_path=stats,
            shard_size=10,
            executor=executor,
        )


def write_workspace(
    root: Path, tiny_clip: tuple[Path, Path], *, index: int, bench: int
) -> Workspace:
    """Write `index` images, each in one of three archives, and a benchmark of `bench` images."""
    model, weights = map(str, tiny_clip)
    workspace = Workspace(root, EncoderParams(model=model, pretrained=weights))
    workspace.images.mkdir(parents=True)
    for number in range(index):
        # Every seventh one is a copy of an earlier one, often in another shard.
        source = number - 6 * (number % 7 == 6)
        image = noise_image(source, 24 + 8 * (source % 3), 24)
        (workspace.images / f"{number:03d}.png").write_bytes(encoded_image(image))
    write_archives(root / "archives.parquet", _archives(workspace))
    write_archives(root / "some_archives.parquet", _archives(workspace)[::2])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_selfmask(SelfMask(SELFMASK), root / "selfmask.safetensors")
    write_checkpoint(root / "zutis", tiny_clip)
    writer = VocWriter(root / "voc")
    for number in range(bench):
        semantic = np.zeros((32, 40), np.uint8)
        semantic[8:20, 8:30] = 1 + number % len(CATEGORIES)
        data = encoded_image(noise_image(number, 40, 32), "JPEG")
        writer.add(f"im{number:03d}", data, semantic, (semantic > 0).astype(np.uint8))
    writer.write_split("val", [f"im{number:03d}" for number in range(bench)])
    workspace.run("mask", root / "masks")
    workspace.run("some_masks", root / "some_masks")
    workspace.run("embed", root / "embeddings")
    return workspace


def _archives(workspace: Workspace) -> list[ArchiveRow]:
    refs = list_images("pool", SourceParams(root=workspace.images))
    return [
        ArchiveRow(
            category=CATEGORIES[number % 3],
            label_id=1 + number % 3,
            rank=1 + number // 3,
            key=ref.key,
            similarity=0.5,
            source="pool",
            path=ref.path,
            member=None,
            offset=None,
            width=24,
            height=24,
            sha256=hashlib.sha256(Path(ref.path).read_bytes()).hexdigest(),
        )
        for number, ref in enumerate(refs)
    ]


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of all files below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
