"""Draw the demo's world: an unlabelled index dataset, its hidden truth, and two benchmarks.

Every image is a function of (seed, part, number) alone. No stage reads the truth except to score.
"""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.benchmarks.voc import CLASSES, OBJECTS, VocWriter, encode_index_png
from pipeline.demo.glyphs import KNOWN_FAMILIES, UNSEEN_FAMILY, glyph_names, load_glyphs
from pipeline.demo.scene import BENCH_BACKGROUNDS, OUTLINED, Scene, Style, choose_names, draw_scene
from pipeline.engine.progress import StageRun
from pipeline.files import check_replaceable, replace_dir
from pipeline.params.sections import WorldParams

INDEX_STREAM = 1
# Of the known and the unseen part of a benchmark: settings are chosen on `dev`, `voc` is reported.
BENCH_STREAMS = {"dev": (2, 3), "voc": (4, 5)}
INDEX, TRUTH = "index", "index_truth"
WRITTEN = re.compile("|".join((INDEX, TRUTH, *BENCH_STREAMS)))
INDEX_COUNTS = (0.10, 0.62, 0.20, 0.08)
BENCH_COUNTS = (0.0, 0.35, 0.40, 0.25)
CATEGORY_SHARE = 0.75
INDEX_OTHERS = 11
JPEG_QUALITY = 92


def draw_world(out_dir: Path, *, params: WorldParams, seed: int, stats_path: Path) -> None:
    """Write `index/`, `index_truth/`, `dev/` and `voc/` below `out_dir`.

    `index/` holds plain JPEGs: one to three objects or none, from the known glyph families, and
    `INDEX_OTHERS` kinds of object that no category names. `index_truth/` holds their masks, to
    score pseudo-masks with. `dev/`, which settings are chosen on, and `voc/`, which is reported,
    are benchmarks of as many images in PASCAL VOC's layout: splits `known` (new renderings of the
    known families), `unseen` (a family drawn nowhere else) and `val` (both).

    Raises:
        PipelineError: `out_dir` holds something else, or the fonts of the extra `demo` are not
            installed.
    """
    check_replaceable(out_dir, WRITTEN, needed=TRUTH)
    known = Style(load_glyphs(KNOWN_FAMILIES), params.size, outlined=OUTLINED)
    # Noto's glyphs are line drawings with an outline of their own.
    unseen = Style(load_glyphs((UNSEEN_FAMILY,)), params.size)
    total = params.index_images + len(BENCH_STREAMS) * params.bench_images
    with (
        replace_dir(out_dir) as folder,
        StageRun("world", stats_path=stats_path, total=total) as run,
    ):
        _draw_index(folder, known, params.index_images, seed=seed, run=run)
        for bench, streams in BENCH_STREAMS.items():
            writer = VocWriter(folder / bench)
            ids: list[str] = []
            for part, style, count, stream in (
                ("known", known, (params.bench_images + 1) // 2, streams[0]),
                ("unseen", unseen, params.bench_images // 2, streams[1]),
            ):
                style = replace(style, backgrounds=BENCH_BACKGROUNDS)
                drawn = _draw_bench(writer, part, style, count, rng_key=(seed, stream), run=run)
                writer.write_split(part, drawn)
                ids += drawn
            writer.write_split("val", ids)


def _draw_index(folder: Path, style: Style, count: int, *, seed: int, run: StageRun) -> None:
    images, truth = folder / INDEX, folder / TRUTH
    for part in (images, truth / CLASSES, truth / OBJECTS):
        part.mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng([seed, INDEX_STREAM, number])
        scene = random_scene(rng, style, INDEX_COUNTS)
        stem = f"{number:05d}"
        (images / f"{stem}.jpg").write_bytes(_jpeg(scene.image))
        semantic = semantic_truth(scene)
        (truth / CLASSES / f"{stem}.png").write_bytes(encode_index_png(semantic))
        (truth / OBJECTS / f"{stem}.png").write_bytes(encode_index_png(scene.instances))
        run.advance()


def _draw_bench(
    writer: VocWriter,
    name: str,
    style: Style,
    count: int,
    *,
    rng_key: tuple[int, int],
    run: StageRun,
) -> list[str]:
    image_ids = [f"{name}_{number:04d}" for number in range(count)]
    for number, image_id in enumerate(image_ids):
        rng = np.random.default_rng([*rng_key, number])
        scene = random_scene(rng, style, BENCH_COUNTS)
        semantic = semantic_truth(scene)
        objects = np.where(semantic > 0, scene.instances, 0)
        writer.add(image_id, _jpeg(scene.image), semantic, objects)
        run.advance()
    return image_ids


def random_scene(rng: np.random.Generator, style: Style, shares: tuple[float, ...]) -> Scene:
    categories, others = glyph_names()
    others = [name for name in others[:INDEX_OTHERS] if name in style.glyphs]
    count = int(rng.choice(len(shares), p=shares))
    return draw_scene(rng, choose_names(rng, count, categories, others, CATEGORY_SHARE), style)


def semantic_truth(scene: Scene) -> np.ndarray:
    """(S, S) uint8 label ids: 1-based category of the object, 0 for anything else."""
    categories, _ = glyph_names()
    label_ids = [categories.index(n) + 1 if n in categories else 0 for n in scene.names]
    return np.array([0, *label_ids], np.uint8)[scene.instances]


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
