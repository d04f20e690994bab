"""Fit `photo_clip`'s text tower to the rows of the classifier, on the CPU.

Letters: C joint embedding, D features of the classifier, K classes, N names, P prompts, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.models.clip.photo_clip.assemble import TIMM_MODEL
from pipeline.vocabulary.prompts import PROMPTS_85

BACKGROUND = "background"
EMBED_DIM = 256
CONTEXT_LENGTH = 28
SHRINKAGE = 0.3  # of the scatter within names, in its mean
RIDGE = 0.05  # likewise, of the energy of the rows
LEVELLING = 0.5  # share of what a name of many classes lacks in evidence that it is given back
BACKGROUND_LEVEL = 1.5  # evidence for a name below which the background is nearer
BACKGROUND_DRAWS = 64  # its direction is that of no other name, so it is drawn as often as these
CLASSES_A_DRAW = 16  # names of many classes lie between others, and are drawn more often
WARM_UP = 100
BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class Fit:
    """How the text tower is trained: prompts a step, steps, and the highest learning rate."""

    batch_size: int = 512
    steps: int = 1500
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class JointSpace:
    """Where images and names meet.

    Attributes:
        weight, bias: (C, D) and (C,), from the classifier's pooled features.
        rows: (K, C) unit vectors, one a class: where its images lie.
        regressed: (K, C) unit vectors, one a class: what tells it from others.
        background: (C,) unit vector, at right angles to all of them.
    """

    weight: Tensor
    bias: Tensor
    rows: Tensor
    regressed: Tensor
    background: Tensor


def joint_space(
    classifier: Tensor, groups: Iterable[Sequence[int]], *, embed_dim: int = EMBED_DIM
) -> JointSpace:
    """The space that a classifier's last layer spans, and a constant for the background.

    Features are projected to the principal directions of the centred rows (which take what all
    classes share out of both sides), and directions in which classes of one name differ are made
    shorter: a photo of one breed is to be near `dog`, which is the mean of 118. A class has the
    vector that ridge regression finds for it among the rows: its row, less what other classes have
    too. The last dimension is a constant in every image and every patch, so that `background` is
    the nearest name wherever the evidence for all others is below it.

    Args:
        classifier: (K, D) rows.
        groups: classes of names, as in `name_table`.
        embed_dim: C.
    """
    rows = (classifier - classifier.mean(dim=0)).double()
    directions = torch.linalg.svd(rows, full_matrices=False)[2][: embed_dim - 1]
    rows = rows @ directions.T
    whitening = _inverse_root(_scatter_within(F.normalize(rows, dim=-1), groups))
    whitening *= rows.norm(dim=1).mean() / (rows @ whitening).norm(dim=1).mean()
    rows = rows @ whitening
    regressed = rows @ torch.linalg.inv(_shrunk(rows.T @ rows, RIDGE))
    constant = torch.eye(embed_dim, dtype=torch.float64)[-1]
    return JointSpace(
        weight=F.pad(whitening @ directions, (0, 0, 0, 1)).float(),
        bias=(BACKGROUND_LEVEL * constant).float(),
        rows=F.pad(F.normalize(rows, dim=-1), (0, 1)).float(),
        regressed=F.pad(F.normalize(regressed, dim=-1), (0, 1)).float(),
        background=constant.float(),
    )


def _scatter_within(rows: Tensor, groups: Iterable[Sequence[int]]) -> Tensor:
    """(D, D) sum over groups of the scatter of their rows (K, D) about the group's mean."""
    centred = [rows[list(group)] - rows[list(group)].mean(dim=0) for group in groups if group]
    stacked = torch.cat(centred)
    return stacked.T @ stacked


def _shrunk(matrix: Tensor, share: float) -> Tensor:
    """A symmetric matrix plus a share of its mean eigenvalue on the diagonal."""
    mean = matrix.diagonal().mean()
    return matrix + share * mean * torch.eye(len(matrix), dtype=matrix.dtype)


def _inverse_root(scatter: Tensor) -> Tensor:
    """Symmetric inverse square root of a scatter, shrunk."""
    values, vectors = torch.linalg.eigh(_shrunk(scatter, SHRINKAGE))
    return vectors @ torch.diag(values.rsqrt()) @ vectors.T


def name_targets(space: JointSpace, table: Mapping[str, Sequence[int]]) -> Tensor:
    """Unit vectors (N, C): the mean over a name's classes, or the background where it has none.

    A name of many classes lies between them, at some distance from each: part of that is made up
    for by the constant, so that its photos are not taken for those of a name of one class.
    """
    return torch.stack(
        [
            _name_target(space, list(classes)) if classes else space.background
            for classes in table.values()
        ]
    )


def _name_target(space: JointSpace, classes: list[int]) -> Tensor:
    mean = F.normalize(space.regressed[classes].mean(dim=0), dim=0)
    level = LEVELLING * (1 - (space.rows[classes] @ mean).mean())
    return (1 - level**2).sqrt() * mean + level * space.background


def model_config(names: Sequence[str]) -> dict[str, Any]:
    """open_clip configuration, with the list of names and the tokens of their prompts."""
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)
    texts = [PROMPTS_85[0].format(name) for name in names]
    texts += [template.format(BACKGROUND) for template in PROMPTS_85]
    texts += list(names)
    vocabulary = sorted({token for row in tokenizer(texts).tolist() for token in row})
    return {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {
            "timm_model_name": TIMM_MODEL,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "timm_proj_bias": True,
            "image_size": 224,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": len(vocabulary),
            "width": 256,
            "heads": 4,
            "layers": 1,
        },
        "preprocess": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "size": 224},
        "vocabulary": vocabulary,
        "names": list(names),
    }


def prompt_tokens(config: Mapping[str, Any]) -> Tensor:
    """Token ids (N, P, T) of all prompts of all names, numbered by the config's vocabulary."""
    index = {token: position for position, token in enumerate(config["vocabulary"])}
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    rows = tokenizer([text.format(name) for name in config["names"] for text in PROMPTS_85])
    ids = torch.tensor([[index[token] for token in row] for row in rows.tolist()])
    return ids.unflatten(0, (len(config["names"]), len(PROMPTS_85)))


def fit_text_tower(
    clip: nn.Module,
    tokens: Tensor,
    targets: Tensor,
    *,
    draws: Tensor,
    fit: Fit,
    seed: int,
) -> None:
    """Train the text tower of `clip` in place: each prompt of a name onto the name's target.

    The loss is one minus the cosine, over prompts drawn at random.

    Args:
        clip: open_clip's model; its image tower is left alone.
        tokens: (N, P, T) from `prompt_tokens`.
        targets: (N, C) unit vectors.
        draws: names (M,) by index, int64, that prompts are drawn from, with repeats.
        fit: batch size, steps and learning rate.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [value for name, value in clip.named_parameters() if is_text(name)]
    optimizer = torch.optim.AdamW(parameters, betas=BETAS, weight_decay=0.0)
    with tqdm(range(fit.steps), desc="text tower") as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = fit.learning_rate * _schedule(step, fit.steps)
            drawn = torch.randint(len(draws), (fit.batch_size,), generator=generator)
            names = draws[drawn]
            prompts = torch.randint(tokens.shape[1], (fit.batch_size,), generator=generator)
            texts = encode_tokens(clip, tokens[names, prompts])
            loss = 1 - F.cosine_similarity(texts, targets[names]).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")


def name_draws(table: Mapping[str, Sequence[int]]) -> Tensor:
    """Names (M,) by index, int64: each as often as it is to be drawn in a round."""
    repeats = [
        max(1, len(classes) // CLASSES_A_DRAW) if classes else BACKGROUND_DRAWS
        for classes in table.values()
    ]
    return torch.arange(len(table)).repeat_interleave(torch.tensor(repeats))


def encode_tokens(clip: Any, tokens: Tensor) -> Tensor:
    """Token ids (B, T) -> text features (B, C): `clip.encode_text` with less work.

    Padding is cut off, and only the end of each text goes through the last block, for nothing else
    of its output is read.
    """
    ends = tokens.argmax(dim=1)
    length = int(ends.max()) + 1
    features = clip.token_embedding(tokens[:, :length]) + clip.positional_embedding[:length]
    *blocks, last = clip.transformer.resblocks
    for block in blocks:
        features = block(features, attn_mask=clip.attn_mask[:length, :length])
    rows = torch.arange(len(tokens))
    keys = last.ln_1(features)
    behind = torch.arange(length) > ends.unsqueeze(1)
    attended, _ = last.attn(
        keys[rows, ends].unsqueeze(1), keys, keys, key_padding_mask=behind, need_weights=False
    )
    summed = features[rows, ends] + attended.squeeze(1)
    return clip.ln_final(summed + last.mlp(last.ln_2(summed))) @ clip.text_projection


@torch.no_grad()
def text_cosines(clip: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Cosines (N,) of the names' embeddings, averaged over their prompts, with their targets."""
    means = [
        F.normalize(F.normalize(encode_tokens(clip, prompts), dim=-1).mean(dim=0), dim=0)
        for prompts in tokens
    ]
    return F.cosine_similarity(torch.stack(means), targets)


def is_text(name: str) -> bool:
    """Whether a tensor of open_clip's model belongs to its text side."""
    return not name.startswith("visual.") and name != "logit_scale"


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
