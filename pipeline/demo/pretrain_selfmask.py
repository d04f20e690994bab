"""Pre-train the tiny SelfMask of the demo by SelfMask's own recipe.

Targets are spectral votes on the tiny CLIP's patch tokens, sharpened by the bilateral solver, on
fresh renderings of the index's mix; the network is trained on them with flips and permuted
colours. True masks are only used to score the result.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.demo.glyphs import KNOWN_FAMILIES, glyph_names, load_glyphs
from pipeline.demo.scene import Style, choose_names, draw_scene
from pipeline.files import atomic_path, write_json
from pipeline.models.clip import ClipEncoder
from pipeline.models.masks.bilateral import bilateral_solve
from pipeline.models.masks.selfmask import SelfMask, SelfMaskConfig, load_selfmask, save_selfmask
from pipeline.models.masks.selfmask_training import fit_selfmask
from pipeline.models.masks.spectral import spectral_mask

ARCHITECTURE = SelfMaskConfig(
    dim=64,
    depth=3,
    num_heads=4,
    patch_size=4,
    num_queries=6,
    decoder_layers=2,
    mlp_ratio=4,
    grid=24,
)
SIZE = 96
BATCH_SIZE, LEARNING_RATE = 16, 8e-4
VOTE_STREAM, PROBE_STREAM, TRAIN_STREAM = 111, 112, 113
COUNT_SHARES = (0.7, 0.2, 0.1)


@dataclass(frozen=True)
class Schedule:
    """How much is spent: blocks of voted images, iterations and images to score on."""

    blocks: int = 6
    block_images: int = 200
    iterations: int = 800
    probe_images: int = 200


def pretrain_selfmask(
    out_dir: Path,
    work_dir: Path,
    encoder: ClipEncoder,
    *,
    seed: int,
    device: torch.device,
    schedule: Schedule | None = None,
) -> None:
    """Vote, train, score; write `tiny_selfmask.safetensors` and `.json` to `out_dir`.

    A killed run continues from the blocks of votes and the last state in `work_dir`.
    """
    start = time.monotonic()
    schedule = schedule or Schedule()
    images, votes = _voted_images(work_dir, encoder, schedule, seed=seed)
    torch.manual_seed(seed)
    model = SelfMask(ARCHITECTURE).to(device)
    _train(
        model,
        images,
        votes,
        work_dir / "selfmask-state.safetensors",
        iterations=schedule.iterations,
        seed=seed,
    )
    weights = out_dir / "tiny_selfmask.safetensors"
    save_selfmask(model, weights)
    write_json(
        work_dir / "selfmask_card.json",
        {
            "seconds": round(time.monotonic() - start),
            **mask_scores(
                load_selfmask(weights, device), encoder, seed=seed, images=schedule.probe_images
            ),
        },
    )


def vote_mask(encoder: ClipEncoder, image: np.ndarray) -> np.ndarray:
    """Pseudo-mask (S, S) bool of one image (S, S, 3) uint8: spectral votes, then the solver."""
    pixels = _pixels(image[None], encoder.mean.device)
    features = encoder.patch_features(pixels, facet="token")[0].cpu()
    voted = spectral_mask([features], size=image.shape[:2], padded_size=image.shape[:2])
    return bilateral_solve(image, voted.astype(np.float64)) > 0.5


def mask_scores(
    model: SelfMask, encoder: ClipEncoder, *, seed: int, images: int
) -> dict[str, float]:
    """Mean IoU in percent with the union of the objects on fresh images, three ways.

    The network (refined), the votes it learned from, and the votes of an untrained ViT: what is
    contrast alone.
    """
    untrained = _untrained(encoder)
    scores: dict[str, list[float]] = {"network": [], "votes": [], "untrained_votes": []}
    for number in tqdm(range(images), desc="tiny SelfMask, scores"):
        image, truth = _scene(seed, PROBE_STREAM, number)
        pixels = _pixels(image[None], next(model.parameters()).device)
        salient = (model.saliency(pixels)[0] > 0.5).cpu().numpy()
        refined = bilateral_solve(image, salient.astype(np.float64)) > 0.5
        scores["network"].append(_iou(refined, truth))
        scores["votes"].append(_iou(vote_mask(encoder, image), truth))
        scores["untrained_votes"].append(_iou(vote_mask(untrained, image), truth))
    return {name: round(100 * float(np.mean(values)), 2) for name, values in scores.items()}


def _voted_images(
    work_dir: Path, encoder: ClipEncoder, schedule: Schedule, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, S, S, 3) uint8 and their votes (N, S, S) bool, in resumable blocks."""
    images, votes = [], []
    for block in tqdm(range(schedule.blocks), desc="tiny SelfMask, votes"):
        path = work_dir / f"votes-{block}.npz"
        if not path.is_file():
            numbers = range(block * schedule.block_images, (block + 1) * schedule.block_images)
            drawn = [_scene(seed, VOTE_STREAM, number)[0] for number in numbers]
            masks = [vote_mask(encoder, image) for image in drawn]
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez(file, images=np.stack(drawn), votes=np.stack(masks))
        with np.load(path) as stored:
            images.append(stored["images"])
            votes.append(stored["votes"])
    return np.concatenate(images), np.concatenate(votes)


def _train(
    model: SelfMask,
    images: np.ndarray,
    votes: np.ndarray,
    state_path: Path,
    *,
    iterations: int,
    seed: int,
) -> None:
    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start, iterations):
            yield _batch(images, votes, np.random.default_rng([seed, TRAIN_STREAM, step]))

    fit_selfmask(
        model,
        batches,
        state_path,
        iterations=iterations,
        learning_rate=LEARNING_RATE,
        title="tiny SelfMask, training",
    )


def _batch(
    images: np.ndarray, votes: np.ndarray, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Random images with flips and permuted colour channels: (B, 3, S, S) and (B, S, S)."""
    chosen = rng.choice(len(images), BATCH_SIZE, replace=False)
    pixels, targets = images[chosen], votes[chosen]
    for axis in (1, 2):
        flip = rng.random(BATCH_SIZE) < 0.5
        pixels[flip] = np.flip(pixels[flip], axis)
        targets[flip] = np.flip(targets[flip], axis)
    permuted = np.stack([image[..., rng.permutation(3)] for image in pixels])
    return _pixels(permuted, torch.device("cpu")), torch.from_numpy(targets)


def _scene(seed: int, stream: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """A fresh image of the index's mix, with at least one object, and the union of its objects."""
    rng = np.random.default_rng([seed, stream, number])
    categories, others = glyph_names()
    count = 1 + int(rng.choice(len(COUNT_SHARES), p=COUNT_SHARES))
    names = choose_names(rng, count, categories, others, 0.75)
    scene = draw_scene(rng, names, Style(load_glyphs(KNOWN_FAMILIES), size=SIZE))
    return scene.image, scene.instances > 0


def _untrained(encoder: ClipEncoder) -> ClipEncoder:
    """A copy of the encoder whose blocks are drawn anew."""
    fresh = copy.deepcopy(encoder)
    torch.manual_seed(0)
    for module in fresh.visual.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
        elif isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
    return fresh


def _pixels(images: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).to(device) / 255


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0
