"""Pre-train the tiny CLIP of the demo on rendered image-caption pairs, easy to hard.

Large single objects at 64 px first, then the index dataset's mix, at 64 px and at 96 px. Half of
the objects have a typical look, the others any; shapes are varied beyond the world's, and later
some are blobs of a typical look: so both look and shape tell the name. Only known glyph families
and the backgrounds of the index are used; the benchmarks' seeds and their unseen family never are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pipeline.demo.accuracy import measure_accuracy
from pipeline.demo.glyphs import KNOWN_FAMILIES, glyph_names, load_varied_glyphs
from pipeline.demo.scene import BACKGROUNDS, Scene, Style, choose_names, draw_scene
from pipeline.files import atomic_path, read_json, write_json
from pipeline.models.clip import ClipEncoder, load_clip
from pipeline.models.clip.features import key_and_value
from pipeline.models.clip.loading import build_from_config
from pipeline.models.clip.stem import ConvStem
from pipeline.models.clip.tokens import embed_patches, resize_positions
from pipeline.models.weights.training_state import resume, save_state
from pipeline.models.weights.weights import save_tensors
from pipeline.params.base import EncoderParams
from pipeline.vocabulary.prompts import PROMPTS_85

CONTEXT_LENGTH = 24
PHRASES = ("a {} background", "on a {} background", "an empty image", "nothing", "background")
COUNT_SHARES = (0.08, 0.5, 0.27, 0.15)


@dataclass(frozen=True)
class Phase:
    """A leg of pre-training.

    Attributes:
        size: image side in pixels.
        iterations: number of batches.
        learning_rate: its largest.
        singles_only: whether every image has one object.
        shapeless: share of the objects that are blobs of a typical look.
        patch_loss: weight of the loss of patches beside that of images, see `contrastive_loss`.
        background_loss: weight of the same with a phrase about the background.
    """

    size: int
    iterations: int
    learning_rate: float
    singles_only: bool
    shapeless: float = 0.0
    patch_loss: float = 0.0
    background_loss: float = 0.0


PHASES = (
    Phase(64, 1000, 1e-3, singles_only=True),
    Phase(64, 500, 8e-4, singles_only=False, shapeless=0.25, patch_loss=1.0),
    Phase(96, 1200, 1e-3, singles_only=False, shapeless=0.3, patch_loss=1.0, background_loss=1.0),
)
BATCH_SIZE = 96
TYPICAL_SHARE = 0.5
PATCH_SCALE = 10.0
STEM = {"width": 24, "blocks": [0, 1, 2]}
PRETRAIN_STREAM = 101
# Batches between two states of a run, each of which is a point of its curve.
STATE_EVERY = 250


def model_config(size: int) -> dict[str, object]:
    """open_clip configuration of the tiny CLIP for a given image side."""
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)
    names = [name for part in glyph_names() for name in part]
    words = [template.format(name) for template in PROMPTS_85 for name in names]
    words += [phrase.format(kind) for phrase in PHRASES for kind in BACKGROUNDS]
    words.append("and , .")
    vocabulary = sorted({token for row in tokenizer(words).tolist() for token in row})
    return {
        "embed_dim": 128,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": size,
            "layers": 3,
            "width": 128,
            "head_width": 32,
            "patch_size": 8,
            "stem": STEM,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": len(vocabulary),
            "width": 128,
            "heads": 4,
            "layers": 2,
        },
        "vocabulary": vocabulary,
        "preprocess": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "size": size},
    }


@dataclass(frozen=True)
class PairBatch:
    """Images and what is said of them.

    Attributes:
        images: (B, 3, S, S) uint8.
        captions: B texts.
        topics: what each caption is about: the names in the image.
        phrases: B texts about the background alone.
        backgrounds: what each of these is about.
    """

    images: Tensor
    captions: list[str]
    topics: list[str]
    phrases: list[str]
    backgrounds: list[str]


class PairBatches(Dataset[PairBatch]):
    """Batch `i` of a phase, a function of (seed, i)."""

    def __init__(self, phase: Phase, *, seed: int, start: int) -> None:
        self.phase, self.seed, self.start = phase, seed, start

    def __len__(self) -> int:
        return self.phase.iterations - self.start

    def __getitem__(self, index: int) -> PairBatch:
        step = self.start + index
        leg = [self.phase.size, int(self.phase.singles_only)]
        rng = np.random.default_rng([self.seed, PRETRAIN_STREAM, *leg, step])
        style = Style(
            load_varied_glyphs(KNOWN_FAMILIES),
            size=self.phase.size,
            typical_share=TYPICAL_SHARE,
            shapeless=self.phase.shapeless,
            stretch=(0.7, 1.4),
            shear=0.25,
        )
        scenes = [draw_scene(rng, names, style) for names in self._objects(rng)]
        images = np.stack([scene.image for scene in scenes]).transpose(0, 3, 1, 2)
        return PairBatch(
            images=torch.from_numpy(np.ascontiguousarray(images)),
            captions=[_caption(rng, scene) for scene in scenes],
            topics=[", ".join(sorted(scene.names)) for scene in scenes],
            phrases=[str(rng.choice(PHRASES)).format(scene.background) for scene in scenes],
            backgrounds=[scene.background for scene in scenes],
        )

    def _objects(self, rng: np.random.Generator) -> Iterator[list[str]]:
        """Deal the names from a shuffled deck, so that few images of a batch share one."""
        categories, others = glyph_names()
        deck: list[str] = []
        for _ in range(BATCH_SIZE):
            count = 1 if self.phase.singles_only else int(rng.choice(4, p=COUNT_SHARES))
            if len(deck) < count:
                deck += list(rng.permutation([*categories, *categories, *others]))
            names, deck = deck[:count], deck[count:]
            if count > 1 and rng.random() < 0.3:
                names = choose_names(rng, count, categories, others, 0.75)
            yield [str(name) for name in names]


def _caption(rng: np.random.Generator, scene: Scene) -> str:
    if not scene.names:
        return str(rng.choice(PHRASES)).format(scene.background)
    names = [str(name) for name in rng.permutation(scene.names)]
    subject = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    caption = str(rng.choice(PROMPTS_85)).format(subject)
    if rng.random() < 0.2:
        return f"{caption.rstrip('.')} on a {scene.background} background."
    return caption


def pretrain_clip(
    out_dir: Path,
    work_dir: Path,
    *,
    seed: int,
    device: torch.device,
    phases: Sequence[Phase] = PHASES,
    probe_images: int = 960,
) -> None:
    """Train phase by phase and write the network and its accuracy to `out_dir`.

    These are `tiny_clip.safetensors`, `tiny_clip.json`, `accuracy.json` and `accuracy_curve.json`,
    the same every 250 batches on half of the images. A killed run continues from the last state in
    `work_dir`.
    """
    torch.manual_seed(seed)
    start = time.monotonic()
    encoder = _initial_encoder(work_dir, phases[0].size, device)
    curve, before = Curve(work_dir / "curve", seed, probe_images // 2), 0
    for index, phase in enumerate(phases):
        if index:
            encoder = _enlarged(encoder, work_dir, phase.size, device)
        state_path = work_dir / f"clip-{index}-state.safetensors"
        probe = partial(curve.add, encoder, phase, before)
        _train_phase(encoder, phase, state_path, seed=seed, probe=probe)
        before += phase.iterations
    accuracy = _save_and_measure(encoder, phases[-1].size, out_dir, seed, probe_images)
    write_json(out_dir / "accuracy.json", accuracy)
    write_json(out_dir / "accuracy_curve.json", read_json(curve.path))
    seconds = round(time.monotonic() - start)
    write_json(work_dir / "clip_card.json", {"seconds": seconds, **accuracy})


@dataclass(frozen=True)
class Curve:
    """What a network knows while it is trained, a point every `STATE_EVERY` batches.

    Attributes:
        folder: of the points, and of the network as it was last measured.
        seed: of the images that it is measured on.
        images: their number.
    """

    folder: Path
    seed: int
    images: int

    @property
    def path(self) -> Path:
        """A list of `iterations` (batches since the first leg), `size` and all accuracies."""
        return self.folder / "curve.json"

    def add(self, encoder: ClipEncoder, phase: Phase, before: int, step: int) -> None:
        """Measure after `step` batches of a leg; what an earlier try had from there on goes."""
        accuracy = _save_and_measure(encoder, phase.size, self.folder, self.seed, self.images)
        point = {"iterations": before + step, "size": phase.size, **accuracy}
        points = read_json(self.path) if self.path.is_file() else []
        earlier = [other for other in points if other["iterations"] < point["iterations"]]
        write_json(self.path, [*earlier, point])


def _save_and_measure(
    encoder: ClipEncoder, size: int, folder: Path, seed: int, images: int
) -> dict[str, float]:
    """Write the network without its batch norms, and measure what was written."""
    finished = deepcopy(encoder)
    finished.clip.visual.conv1 = finished.clip.visual.conv1.folded()
    weights, config = folder / "tiny_clip.safetensors", folder / "tiny_clip.json"
    _save(finished, size, weights, config)
    saved = EncoderParams(model=str(config), pretrained=str(weights))
    return measure_accuracy(saved, encoder.mean.device, seed=seed, images=images)


def _train_phase(
    encoder: ClipEncoder,
    phase: Phase,
    state_path: Path,
    *,
    seed: int,
    probe: Callable[[int], None],
) -> None:
    """Contrastive training with AdamW, a cosine schedule and a short warm-up.

    `probe` is called with the finished batches before each state is written.
    """
    clip = encoder.clip.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        clip.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    step = resume(state_path, clip, optimizer)
    loader = DataLoader(
        PairBatches(phase, seed=seed, start=step), batch_size=None, num_workers=1, prefetch_factor=8
    )
    bar = tqdm(total=phase.iterations, initial=step, desc=f"tiny CLIP, {phase.size} px")
    for batch in loader:
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * _cosine(step, phase.iterations)
        loss = contrastive_loss(encoder, batch, phase)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
        step += 1
        bar.update()
        if step % 100 == 0 or step == phase.iterations:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % STATE_EVERY == 0 or step == phase.iterations:
            probe(step)
            save_state(state_path, clip, optimizer, step=step, extra=None)
    bar.close()
    clip.eval().requires_grad_(False)


def contrastive_loss(encoder: ClipEncoder, batch: PairBatch, phase: Phase) -> Tensor:
    """Symmetric cross-entropy over a batch; all pairs of one topic are positives, in equal parts.

    The loss of CLIP itself takes every pair for another. The loss of patches is the same with
    another similarity: the mean of the cosines of a text with the value path of an image's patches,
    weighted by their softmax (as in "Open Vocabulary Semantic Segmentation with Patch Aligned
    Contrastive Learning", Mukhoti et al., 2023). It makes patches mean what is said of them, as
    those of a large CLIP do: with captions, and with phrases about the background.
    """
    pixels = encoder.normalise(batch.images.to(encoder.mean.device) / 255)
    embeddings, patches = _embeddings_and_patches(encoder.clip.visual, pixels)
    captions = _embed_texts(encoder, batch.captions)
    scale = encoder.clip.logit_scale.exp()
    similar = F.normalize(embeddings, dim=-1) @ captions.T
    loss = _cross_entropy(scale * similar, batch.topics)
    if phase.patch_loss > 0:
        similar = _patch_similarity(patches, captions)
        loss = loss + phase.patch_loss * _cross_entropy(scale * similar, batch.topics)
    if phase.background_loss > 0:
        phrases = _embed_texts(encoder, batch.phrases)
        similar = _patch_similarity(patches, phrases)
        loss = loss + phase.background_loss * _cross_entropy(scale * similar, batch.backgrounds)
    return loss


def _embed_texts(encoder: ClipEncoder, texts: list[str]) -> Tensor:
    """(B, C) unit rows, float32."""
    tokens = encoder.tokenize(texts).to(encoder.mean.device)
    return F.normalize(encoder.clip.encode_text(tokens), dim=-1)


def _patch_similarity(patches: Tensor, text: Tensor) -> Tensor:
    """Patches (B, N, C) and unit rows (T, C) -> (B, T)."""
    cosines = F.normalize(patches, dim=-1) @ text.T
    return ((PATCH_SCALE * cosines).softmax(dim=1) * cosines).sum(dim=1)


def _cross_entropy(logits: Tensor, topics: list[str]) -> Tensor:
    """Of logits (B, B) of images and texts, both ways."""
    numbers = {topic: number for number, topic in enumerate(dict.fromkeys(topics))}
    topic = torch.tensor([numbers[topic] for topic in topics], device=logits.device)
    target = F.normalize((topic[:, None] == topic).float(), p=1, dim=1)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _embeddings_and_patches(visual: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (B, C) of images, and of their patches (B, N, C) by the last value path."""
    tokens, _ = embed_patches(visual, images, position_resize="grid")
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        tokens = block(tokens)
    _, value = key_and_value(last.attn)
    values = last.attn.out_proj(F.linear(last.ln_1(tokens)[:, 1:], *value))
    embeddings = visual.ln_post(last(tokens)[:, 0])
    return embeddings @ visual.proj, visual.ln_post(values) @ visual.proj


def _cosine(step: int, total: int, warm_up: int = 100) -> float:
    return min(1.0, (step + 1) / warm_up) * (
        0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total))
    )


def _initial_encoder(work_dir: Path, size: int, device: torch.device) -> ClipEncoder:
    """A network with random weights, and batch norms in its stem while it is trained."""
    config = model_config(size)
    encoder = _through_files(
        build_from_config(config, source="the tiny CLIP").state_dict(), config, work_dir, device
    )
    stem: ConvStem = encoder.clip.visual.conv1
    encoder.clip.visual.conv1 = stem.normalised().to(device)
    return encoder


def _enlarged(encoder: ClipEncoder, work_dir: Path, size: int, device: torch.device) -> ClipEncoder:
    """The same network for a larger image side: position embeddings resized."""
    state = dict(encoder.clip.state_dict())
    side = size // encoder.patch_size
    state["visual.positional_embedding"] = resize_positions(
        state["visual.positional_embedding"], side, side, mode="grid"
    )
    larger = _initial_encoder(work_dir, size, device)
    larger.clip.load_state_dict(state)
    return larger


def _through_files(
    state: dict[str, Tensor], config: dict[str, object], work_dir: Path, device: torch.device
) -> ClipEncoder:
    """Write and load again, so that training runs on what the pipeline will load."""
    weights, described = work_dir / "clip.safetensors", work_dir / "clip.json"
    write_json(described, config)
    with atomic_path(weights) as temporary:
        save_tensors({name: tensor.cpu() for name, tensor in state.items()}, temporary)
    return load_clip(EncoderParams(model=str(described), pretrained=str(weights)), device)


def _save(encoder: ClipEncoder, size: int, weights: Path, described: Path) -> None:
    write_json(described, model_config(size))
    state = {name: t.cpu() for name, t in encoder.clip.state_dict().items()}
    with atomic_path(weights) as temporary:
        save_tensors(state, temporary)
