"""Pre-train the tiny CLIP of the demo on rendered image-caption pairs, easy to hard.

Large single objects at 64 px first, then the index dataset's mix at 96 px, where objects keep
their typical look less and less often, so that shape counts too. Only known glyph families and
the backgrounds of the index are used; the benchmark's seeds and its unseen family never are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pipeline.demo.glyphs import KNOWN_FAMILIES, UNSEEN_FAMILY, glyph_names, load_glyphs
from pipeline.demo.scene import BACKGROUNDS, OUTLINED, Scene, Style, choose_names, draw_scene
from pipeline.files import atomic_path, write_json
from pipeline.models.clip import ClipEncoder, load_clip, text_embeddings
from pipeline.models.weights.training_state import resume, save_state
from pipeline.models.weights.weights import save_tensors
from pipeline.params.base import EncoderParams
from pipeline.vocabulary.prompts import PROMPTS_85

CONTEXT_LENGTH = 24
PHRASES = ("a {} background", "on a {} background", "an empty image", "nothing", "background")
COUNT_SHARES = (0.08, 0.5, 0.27, 0.15)


@dataclass(frozen=True)
class Phase:
    """A leg of pre-training: image side, iterations, learning rate and difficulty."""

    size: int
    iterations: int
    learning_rate: float
    singles_only: bool
    typical_from: float
    typical_to: float


PHASES = (
    Phase(64, 1500, 1.2e-3, True, 0.97, 0.97),
    Phase(96, 4500, 8e-4, False, 0.97, 0.8),
)
BATCH_SIZE = 48
PRETRAIN_STREAM, PROBE_STREAM = 101, 102


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
            "layers": 2,
            "width": 128,
            "head_width": 32,
            "patch_size": 8,
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


class PairBatches(Dataset[tuple[Tensor, list[str]]]):
    """Batch `i` of a phase: images (B, 3, S, S) uint8 and B captions, a function of (seed, i)."""

    def __init__(self, phase: Phase, *, seed: int, start: int) -> None:
        self.phase, self.seed, self.start = phase, seed, start

    def __len__(self) -> int:
        return self.phase.iterations - self.start

    def __getitem__(self, index: int) -> tuple[Tensor, list[str]]:
        step = self.start + index
        rng = np.random.default_rng([self.seed, PRETRAIN_STREAM, self.phase.size, step])
        progress = step / self.phase.iterations
        typical = self.phase.typical_from + progress * (
            self.phase.typical_to - self.phase.typical_from
        )
        style = Style(load_glyphs(KNOWN_FAMILIES), size=self.phase.size, typical=typical)
        scenes = [draw_scene(rng, names, style) for names in self._objects(rng)]
        images = np.stack([scene.image for scene in scenes]).transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(images)), [_caption(rng, s) for s in scenes]

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
    phases: tuple[Phase, ...] = PHASES,
    probe_images: int = 960,
) -> None:
    """Train phase by phase and write `tiny_clip.safetensors` and `tiny_clip.json` to `out_dir`.

    A killed run continues from the last state in `work_dir`.
    """
    torch.manual_seed(seed)
    start = time.monotonic()
    encoder = _initial_encoder(work_dir, phases[0].size, device)
    for index, phase in enumerate(phases):
        if index:
            encoder = _enlarged(encoder, work_dir, phase.size, device)
        _train_phase(encoder, phase, work_dir / f"clip-{phase.size}-state.safetensors", seed=seed)
    weights, config = out_dir / "tiny_clip.safetensors", out_dir / "tiny_clip.json"
    _save(encoder, phases[-1].size, weights, config)
    seconds = time.monotonic() - start
    write_json(
        work_dir / "clip_card.json",
        {
            "seconds": round(seconds),
            **zero_shot_accuracy(encoder, seed=seed, images=probe_images),
        },
    )


def zero_shot_accuracy(encoder: ClipEncoder, *, seed: int, images: int) -> dict[str, float]:
    """Share of fresh single-object images whose category is the nearest text, in percent.

    Over the categories of the demo, with the 85 prompts: known families, the same as the world
    outlines them, the unseen family, and known families with every look drawn at random (shape
    alone).
    """
    categories, _ = glyph_names()
    texts = text_embeddings(encoder, categories, PROMPTS_85)
    size = encoder.image_size
    styles = {
        "known": Style(load_glyphs(KNOWN_FAMILIES), size=size),
        "world": Style(load_glyphs(KNOWN_FAMILIES), size=size, outlined=OUTLINED),
        "unseen": Style(load_glyphs((UNSEEN_FAMILY,)), size=size),
        "random_look": Style(load_glyphs(KNOWN_FAMILIES), size=size, typical=0.0),
    }
    return {
        name: _accuracy(encoder, texts, style, categories, seed=seed, images=images)
        for name, style in styles.items()
    }


def _accuracy(
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
    drawn = [draw_scene(rng, [categories[target]], style).image for target in targets]
    correct = 0
    for start in range(0, images, 96):
        pixels = torch.from_numpy(np.stack(drawn[start : start + 96])).permute(0, 3, 1, 2)
        embedded = encoder.encode_images(pixels.to(texts.device) / 255)
        predicted = (embedded @ texts.T).argmax(dim=1).cpu()
        correct += int((predicted == targets[start : start + 96]).sum())
    return round(100 * correct / images, 2)


def _train_phase(encoder: ClipEncoder, phase: Phase, state_path: Path, *, seed: int) -> None:
    """Contrastive training with AdamW, a cosine schedule and a short warm-up."""
    clip = encoder.clip.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        clip.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    step = resume(state_path, clip, optimizer)
    loader = DataLoader(
        PairBatches(phase, seed=seed, start=step), batch_size=None, num_workers=1, prefetch_factor=8
    )
    bar = tqdm(total=phase.iterations, initial=step, desc=f"tiny CLIP, {phase.size} px")
    for images, captions in loader:
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * _cosine(step, phase.iterations)
        pixels = images.to(encoder.mean.device) / 255
        loss = contrastive_loss(encoder, pixels, captions)
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
        if step % 250 == 0 or step == phase.iterations:
            save_state(state_path, clip, optimizer, step=step, extra=None)
    bar.close()
    clip.eval().requires_grad_(False)


def contrastive_loss(encoder: ClipEncoder, images: Tensor, captions: list[str]) -> Tensor:
    """Symmetric cross-entropy over a batch, with equal captions counted as positives."""
    tokens = encoder.tokenize(captions).to(images.device)
    image = F.normalize(encoder.clip.encode_image(encoder.normalise(images)), dim=-1)
    text = F.normalize(encoder.clip.encode_text(tokens), dim=-1)
    logits = encoder.clip.logit_scale.exp() * image @ text.T
    target = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _cosine(step: int, total: int, warm_up: int = 100) -> float:
    return min(1.0, (step + 1) / warm_up) * (
        0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total))
    )


def _initial_encoder(work_dir: Path, size: int, device: torch.device) -> ClipEncoder:
    config = model_config(size)
    clip = open_clip.model.CLIP(
        **{key: config[key] for key in ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg")}
    )
    return _through_files(clip.state_dict(), config, work_dir, device)


def _enlarged(encoder: ClipEncoder, work_dir: Path, size: int, device: torch.device) -> ClipEncoder:
    """The same network for a larger image side: position embeddings resized."""
    state = dict(encoder.clip.state_dict())
    positions = state["visual.positional_embedding"]
    side = math.isqrt(len(positions) - 1)
    grid = positions[1:].T.unflatten(1, (side, side)).unsqueeze(0)
    grown = F.interpolate(grid, size=(size // 8, size // 8), mode="bicubic", align_corners=False)
    state["visual.positional_embedding"] = torch.cat([positions[:1], grown[0].flatten(1).T])
    return _through_files(state, model_config(size), work_dir, device)


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
