"""The queue of images: what it holds while the network is busy."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipeline.inference.prediction import Prediction
from pipeline.serve.queue import PredictionQueue
from tests.conftest import noise_image
from tests.serve.slow import SlowSegmenter, SlowSource


class HeldSegmenter(SlowSegmenter):
    """One that finishes no batch before it may."""

    def __init__(self) -> None:
        super().__init__(0.0, ["thing"], [])
        self.begun, self.may_end = threading.Event(), threading.Event()

    def predict(self, images: Sequence[Image.Image]) -> list[Prediction]:
        self.begun.set()
        self.may_end.wait()
        return super().predict(images)


async def given_up(queue: PredictionQueue) -> weakref.ref[Image.Image]:
    """A request that is given up while its image waits; the image, if something holds it yet."""
    image = noise_image(0)
    work = asyncio.create_task(queue.predict(image, None))
    await asyncio.sleep(0)
    work.cancel()
    await asyncio.wait([work])
    return weakref.ref(image)


def test_images_of_requests_that_were_given_up_are_let_go() -> None:
    """Equal images, too: only the one whose request was given up goes."""

    async def requests() -> tuple[int, list[Prediction]]:
        segmenter = HeldSegmenter()
        queue = PredictionQueue(segmenter, SlowSource(), batch_size=1)
        try:
            waiting = [asyncio.create_task(queue.predict(noise_image(0), None)) for _ in range(2)]
            await asyncio.to_thread(segmenter.begun.wait)
            images = [await given_up(queue) for _ in range(9)]
            gc.collect()
            held = sum(image() is not None for image in images)
        finally:
            segmenter.may_end.set()
        return held, await asyncio.gather(*waiting)

    held, predictions = asyncio.run(requests())
    assert held == 0
    assert [np.unique(prediction.semantic).tolist() for prediction in predictions] == [[1], [1]]
