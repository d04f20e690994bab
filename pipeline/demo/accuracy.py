"""What the demo's tiny CLIP knows, measured on fresh images that no stage ever sees."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from ruamel.yaml import YAML
from torch import Tensor

from pipeline.demo.glyphs import KNOWN_FAMILIES, UNSEEN_FAMILY, glyph_names, load_glyphs
from pipeline.demo.scene import BENCH_BACKGROUNDS, OUTLINED, Scene, Style, draw_scene
from pipeline.demo.world import BENCH_COUNTS, random_scene, semantic_truth
from pipeline.engine.runtime import make_runtime
from pipeline.methods.dense import load_dense_labeller
from pipeline.models.clip import ClipEncoder, load_clip, text_embeddings
from pipeline.params.base import EncoderParams
from pipeline.params.reading import parse_params
from pipeline.presets import preset_text
from pipeline.scoring.confusion import ConfusionMatrix
from pipeline.vocabulary.categories import Names
from pipeline.vocabulary.prompts import PROMPTS_85

PROBE_STREAM, DENSE_PROBE_STREAM = 102, 103
BATCH_SIZE = 96


def measure_accuracy(
    params: EncoderParams, device: torch.device, *, seed: int, images: int
) -> dict[str, float]:
    """Zero-shot accuracy on single objects, and the mIoU of DenseCLIP alone, in percent.

    The nearest of the demo's categories, with the 85 prompts: of `known` families, of the same as
    the `world` outlines them, of the `unseen` family, and of both with every look drawn at random,
    so that shape alone tells (`random_look`, `random_look_unseen`). `denseclip_miou` is over scenes
    like those of the benchmarks, half of them of the unseen family, by `pseudo_label` and
    `background` of the preset `demo`.
    """
    encoder = load_clip(params, device)
    categories, _ = glyph_names()
    texts = text_embeddings(encoder, categories, PROMPTS_85)
    size = encoder.image_size
    known, unseen = load_glyphs(KNOWN_FAMILIES), load_glyphs((UNSEEN_FAMILY,))
    styles = {
        "known": Style(known, size),
        "world": Style(known, size, outlined=OUTLINED),
        "unseen": Style(unseen, size),
        "random_look": Style(known, size, typical=0.0),
        "random_look_unseen": Style(unseen, size, typical=0.0),
    }
    accuracies = {
        name: _zero_shot(encoder, texts, style, categories, seed=seed, images=images)
        for name, style in styles.items()
    }
    return {**accuracies, "denseclip_miou": _dense(params, size, device, seed=seed, images=images)}


def _zero_shot(
    encoder: ClipEncoder,
    texts: Tensor,
    style: Style,
    categories: list[str],
    *,
    seed: int,
    images: int,
) -> float:
    rng = np.random.default_rng([seed, PROBE_STREAM])
    targets = torch.arange(images) % len(categories)
    drawn = [draw_scene(rng, [categories[target]], style) for target in targets]
    correct = 0
    for start in range(0, images, BATCH_SIZE):
        pixels = _pixels(drawn[start : start + BATCH_SIZE], texts.device)
        predicted = (encoder.encode_images(pixels) @ texts.T).argmax(dim=1).cpu()
        correct += int((predicted == targets[start : start + BATCH_SIZE]).sum())
    return round(100 * correct / images, 2)


def _dense(
    params: EncoderParams, size: int, device: torch.device, *, seed: int, images: int
) -> float:
    categories, _ = glyph_names()
    demo = parse_params(YAML(typ="safe").load(preset_text("demo")), name="demo")
    labeller = load_dense_labeller(
        demo.pseudo_label.model_copy(update={"encoder": params}),
        Names(categories, demo.background),
        make_runtime(device=device.type, seed=seed),
    )
    confusion = ConfusionMatrix(1 + len(categories))
    scenes = list(_bench_scenes(size, seed=seed, images=images))
    for start in range(0, images, BATCH_SIZE):
        part = scenes[start : start + BATCH_SIZE]
        labels, _ = labeller.label(_pixels(part, device))
        for scene, label in zip(part, labels.cpu().numpy(), strict=True):
            confusion.update(target=semantic_truth(scene), prediction=label)
    return round(100 * confusion.compute().miou, 2)


def _bench_scenes(size: int, *, seed: int, images: int) -> Iterator[Scene]:
    styles = (
        Style(load_glyphs(KNOWN_FAMILIES), size, outlined=OUTLINED, backgrounds=BENCH_BACKGROUNDS),
        Style(load_glyphs((UNSEEN_FAMILY,)), size, backgrounds=BENCH_BACKGROUNDS),
    )
    for number in range(images):
        rng = np.random.default_rng([seed, DENSE_PROBE_STREAM, number])
        yield random_scene(rng, styles[number % 2], BENCH_COUNTS)


def _pixels(scenes: list[Scene], device: torch.device) -> Tensor:
    images = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    return images.permute(0, 3, 1, 2).to(device) / 255
