"""What a server is asked for, in a form that reaches its workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pipeline.inference.photos import PhotoSegmenter
    from pipeline.params.base import PredictionSettings


class SegmenterSource(Protocol):
    """Where a worker gets its network from; it is pickled on its way there."""

    def load(self, threads: int) -> PhotoSegmenter:
        """The network with its own names, computing in so many threads.

        Raises:
            PipelineError: it cannot be loaded.
        """

    def with_names(self, segmenter: PhotoSegmenter, names: Sequence[str]) -> PhotoSegmenter:
        """What `load` gave, with other names.

        Raises:
            PipelineError: it does not know one of them, or none but its own.
        """


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint.

    Attributes:
        checkpoint_dir: its folder, or a name of `pipeline weights list`.
        categories: any names; None for those of the checkpoint.
        settings: how it predicts.
        device, precision: see `make_runtime`.
    """

    checkpoint_dir: Path
    categories: Sequence[str] | None
    settings: PredictionSettings
    device: str = "auto"
    precision: str = "auto"

    def load(self, threads: int) -> PhotoSegmenter:
        from pipeline.engine.runtime import make_runtime
        from pipeline.inference.segmenter import Segmenter

        runtime = make_runtime(device=self.device, precision=self.precision, threads=threads)
        return Segmenter.load(
            self.checkpoint_dir,
            categories=self.categories,
            settings=self.settings,
            runtime=runtime,
        )

    def with_names(self, segmenter: PhotoSegmenter, names: Sequence[str]) -> PhotoSegmenter:
        """It reads the encoder again, for its text; the network in memory is shared."""
        from pipeline.inference.segmenter import Segmenter

        renamed = Segmenter.load(
            self.checkpoint_dir,
            categories=names,
            settings=self.settings,
            device=self.device,
            precision=self.precision,
        )
        if isinstance(segmenter, Segmenter):
            shared = segmenter.student.network.state_dict()
            renamed.student.network.load_state_dict(shared, assign=True)
        return renamed


@dataclass(frozen=True)
class OnnxSource:
    """A file that `pipeline export --to onnx` wrote; no torch.

    Attributes:
        path: of the file, which has its own settings.
        categories: some of its names; None for all.
    """

    path: Path
    categories: Sequence[str] | None

    def load(self, threads: int) -> PhotoSegmenter:
        from pipeline.inference.onnx import OnnxSegmenter

        return OnnxSegmenter.load(self.path, categories=self.categories, threads=threads)

    def with_names(self, segmenter: PhotoSegmenter, names: Sequence[str]) -> PhotoSegmenter:
        """Some of the file's names; the network in memory is shared."""
        from pipeline.inference.confidence import find_name
        from pipeline.inference.onnx import OnnxSegmenter

        assert isinstance(segmenter, OnnxSegmenter)
        known = segmenter.network.info.categories
        for name in names:  # a client is told no path of ours
            find_name(name, known, field="?categories", among="the network's names")
        return segmenter.select(names)


@dataclass(frozen=True)
class Limits:
    """What a worker takes on.

    Attributes:
        max_bytes: of the body of a request.
        max_pixels: width x height of an image.
        head_s: from a connection to the end of the request's head.
        timeout_s: from there to the answer, and for the answer to be taken.
        max_waiting: requests at a time; further ones are told to come again.
        batch_size: waiting images that go through the network together.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 25_000_000
    head_s: float = 10.0
    timeout_s: float = 60.0
    max_waiting: int = 64
    batch_size: int = 1


@dataclass(frozen=True)
class Address:
    """Where the server listens; port 0 is a free one."""

    host: str = "127.0.0.1"
    port: int = 8000
