"""Image embeddings of others -> shards of embeddings, as the stage embed writes them.

Two forms are read: the pickles of the published ZUTIS code (file name -> tensor), and the folders
of clip-retrieval (img_emb/img_emb_N.npy beside metadata/metadata_N.parquet). Letters: N images,
C embedding length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.engine.progress import StageRun
from pipeline.errors import PipelineError, listing
from pipeline.files import replace_dir
from pipeline.formats.parquet import UNREADABLE
from pipeline.formats.shards import (
    check_shards_replaceable,
    shard_entry,
    shard_name,
    write_manifest,
)
from pipeline.formats.sources import ImageRef, SourceSpec, image_name
from pipeline.formats.tables import (
    STATUS_OK,
    STATUS_SKIPPED,
    embedding_bytes,
    embedding_schema,
    encoder_name,
    write_table,
)
from pipeline.importers.images import ImageFacts, Prefixes, find_images, read_all
from pipeline.importers.unpickle import load_tensors, read_tensor
from pipeline.models.clip import clip_config
from pipeline.params.base import CLIP_RETRIEVAL_PREFIX, EncoderParams
from pipeline.params.sections import EmbedParams

NAME_COLUMN = "image_path"
LISTED_NAMES = 3


@dataclass(frozen=True)
class NamedEmbeddings:
    """Embeddings of others, not yet joined with images.

    Attributes:
        names: N file names, in the order of the file; None where the file has none.
        dim: C.
        embedding: place in `names` -> unit embedding (C,) float16; see `unit_embedding`.
    """

    names: Sequence[str | None]
    dim: int
    embedding: Callable[[int], NDArray[np.float16]]


def run(
    *,
    path: Path,
    read: Callable[[Path], NamedEmbeddings],
    name: str,
    source: SourceSpec,
    out_dir: Path,
    encoder: str,
    params: EmbedParams,
    prefixes: Prefixes,
    stats_path: Path,
) -> None:
    """Write the shards of a source from embeddings that others have computed.

    One row an image that has an embedding, in the order of the source. An image that cannot be
    read, or whose embedding is zero or not finite, is a row with status "skipped" and the reason,
    as in the stage embed; a name without an image is skipped and listed. The stats count
    `without_embedding`: images of the source that the file does not name.

    Args:
        path: file or folder of the embeddings.
        read: reads it: `read_pickle` or `read_clip_retrieval`.
        name: name of the source.
        source: where its images are.
        out_dir: folder of the shards, replaced as a whole.
        encoder: MODEL/PRETRAINED that the embeddings were made with; has to be that of `params`.
        params: encoder, shard size, workers, largest image.
        prefixes: (old, new) leading folders of the names.
        stats_path: JSON file of the counts.

    Raises:
        PipelineError: `out_dir` holds something else, another encoder, embeddings of another length
            than its, or not one name has an image that can be used.
    """
    check_shards_replaceable(out_dir)
    encoder = _checked_encoder(encoder, params.encoder)
    embeddings = read(path)
    _check_dim(path, embeddings.dim, params.encoder)
    schema = embedding_schema(embeddings.dim, encoder)
    names = [text for text in embeddings.names if text is not None]
    with StageRun(
        "import embeddings", stats_path=stats_path, total=len(embeddings.names)
    ) as stage_run:
        if not names:
            raise PipelineError(f"{path}: none of its embeddings names an image, or it is empty")
        matches = find_images(names, {name: source}, prefixes=prefixes)
        if not matches.found:
            raise PipelineError(
                f"{path}: none of its {len(names)} names is an image of index.{name} "
                f"({source.root}): {listing(names, LISTED_NAMES)}; for other folders use "
                "--prefix OLD=NEW"
            )
        places = _places(embeddings.names, matches.found, stage_run)
        for text, reason in matches.lost:
            stage_run.skip(text, reason)
        stage_run.count("without_embedding", matches.num_listed - len(places))
        refs = {ref.key: ref for ref in matches.found.values()}
        images = read_all(refs.values(), max_pixels=params.max_pixels, workers=params.workers)
        with replace_dir(out_dir) as shard_dir:
            records = (
                _record(ref, facts, embeddings.embedding(places[ref.key]), stage_run)
                for ref, facts in images
            )
            _write_shards(shard_dir, records, schema=schema, shard_size=params.shard_size)
            if stage_run.items == 0:
                last = stage_run.skipped[-1]
                raise PipelineError(
                    f"{path}: none of the {len(refs)} images can be used; the last is "
                    f"{last['item']}: {last['reason']}"
                )


def unit_embedding(values: NDArray[np.floating]) -> NDArray[np.float16]:
    """Embeddings (..., C) brought to length 1, as they are stored.

    A zero stays zero; values that are not finite give NaN.
    """
    wide = values.astype(np.float64)
    with np.errstate(invalid="ignore"):
        norms = np.linalg.norm(wide, axis=-1, keepdims=True)
        return (wide / np.where(norms == 0, 1, norms)).astype(np.float16)


def read_pickle(path: Path) -> NamedEmbeddings:
    """Read the published code's pickle: a dict of file name -> tensor (C,).

    The file is held in memory once (some 4 GB for ImageNet), its embeddings then as float16.

    Raises:
        PipelineError: not such a pickle (`load_tensors`), an empty one, or a tensor that is
            damaged or not of the length of the first; the message names it.
    """
    tensors = load_tensors(path)
    if not tensors:
        raise PipelineError(f"{path}: the dict is empty")
    names = list(tensors)
    rows: list[NDArray[np.float16]] = []
    for name in tqdm(names, desc="read embeddings", unit="image", dynamic_ncols=True):
        try:
            values = read_tensor(tensors.pop(name))
        except ValueError as error:
            raise PipelineError(f"{path}: embedding of {name!r}: {error}") from None
        expected = rows[0].shape if rows else (values.size,)
        if values.shape != expected or values.size == 0:
            raise PipelineError(
                f"{path}: embedding of {name!r}: shape {values.shape}, expected one vector"
                + (f" of length {len(rows[0])}, as the first one has" if rows else "")
            )
        rows.append(unit_embedding(values))
    return NamedEmbeddings(names=names, dim=len(rows[0]), embedding=rows.__getitem__)


def read_clip_retrieval(folder: Path) -> NamedEmbeddings:
    """Read the output folder of `clip-retrieval inference`; embeddings of texts are left alone.

    Names are the column image_path: paths of files, or sample keys of tars. Arrays stay on disk.

    Raises:
        PipelineError: no parts; a part without its metadata, damaged, with pickled objects, of
            other length or number of rows than its metadata.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("img_emb/img_emb_*.npy"), key=lambda path: _part_number(path.stem))
    if not paths:
        raise PipelineError(
            f"{folder}: no img_emb/img_emb_0.npy; expected the output folder of clip-retrieval "
            "inference"
        )
    names: list[str | None] = []
    parts: list[NDArray[np.floating]] = []
    for path in paths:
        part = _read_part(path)
        if parts and part.shape[1] != parts[0].shape[1]:
            raise PipelineError(
                f"{path}: embeddings of length {part.shape[1]}, but {paths[0]} has "
                f"{parts[0].shape[1]}"
            )
        metadata_name = path.stem.replace("img_emb", "metadata")
        metadata_path = folder / "metadata" / f"{metadata_name}.parquet"
        part_names = _read_names(metadata_path)
        if len(part_names) != len(part):
            raise PipelineError(
                f"{metadata_path}: {len(part_names)} rows, but {path} has {len(part)} embeddings"
            )
        names += part_names
        parts.append(part)
    starts = np.cumsum([0, *(len(part) for part in parts)])

    def embedding(place: int) -> NDArray[np.float16]:
        index = int(np.searchsorted(starts, place, side="right")) - 1
        return unit_embedding(parts[index][place - starts[index]])

    return NamedEmbeddings(names=names, dim=parts[0].shape[1], embedding=embedding)


def _part_number(stem: str) -> tuple[int, str]:
    """Sort key: parts in the order of their numbers, whether padded or not."""
    digits = re.search(r"\d+$", stem)
    return (int(digits.group()) if digits else -1, stem)


def _read_part(path: Path) -> NDArray[np.floating]:
    try:
        part = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # its header is parsed as Python, which raises any exception
        raise PipelineError(f"{path}: not a plain NumPy array: {error}") from None
    if not isinstance(part, np.ndarray) or part.ndim != 2 or part.dtype.kind != "f":
        found = f"{part.dtype} {part.shape}" if isinstance(part, np.ndarray) else "an archive"
        raise PipelineError(f"{path}: expected an array (N, C) of floating point, found {found}")
    return part


def _read_names(path: Path) -> list[str | None]:
    if not path.is_file():
        raise PipelineError(
            f"{path}: no such file; every img_emb_N.npy needs its metadata_N.parquet"
        )
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if NAME_COLUMN not in columns:
                raise PipelineError(
                    f"{path}: no column {NAME_COLUMN!r}; its columns are {', '.join(columns)}"
                )
            column = file.read(columns=[NAME_COLUMN])[NAME_COLUMN]
            return column.cast(pa.string()).to_pylist()
    except UNREADABLE as error:
        raise PipelineError(f"{path}: not a readable Parquet file: {error}") from None


def _checked_encoder(text: str, expected: EncoderParams) -> str:
    """Name of the params' encoder, if `text` means the same.

    Later stages embed texts with the encoder of the params, so no other would do.
    """
    name = encoder_name(expected.model, str(expected.pretrained))
    if _plain_encoder(text) not in (_plain_encoder(name), "/".join(expected.published_as())):
        raise PipelineError(
            f"--encoder: {text!r} is not {name!r}, the encoder under embed.encoder of the params; "
            "name there the CLIP that made these embeddings"
        )
    return name


def _check_dim(path: Path, dim: int, encoder: EncoderParams) -> None:
    """Refuse embeddings that cannot be of the encoder, by its configuration alone."""
    expected = clip_config(encoder, field="embed.encoder")["embed_dim"]
    if dim != expected:
        name = encoder_name(encoder.model, str(encoder.pretrained))
        raise PipelineError(
            f"{path}: embeddings of length {dim}, but {name}, embed.encoder of the params, makes "
            f"{expected}; name there, and as --encoder, the CLIP that made these embeddings"
        )


def _plain_encoder(text: str) -> str:
    return text.removeprefix(CLIP_RETRIEVAL_PREFIX).rstrip("/")


def _places(
    names: Sequence[str | None], found: dict[str, ImageRef], stage_run: StageRun
) -> dict[str, int]:
    """Sample key -> place of its embedding; of several for one image the first one counts."""
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        if name is None:
            stage_run.skip(f"row {place}", "no image_path")
        elif name in found and places.setdefault(found[name].key, place) != place:
            stage_run.skip(name, "the image has an embedding already")
    return places


def _record(
    ref: ImageRef, facts: ImageFacts, embedding: NDArray[np.float16], stage_run: StageRun
) -> dict[str, object]:
    error = facts.error or _problem(embedding)
    if error:
        stage_run.skip(image_name(ref), error)
    else:
        stage_run.advance()
    return {
        "key": ref.key,
        "source": ref.source,
        "path": ref.path,
        "member": ref.member,
        "offset": ref.offset,
        "width": facts.width,
        "height": facts.height,
        "bytes": facts.num_bytes,
        "sha256": facts.sha256,
        "status": STATUS_SKIPPED if error else STATUS_OK,
        "error_message": error,
        "embedding": None if error else embedding_bytes(embedding),
    }


def _problem(embedding: NDArray[np.float16]) -> str | None:
    if not np.isfinite(embedding).all():
        return "embedding is not finite"
    return None if embedding.any() else "embedding is zero"


def _write_shards(
    shard_dir: Path, records: Iterator[dict[str, object]], *, schema: pa.Schema, shard_size: int
) -> None:
    entries: list[dict[str, Any]] = []
    while rows := list(islice(records, shard_size)):
        path = shard_dir / shard_name(len(entries), ".parquet")
        write_table(path, pa.Table.from_pylist(rows, schema=schema))
        entries.append(shard_entry(path, len(rows)))
    write_manifest(shard_dir, entries)


READERS: dict[str, Callable[[Path], NamedEmbeddings]] = {
    "pickle": read_pickle,
    "clip-retrieval": read_clip_retrieval,
}
