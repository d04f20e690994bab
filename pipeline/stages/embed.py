"""Stage 1, embed: one source of the index dataset -> Parquet shards of CLIP image embeddings.

Letters: B images, C embedding length, S side of the encoder's input.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.engine.batching import slices
from pipeline.engine.cache import BlobCache
from pipeline.engine.dry_run import CacheUse, DryRun
from pipeline.engine.parallel import Workers
from pipeline.engine.progress import Tally
from pipeline.engine.runtime import Runtime
from pipeline.engine.shard_run import Executor, Job, run_job
from pipeline.errors import PipelineError
from pipeline.formats.images import ImageError, load_image
from pipeline.formats.sources import ImageRef, image_name, list_images, read_image
from pipeline.formats.tables import (
    STATUS_OK,
    STATUS_SKIPPED,
    embedding_bytes,
    embedding_schema,
    encoder_name,
    write_table,
)
from pipeline.models.clip import ClipEncoder, load_clip
from pipeline.params.sections import EmbedParams
from pipeline.params.sources import SourceParams

CACHE_VERSION = 1
CACHED_SIZE = struct.Struct("<II")
# Images after which the cache grows, by device: between two chunks a GPU waits for the next images,
# but what was computed since the last one is lost when a run is killed.
MIN_CHUNK = {"cpu": 256, "cuda": 2048, "mps": 256}


def run(
    *,
    name: str,
    source: SourceParams,
    out_dir: Path,
    params: EmbedParams,
    runtime: Runtime,
    stats_path: Path,
    executor: Executor | DryRun | None = None,
) -> None:
    """Embed all images of a source.

    The shards have one row an image, in the order of the source, whatever the number of workers. An
    image that cannot be read is a row with status "skipped" and the reason; files that are no
    images are counted by kind, as `left_out`. Embeddings are cached by the content of the image: a
    run that was killed continues, and images seen before are not embedded again.

    Args:
        name: name of the source.
        source: where its images are.
        out_dir: folder of the shards, replaced as a whole.
        params: encoder, batch and shard sizes, workers (0: decode in the main thread).
        runtime: device and cache folder.
        stats_path: JSON file of the counts.
        executor: where shards are made; here by default.

    Raises:
        PipelineError: no image is there, none or too few can be read, or the encoder cannot be
            loaded.
    """
    left_out: Counter[str] = Counter()
    refs = list(list_images(name, source, left_out))
    job = Job(
        "embed",
        refs,
        shard_size=params.shard_size,
        load=partial(EmbedMaker, params),
        files=[ref.path for ref in refs],
        remedy=f"They lie below {source.root}: index.{name}.root",
        suffix=".parquet",
        max_error_rate=params.max_error_rate,
        left_out=left_out,
        cached=CacheUse("embed", _settings(runtime), _content_key),
    )
    run_job(job, out_dir=out_dir, stats_path=stats_path, runtime=runtime, executor=executor)


class EmbedMaker:
    """Makes shards of embeddings from images.

    Args:
        params: section `embed`.
        runtime: device and cache folder.

    Attributes:
        settings: all that an embedding depends on besides its image; representable in JSON.
    """

    def __init__(self, params: EmbedParams, runtime: Runtime) -> None:
        encoder = load_clip(
            params.encoder, runtime.device, cache_dir=runtime.cache_dir, field="embed.encoder"
        )
        self.settings = _settings(runtime, encoder=encoder.fingerprint())
        batch_size = params.batch_size
        self._chunk_size = batch_size * -(-MIN_CHUNK[runtime.device.type] // batch_size)
        self._ahead = 2 * batch_size
        self._schema = embedding_schema(
            encoder.embed_dim, encoder_name(params.encoder.model, str(params.encoder.pretrained))
        )
        self._cache = BlobCache(runtime.cache_dir / "embed", self.settings)
        self._workers = Workers(params.workers)
        self._load = _Loader(
            self._cache, preprocess=encoder.preprocess, max_pixels=params.max_pixels
        )
        self._embed = _Embedder(encoder, self._cache, batch_size=batch_size, runtime=runtime)

    def make(self, items: Sequence[ImageRef], path: Path, tally: Tally) -> int:
        """Write one row for each image."""
        records = []
        for refs in slices(items, self._chunk_size):
            loaded = self._workers.map(self._load, refs, ahead=self._ahead)
            images = self._embed(_counted(tally, refs, loaded))
            records += [_record(ref, image) for ref, image in zip(refs, images, strict=True)]
        write_table(path, pa.Table.from_pylist(records, schema=self._schema))
        return len(records)

    def close(self) -> None:
        """Let go of threads and cache."""
        self._workers.close()
        self._cache.close()


def _settings(runtime: Runtime, **encoder: str) -> dict[str, object]:
    """What embeddings depend on besides their image, the encoder where it is loaded."""
    return {"version": CACHE_VERSION, **encoder, "precision": str(runtime.amp_dtype)}


def _content_key(ref: ImageRef) -> str | None:
    """The key of an image's embedding; None for one that cannot be read."""
    try:
        return hashlib.sha256(read_image(ref)).hexdigest()
    except ImageError:
        return None


@dataclass(slots=True)
class _Image:
    """What is known of one image on its way to a row.

    Either `error` says why it is skipped, or `embedding` (C,) float16 comes from the cache, or
    `pixels` (3, S, S) wait for the encoder.
    """

    num_bytes: int | None = None
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    error: str | None = None
    embedding: np.ndarray | None = None
    pixels: Tensor | None = None


class _Loader:
    """Reads, hashes and, unless its embedding is cached, decodes an image; used by all workers."""

    def __init__(
        self, cache: BlobCache, *, preprocess: Callable[..., Tensor], max_pixels: int
    ) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._preprocess = preprocess
        self._max_pixels = max_pixels

    def __call__(self, ref: ImageRef) -> _Image:
        image = _Image()
        try:
            data = read_image(ref)
            image.num_bytes = len(data)
            image.sha256 = hashlib.sha256(data).hexdigest()
            if not self._fill_from_cache(image, image.sha256):
                pixels = load_image(data, max_pixels=self._max_pixels)
                image.width, image.height = pixels.size
                image.pixels = self._preprocess(pixels)
        except ImageError as error:
            image.error = str(error)
        return image

    def _fill_from_cache(self, image: _Image, sha256: str) -> bool:
        with self._lock:
            blob = self._cache.get(sha256)
        if blob is None:
            return False
        width, height = CACHED_SIZE.unpack_from(blob)
        if width * height > self._max_pixels:
            return False
        image.width, image.height = width, height
        image.embedding = np.frombuffer(blob, "<f2", offset=CACHED_SIZE.size)
        return True


class _Embedder:
    """Embeds the images of a chunk in batches and puts the results into the cache at its end.

    Batches always have the same shape, and the cache grows by whole chunks only: a run that
    continues then forms the very batches of one that was never interrupted, and gives its bytes.
    """

    def __init__(
        self, encoder: ClipEncoder, cache: BlobCache, *, batch_size: int, runtime: Runtime
    ) -> None:
        self._encoder = encoder
        self._cache = cache
        self._batch_size = batch_size
        self._runtime = runtime

    def __call__(self, images: Iterable[_Image]) -> list[_Image]:
        """Return the images with every embedding filled in that can be."""
        chunk: list[_Image] = []
        batch: dict[str, Tensor] = {}
        embeddings: dict[str, Tensor] = {}
        for image in images:
            chunk.append(image)
            if image.pixels is not None and image.sha256 not in embeddings:
                batch[str(image.sha256)] = image.pixels
            image.pixels = None
            if len(batch) == self._batch_size:
                embeddings.update(self._encode(batch))
                batch.clear()
        embeddings.update(self._encode(batch))
        self._store(chunk, self._fetch(embeddings))
        return chunk

    def _encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings (C,) by hash, on the device; nothing waits for them yet."""
        if not batch:
            return {}
        pixels = torch.stack(list(batch.values()))
        padding = torch.zeros(self._batch_size - len(batch), *pixels.shape[1:])
        images = torch.cat([pixels, padding])
        if self._runtime.device.type == "cuda":
            images = images.pin_memory()
        images = images.to(self._runtime.device, non_blocking=True)
        with torch.inference_mode(), self._runtime.autocast():
            embeddings = self._encoder.encode_images(images)[: len(batch)].float()
        return dict(zip(batch, embeddings, strict=True))

    def _fetch(self, embeddings: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """The embeddings of a chunk as float16 arrays."""
        if not embeddings:
            return {}
        rows = torch.stack(list(embeddings.values())).cpu()
        if not torch.isfinite(rows).all():
            raise PipelineError(
                "embed.encoder: the encoder gives embeddings that are not finite; "
                "check its weights file"
            )
        return dict(zip(embeddings, rows.half().numpy(), strict=True))

    def _store(self, chunk: list[_Image], embeddings: dict[str, np.ndarray]) -> None:
        for image in chunk:
            if image.embedding is None and image.sha256 in embeddings:
                image.embedding = embeddings[image.sha256]
                header = CACHED_SIZE.pack(image.width, image.height)
                self._cache.put(image.sha256, header + embedding_bytes(image.embedding))
        self._cache.flush()


def _record(ref: ImageRef, image: _Image) -> dict[str, object]:
    return {
        "key": ref.key,
        "source": ref.source,
        "path": ref.path,
        "member": ref.member,
        "offset": ref.offset,
        "width": image.width,
        "height": image.height,
        "bytes": image.num_bytes,
        "sha256": image.sha256,
        "status": STATUS_SKIPPED if image.error else STATUS_OK,
        "error_message": image.error,
        "embedding": None if image.embedding is None else embedding_bytes(image.embedding),
    }


def _counted(tally: Tally, refs: Iterable[ImageRef], images: Iterable[_Image]) -> Iterator[_Image]:
    """Pass images on and count what becomes of each."""
    for ref, image in zip(refs, images, strict=True):
        if image.error:
            tally.skip(image_name(ref), image.error)
        else:
            tally.advance()
            tally.count_in_run("cached", int(image.embedding is not None))
        yield image
