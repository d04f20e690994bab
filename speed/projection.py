"""python -m speed.projection: bytes, FLOPs and hours for pools of images, as Markdown tables.

FLOPs are counted in the networks at their real sizes, bytes in files that are written for it, CPU
rates on this machine. GPU hours divide FLOPs by the rate of `speed/results/bench-gpu.json`, or by
an assumed one: the last column says which.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pipeline.formats.images import encode_png, load_image
from pipeline.models.clip.tokens import encode_patches
from pipeline.models.masks.bilateral import bilateral_solve
from pipeline.models.masks.selfmask import SelfMask
from pipeline.models.zutis.build import build_zutis
from speed.inputs import ellipses, jpeg, photo
from speed.retrieval import CURVE as RETRIEVE
from speed.table import table_row

ENCODERS = {"ViT-B/32": 512, "ViT-L/14@336": 768}  # lengths of their embeddings
POOLS = (1_400_000, 100_000_000, 5_000_000_000)
ARCHIVES = ((20, 500), (80, 500), (919, 500))  # names, k: VOC, COCO, ImageNet-S
SIZE = (375, 500)
TRAINING_IMAGES = 20_000 * 8
ASSUMED_TFLOPS = 200.0
CORES = 16
MANY = 64
HOUR = 3600
LEAST_HOURS = 1e-4  # shown


@dataclass(frozen=True)
class Costs:
    """What one image costs.

    Attributes:
        flops: of a GPU, in units of 1e9.
        core_seconds: of a CPU core, beside the network.
        bytes_written: on disk.
    """

    flops: float
    core_seconds: float
    bytes_written: float


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m speed.projection", description=__doc__)
    parser.add_argument("--scale", type=Path, default=Path("speed/results/scale.json"))
    parser.add_argument("--gpu", type=Path, default=Path("speed/results/bench-gpu.json"))
    parser.add_argument("--tflops", type=float, default=ASSUMED_TFLOPS, help="if none is measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tflops, origin = _rate(options.gpu, options.tflops)
    costs = _costs()
    print(_image_table(costs))
    print(_pool_table(costs, _retrieve_rate(options.scale), tflops, origin))
    print(_archive_table(costs, tflops, origin))


def _rate(report: Path, assumed: float) -> tuple[float, str]:
    """TFLOP/s to be had from one GPU, and where the number is from."""
    if not report.is_file():
        return assumed, f"assumed: {assumed:.0f} TFLOP/s"
    content = json.loads(report.read_text())
    [rate] = [row["tflops"] for row in content["rows"] if row["tflops"] is not None]
    return float(rate), f"measured: {content['machine']['device']}"


def _retrieve_rate(report: Path) -> float:
    """Numbers of embeddings a second of one core, from the largest pool that was measured."""
    content = json.loads(report.read_text())
    rows = [row for row in content["rows"] if row["curve"] == RETRIEVE.name]
    largest = max(rows, key=lambda row: row["size"])
    return float(content["dim"] * largest["size"] / largest["core_seconds"])


def _costs() -> dict[str, Costs]:
    """Costs of an image by stage."""
    image = photo(0, SIZE[1], SIZE[0])
    data = jpeg(image)
    mask = np.logical_or(*ellipses(0, 2, SIZE))
    label = np.where(mask, np.uint8(3), np.uint8(0))
    decode = _seconds(lambda: load_image(data))
    solve = _seconds(lambda: bilateral_solve(np.asarray(image), mask))
    encode = _seconds(lambda: encode_png(mask))
    mask_bytes = len(encode_png(mask))
    labels_bytes = 2 * len(encode_png(label))
    forward = _flops(_zutis, SIZE)
    return {
        "embed, ViT-L/14@336": Costs(_flops(_vit_l, (336, 336)), decode, _row_bytes(768)),
        "embed, ViT-B/32": Costs(_flops(_vit_b32, (224, 224)), decode, _row_bytes(512)),
        "mask, SelfMask": Costs(
            _flops(SelfMask, SIZE), decode + solve + encode, len(data) + mask_bytes
        ),
        "pseudo_label, ViT-B/16": Costs(
            _flops(_vit_b16, SIZE), decode + 2 * encode, len(data) + mask_bytes + labels_bytes
        ),
        "train, ZUTIS ViT-B/16 at 384": Costs(3 * _flops(_zutis, (384, 384)), 5.5 * decode, 0),
        "evaluate, ZUTIS ViT-B/16": Costs(forward, decode, mask_bytes),
    }


def _row_bytes(dim: int) -> float:
    """Bytes of an image in the embedding shards, from a shard that is written."""
    rows = 10_000
    with tempfile.TemporaryDirectory(prefix="projection-") as folder:
        RETRIEVE.prepare(Path(folder), rows, dim)
        shards = Path(folder, "embeddings").rglob("*.parquet")
        return sum(path.stat().st_size for path in shards) / rows


def _seconds(function: Callable[[], Any]) -> float:
    times = []
    for _ in range(10):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def _flops(build: Callable[[], torch.nn.Module], size: tuple[int, int]) -> float:
    """FLOPs of a forward pass, in units of 1e9."""
    network = build()
    # Torch counts the attention of GPUs only.
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        network(torch.rand(1, 3, *size))
    return counter.get_total_flops() / 1e9


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _vision(width: int, layers: int, patch: int, side: int) -> VisionTransformer:
    return VisionTransformer(
        image_size=side,
        patch_size=patch,
        width=width,
        layers=layers,
        heads=width // 64,
        mlp_ratio=4.0,
        output_dim=512,
        act_layer=QuickGELU,
    )


def _vit_l() -> torch.nn.Module:
    return _vision(1024, 24, 14, 336)


def _vit_b32() -> torch.nn.Module:
    return _vision(768, 12, 32, 224)


def _zutis() -> torch.nn.Module:
    return build_zutis(_vision(768, 12, 16, 224))


def _vit_b16() -> torch.nn.Module:
    return _Encoder(_vision(768, 12, 16, 224))


class _Encoder(torch.nn.Module):
    """The patch tokens of an encoder, of which DenseCLIP costs little more."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return encode_patches(self.encoder, images)


def _image_table(costs: dict[str, Costs]) -> str:
    lines = ["| stage | GFLOP an image | CPU ms an image | bytes an image |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {cost.flops:.1f} | {1e3 * cost.core_seconds:.1f} | {cost.bytes_written:,.0f} |"
        for name, cost in costs.items()
    ]
    return "\n".join(lines) + "\n"


def _pool_table(costs: dict[str, Costs], retrieve: float, tflops: float, origin: str) -> str:
    head = (
        "images",
        "embeddings on disk",
        "decode, core hours",
        f"embed, hours of 1 GPU ({origin})",
        f"of {MANY} GPUs",
        "retrieve, hours of 1 core",
        f"of {CORES} cores",
    )
    lines = [table_row(head), table_row(["---"] * len(head))]
    for encoder, dim in ENCODERS.items():
        cost = costs[f"embed, {encoder}"]
        for images in POOLS:
            hours = images * cost.flops / (tflops * 1e3) / HOUR
            search = images * dim / retrieve / HOUR
            cells = (
                f"{images:,}, {encoder}",
                f"{images * cost.bytes_written / 1e9:,.0f} GB",
                *map(_hours, (images * cost.core_seconds / HOUR, hours, hours / MANY)),
                *map(_hours, (search, search / CORES)),
            )
            lines.append(table_row(cells))
    return "\n".join(lines) + "\n"


def _archive_table(costs: dict[str, Costs], tflops: float, origin: str) -> str:
    head = (
        "archive images",
        "shards on disk",
        "mask + pseudo_label, core hours",
        f"mask + pseudo_label, hours of 1 GPU ({origin})",
        "train, hours of 1 GPU",
    )
    lines = [table_row(head), table_row(["---"] * len(head))]
    mask, label = costs["mask, SelfMask"], costs["pseudo_label, ViT-B/16"]
    train = costs["train, ZUTIS ViT-B/16 at 384"]
    for names, k in ARCHIVES:
        images = names * k
        cells = (
            f"{images:,} ({names} names, k = {k})",
            f"{images * (mask.bytes_written + label.bytes_written) / 1e9:,.1f} GB",
            _hours(images * (mask.core_seconds + label.core_seconds) / HOUR),
            _hours(images * (mask.flops + label.flops) / (tflops * 1e3) / HOUR),
            _hours(TRAINING_IMAGES * train.flops / (tflops * 1e3) / HOUR),
        )
        lines.append(table_row(cells))
    return "\n".join(lines)


def _hours(hours: float) -> str:
    if hours >= 10:
        return f"{hours:,.0f}"
    return f"{hours:.2g}" if hours >= LEAST_HOURS else f"< {LEAST_HOURS:.4f}"


if __name__ == "__main__":
    main()
