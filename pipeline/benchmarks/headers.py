"""What the headers of photos and masks say before anything is predicted or scored."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pipeline.benchmarks.example import Benchmark, Example, MaskHeader
from pipeline.errors import PipelineError
from pipeline.formats.images import ImageError, stored_size

FEW = 1000  # images whose headers are read at once: no progress bar


def check_headers(benchmark: Benchmark) -> list[str]:
    """Compare the sizes of photos and masks, and the colours of the masks' palettes.

    A photo without a readable header is left out: a predictor skips and counts it.

    Returns:
        What is odd and yet no error, for `StageRun.warn`: palettes that differ.

    Raises:
        PipelineError: a photo and its masks differ in size, or a mask is missing or damaged.
    """
    differing: list[str] = []
    palettes = _Palettes()
    few = len(benchmark) < FEW
    for example in tqdm(benchmark, desc="check sizes", unit="image", disable=few):
        try:
            size = stored_size(example.image_path)
        except ImageError:
            continue
        headers = example.mask_headers()
        differing += [_mismatch(example, size, each) for each in headers if each.size != size][:1]
        for header in headers:
            palettes.add(header)
    if differing:
        raise PipelineError(
            f"{differing[0]}; {len(differing)} of {len(benchmark)} images differ in size from "
            "their masks: take both as they were published, not resized or turned"
        )
    return palettes.warnings()


def _mismatch(example: Example, size: tuple[int, int], header: MaskHeader) -> str:
    return (
        f"{example.image_path}: {size[1]}x{size[0]} pixels, but its masks have "
        f"{header.size[1]}x{header.size[0]} ({header.path})"
    )


@dataclass
class _Masks:
    """Masks of the same colours."""

    first: Path
    standard: Mapping[int, bytes]
    count: int = 0


class _Palettes:
    """Colours of all masks, of which memory holds each palette once."""

    def __init__(self) -> None:
        self._masks: dict[tuple[tuple[int, bytes], ...], _Masks] = {}

    def add(self, header: MaskHeader) -> None:
        """Count a mask; one without palette has nothing to differ in."""
        if header.colours:
            key = tuple(header.colours.items())
            self._masks.setdefault(key, _Masks(header.path, header.standard)).count += 1

    def warnings(self) -> list[str]:
        """One, if palettes differ from the layout's, or else from those of most masks."""
        usual = self._usual()
        odd = [
            masks
            for colours, masks in self._masks.items()
            if any((masks.standard or usual).get(index, rgb) != rgb for index, rgb in colours)
        ]
        if not odd:
            return []
        count, total = (sum(masks.count for masks in of) for of in (odd, self._masks.values()))
        whose = "the layout has" if odd[0].standard else "most have"
        return [
            f"{count} of {total} masks have another palette than {whose}, the first "
            f"{odd[0].first}: indices are label ids whatever their colours, but an editor may have "
            "renumbered them; take the masks as they were published"
        ]

    def _usual(self) -> dict[int, bytes]:
        """The colour that most masks have at each index."""
        votes: dict[int, Counter[bytes]] = defaultdict(Counter)
        for colours, masks in self._masks.items():
            for index, rgb in colours:
                votes[index][rgb] += masks.count
        return {index: counter.most_common(1)[0][0] for index, counter in votes.items()}
