"""Images of all requests, segmented one batch after the other in a thread of their own."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from PIL import Image

from pipeline.errors import PipelineError
from pipeline.inference.photos import PhotoSegmenter
from pipeline.inference.prediction import Prediction
from pipeline.serve.errors import BAD_REQUEST, Refused
from pipeline.serve.options import SegmenterSource

KEPT_NAMES = 8  # lists of names whose embeddings are kept
Names = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Job:
    image: Image.Image
    names: Names | None
    answer: asyncio.Future[Prediction]


class PredictionQueue:
    """One network for many requests at a time.

    Args:
        segmenter: the network, with its own names.
        source: where it comes from, which gives it other names.
        batch_size: waiting images that go through it together, if they ask for the same names.
    """

    def __init__(
        self, segmenter: PhotoSegmenter, source: SegmenterSource, *, batch_size: int
    ) -> None:
        self.segmenter = segmenter
        self._source = source
        self._batch_size = batch_size
        self._jobs: deque[_Job] = deque()
        self._renamed: OrderedDict[Names, PhotoSegmenter] = OrderedDict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="segmenter")
        self._work: asyncio.Task[None] | None = None

    async def predict(self, image: Image.Image, names: Names | None) -> Prediction:
        """Segment an RGB image, by the network's own names or by others.

        Whoever gives up waiting, by being cancelled, has the image let go at once, unless it is in
        the batch under way.

        Raises:
            Refused: a name that the network does not know.
        """
        job = _Job(image, names, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._work_off())
        try:
            return await job.answer
        finally:
            with suppress(ValueError):  # it has been taken
                self._jobs.remove(job)

    async def _work_off(self) -> None:
        """Until no image waits."""
        while jobs := self._next_batch():
            await self._answer(jobs)

    def _next_batch(self) -> list[_Job]:
        """Those that have waited longest, all by the same names; none who has given up waiting."""
        jobs: list[_Job] = []
        while self._jobs and len(jobs) < self._batch_size:
            if jobs and self._jobs[0].names != jobs[0].names:
                break
            job = self._jobs.popleft()
            if not job.answer.done():
                jobs.append(job)
        return jobs

    async def _answer(self, jobs: Sequence[_Job]) -> None:
        """Answer a batch; if it fails, one job at a time, so that each gets its own error."""
        loop = asyncio.get_running_loop()
        try:
            predictions = await loop.run_in_executor(self._thread, self._segment, jobs)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    await self._answer([job])
            elif not jobs[0].answer.done():
                jobs[0].answer.set_exception(error)
            return
        for job, prediction in zip(jobs, predictions, strict=True):
            if not job.answer.done():
                job.answer.set_result(prediction)

    def _segment(self, jobs: Sequence[_Job]) -> list[Prediction]:
        return self._named(jobs[0].names).predict([job.image for job in jobs])

    def _named(self, names: Names | None) -> PhotoSegmenter:
        """The network with some names."""
        if names is None or list(names) == self.segmenter.categories:
            return self.segmenter
        if names not in self._renamed:
            try:
                self._renamed[names] = self._source.with_names(self.segmenter, names)
            except PipelineError as error:
                raise Refused(BAD_REQUEST, str(error)) from None
            if len(self._renamed) > KEPT_NAMES:
                self._renamed.popitem(last=False)
        self._renamed.move_to_end(names)
        return self._renamed[names]
