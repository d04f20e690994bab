"""python -m speed.gpu: images a second on a GPU, and `speed/results/bench-gpu.json`.

Training is measured against the published step in float32, the stages against the bare forward of
their networks, and the encoder against the peak of the device. `--quick --device cpu` tries it all
at tiny sizes where there is no GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.engine.runtime import Runtime, make_runtime
from pipeline.errors import PipelineError
from pipeline.files import write_json
from pipeline.models.clip.tokens import encode_patches
from speed.evaluation import prepare_evaluation
from speed.harness import Pair, timed
from speed.inputs import zutis_network
from speed.machine import describe_machine
from speed.stages import VIT_B_32, VIT_L_14_336, prepare_embed, prepare_mask, prepare_pseudo_label
from speed.train_step import prepare_step

REPORT = Path("speed/results/bench-gpu.json")
ENCODER_BATCH = 32
# Dense bfloat16 TFLOP/s as their makers give them; --peak-tflops for others.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "V100": 125.0}


@dataclass(frozen=True)
class Throughput:
    """One line of the table.

    Attributes:
        name: what ran, and at which batch size.
        images_per_second: of the pipeline.
        reference: what the other side is.
        reference_images_per_second: its rate.
        ratio: the first over the second.
        tflops: rate in 1e12 FLOP/s, of the row that is about it.
        share_of_peak: that rate over the device's peak, where it is known.
    """

    name: str
    images_per_second: float
    reference: str
    reference_images_per_second: float | None = None
    ratio: float | None = None
    tflops: float | None = None
    share_of_peak: float | None = None


def main() -> int:
    """Measure and write the report; exit status 2 without a GPU, unless --device cpu."""
    options = _options()
    try:
        runtime = make_runtime(device=options.device)
    except PipelineError:
        print("no CUDA device; `--quick --device cpu` tries the benchmark", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name() if runtime.device.type == "cuda" else "CPU"
    rows = []
    for row in _rows(runtime, options, peak=options.peak_tflops or _peak(device)):
        rows.append(row)
        print(_line(row), flush=True)
    if not options.quick:
        machine = {"device": device, **describe_machine(torch.get_num_threads())}
        write_json(options.out, {"machine": machine, "rows": [asdict(row) for row in rows]})
        print(f"written to {options.out}")
    return 0


def _options() -> Any:
    parser = argparse.ArgumentParser(prog="python -m speed.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--images", type=int, default=1024, help="images a stage (1024)")
    parser.add_argument("--workers", type=int, default=8, help="threads of the stages (8)")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each row (5)")
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense bfloat16")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no report")
    parser.add_argument("--out", type=Path, default=REPORT, help=f"report ({REPORT})")
    return parser.parse_args()


def _peak(device: str) -> float | None:
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def _rows(runtime: Runtime, options: Any, *, peak: float | None) -> Iterator[Throughput]:
    quick, repeats = options.quick, options.repeats

    def make(cache_dir: Path) -> Runtime:
        return Runtime(runtime.device, runtime.amp_dtype, seed=0, cache_dir=cache_dir)

    yield _encoder(runtime, quick=quick, repeats=repeats, peak=peak)
    for batch in options.batches[:1] if quick else options.batches:
        prepare = partial(prepare_step, batch=batch, make=make)
        name = f"training step, ViT-B/16 at 384, batch {batch}"
        yield _measured(name, prepare, batch, "published step, float32", quick, repeats)
    count = 4 if quick else options.images
    share: dict[str, Any] = {"make": make, "count": count}
    threaded = {**share, "workers": options.workers}
    for name, prepare in (
        ("embed, ViT-L/14@336", partial(prepare_embed, vision=VIT_L_14_336, **threaded)),
        ("embed, ViT-B/32", partial(prepare_embed, vision=VIT_B_32, batch_size=64, **threaded)),
        ("mask, SelfMask with solver", partial(prepare_mask, **threaded)),
        ("pseudo_label, ViT-B/16", partial(prepare_pseudo_label, **threaded)),
        ("evaluate, ViT-B/16, scores included", partial(prepare_evaluation, **share)),
    ):
        yield _measured(name, prepare, count, "bare forward", quick, 2)


def _measured(
    name: str,
    prepare: Callable[[Path, bool], Pair],
    count: int,
    reference: str,
    quick: bool,
    repeats: int,
) -> Throughput:
    """Rates of both sides; the first call of each is the warm-up.

    The published step may ask for more memory than there is; then it has no rate.
    """
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
    ):
        pair = prepare(Path(folder), quick)
        theirs = _seconds(pair.published, repeats)
        ours = _seconds(pair.ours, repeats)
    if ours is None:
        raise PipelineError(f"{name}: not enough memory on the device; lower --batches or --images")
    return Throughput(
        name,
        count / ours,
        reference,
        None if theirs is None else count / theirs,
        None if theirs is None else theirs / ours,
    )


def _seconds(side: Callable[[], Any], repeats: int) -> float | None:
    try:
        return median([_timed(side) for _ in range(1 + repeats)][1:])
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _timed(side: Callable[[], Any]) -> float:
    def finished() -> Any:
        result = side()
        _synchronise()
        return result

    _synchronise()
    return timed(finished)[0]


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _encoder(runtime: Runtime, *, quick: bool, repeats: int, peak: float | None) -> Throughput:
    """Forward and backward of the image encoder alone, and its share of the device's peak."""
    network = zutis_network(quick=quick).to(runtime.device).train()
    batch, side = (2, 64) if quick else (ENCODER_BATCH, 384)
    images = torch.rand(batch, 3, side, side, device=runtime.device)

    def step() -> None:
        with runtime.autocast():
            tokens = encode_patches(network.encoder, images)
        tokens.float().square().mean().backward()
        network.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False) as counter:
        step()
    seconds = median([_timed(step) for _ in range(1 + repeats)][1:])
    rate = counter.get_total_flops() / seconds / 1e12
    return Throughput(
        f"encoder forward and backward, ViT-B/16 at 384, batch {batch}",
        batch / seconds,
        "peak of the device",
        tflops=rate,
        share_of_peak=None if peak is None else rate / peak,
    )


def _line(row: Throughput) -> str:
    parts = [f"{row.name}: {row.images_per_second:.1f} images/s"]
    if row.reference_images_per_second is not None:
        parts.append(
            f"{row.reference} {row.reference_images_per_second:.1f}, ratio {row.ratio:.2f}"
        )
    if row.tflops is not None:
        parts.append(f"{row.tflops:.1f} TFLOP/s")
    if row.share_of_peak is not None:
        parts.append(f"{row.share_of_peak:.0%} of the peak")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
