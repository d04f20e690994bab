"""Seeded inputs: photos, masks, and networks with random weights.

Letters: N masks, H W pixels, h w token grid.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip import CLIP
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.engine.runtime import Runtime
from pipeline.models.zutis.build import build_zutis
from pipeline.models.zutis.network import Zutis
from pipeline.params.base import EncoderParams

MakeRuntime = Callable[[Path], Runtime]  # from the folder of its cache

OCTAVES = (2, 4, 8, 16, 32, 64, 128, 256)
GRAIN = 8.0  # with it, a JPEG of 500 x 375 has some 70 kB
PERTURBATION = 0.02
MASK_SPREAD = 4.0
# A text tower as small as can be: the rows are about images.
TINY_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
TINY_VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}


def photo(seed: int, width: int, height: int) -> Image.Image:
    """An RGB image with the power spectrum of photographs: detail falls with its frequency."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0, dtype=np.float32)
    for cells in OCTAVES:
        noise = rng.standard_normal((3, max(2, cells * height // width), cells), dtype=np.float32)
        for channel in range(3):
            layer = Image.fromarray(noise[channel]).resize(
                (width, height), Image.Resampling.BICUBIC
            )
            grey = Image.fromarray(noise[0]).resize((width, height), Image.Resampling.BICUBIC)
            # Colours of photographs vary less than their brightness.
            pixels[..., channel] += (
                110 / cells**0.7 * (0.3 * np.asarray(layer) + 0.7 * np.asarray(grey))
            )
    pixels += GRAIN * rng.standard_normal((height, width, 1), dtype=np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    """A JPEG file of the quality that collections of photos have."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def ellipses(
    seed: int, count: int, size: tuple[int, int], *, largest: float = 0.3
) -> NDArray[np.bool_]:
    """(N, H, W) masks of ellipses; half axes are 5 % to `largest` of the sides, all within."""
    height, width = size
    rng = np.random.default_rng(seed)
    rows, columns = np.ogrid[:height, :width]
    masks = np.empty((count, height, width), dtype=bool)
    for mask in masks:
        half = rng.uniform(0.05, largest, 2) * size
        centre = rng.uniform(half, np.array(size) - half)
        mask[:] = ((rows - centre[0]) / half[0]) ** 2 + ((columns - centre[1]) / half[1]) ** 2 <= 1
        mask[int(centre[0]), int(centre[1])] = True
    return masks


def unit_rows(generator: torch.Generator, *shape: int) -> Tensor:
    """Random tensor whose last axis has unit norm."""
    return nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def zutis_network(*, quick: bool) -> Zutis:
    """ZUTIS around a ViT-B/16 (tiny if `quick`), all weights random.

    Freshly initialised queries are almost equal, so weights are perturbed and mask logits spread.
    """
    torch.manual_seed(0)
    size = (
        {"width": 64, "layers": 2, "heads": 1}
        if quick
        else {"width": 768, "layers": 12, "heads": 12}
    )
    encoder = VisionTransformer(
        image_size=224,
        patch_size=16,
        mlp_ratio=4.0,
        output_dim=text_dim(quick=quick),
        act_layer=_quick_gelu(),
        **size,
    )
    network = build_zutis(encoder, num_queries=10 if quick else 100)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.add_(PERTURBATION * torch.randn_like(parameter))
            if name == "ffn1.layers.2.weight":
                parameter.mul_(MASK_SPREAD)
    return network


def text_dim(*, quick: bool) -> int:
    """Length C of the embeddings of `zutis_network`."""
    return 64 if quick else 512


def _quick_gelu() -> type[nn.Module]:
    from open_clip.transformer import QuickGELU

    return QuickGELU


def write_clip(folder: Path, *, embed_dim: int, vision: dict[str, Any]) -> EncoderParams:
    """Write a CLIP with random weights and a tiny text tower; its params."""
    config = {
        "embed_dim": embed_dim,
        "quick_gelu": True,
        "vision_cfg": vision,
        "text_cfg": TINY_TEXT,
    }
    torch.manual_seed(0)
    model_path, weights_path = folder / "clip.json", folder / "clip.safetensors"
    model_path.write_text(json.dumps(config))
    save_file(CLIP(**config).state_dict(), weights_path)
    return EncoderParams(model=str(model_path), pretrained=str(weights_path))


def cpu_runtime(cache_dir: Path) -> Runtime:
    """Float32 on the CPU."""
    return Runtime(device=torch.device("cpu"), amp_dtype=None, seed=0, cache_dir=cache_dir)


def largest_difference(ours: Tensor, published: Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    scale = float(published.abs().max()) or 1.0
    return float((ours - published).abs().max()) / scale
