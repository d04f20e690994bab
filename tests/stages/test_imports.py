"""Imports of published archives and embeddings: what comes out, what the next stages make of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.formats.shards import MANIFEST, read_shards
from pipeline.formats.sources import sample_key
from pipeline.formats.tables import ArchiveRow, encoder_name, read_archives, shard_encoder
from pipeline.importers import archives, embeddings
from pipeline.importers.images import parse_prefixes
from pipeline.methods.masks import SpectralParams
from pipeline.models.clip import load_clip
from pipeline.params.base import EncoderParams
from pipeline.params.sections import EmbedParams, RetrieveParams, SourceParams
from pipeline.stages import embed, mask, retrieve

C = 16
CATEGORIES = ["cat", "dog"]


@pytest.fixture
def params(encoder: EncoderParams) -> EmbedParams:
    return EmbedParams(encoder=encoder, batch_size=4, shard_size=5, workers=2)


@pytest.fixture
def pool(make_image_folder: Callable[..., Path]) -> SourceParams:
    """Eight images 0.jpg to 7.jpg."""
    return SourceParams(root=make_image_folder())


def clip_embeddings(encoder: EncoderParams, paths: list[Path]) -> torch.Tensor:
    """Unit embeddings (N, C) float32, each computed as the published code does it."""
    clip = load_clip(encoder, torch.device("cpu"))
    images = torch.stack([clip.preprocess(Image.open(path)) for path in paths])
    with torch.no_grad():
        features = clip.encode_images(images)
    return features / features.norm(dim=1, keepdim=True)


def random_tensors(names: list[str]) -> dict[str, torch.Tensor]:
    vectors = torch.randn(len(names), C)
    return {name: vector.clone() for name, vector in zip(names, vectors, strict=True)}


def vector_of(row: dict[str, Any]) -> np.ndarray:
    """Embedding (C,) of a row of a shard."""
    return np.frombuffer(row["embedding"], "<f2")


def write_pickle(path: Path, content: Any, protocol: int | None = None) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def write_clip_retrieval(
    folder: Path, parts: list[tuple[np.ndarray, dict[str, Any]]], numbers: list[str]
) -> Path:
    """The files of clip-retrieval's NumPy writer: arrays and a table of metadata a part."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for number, (array, columns) in zip(numbers, parts, strict=True):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", array)
        pq.write_table(pa.table(columns), folder / "metadata" / f"metadata_{number}.parquet")
    return folder


@pytest.fixture
def import_embeddings(
    tmp_path: Path, params: EmbedParams, pool: SourceParams
) -> Callable[..., tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Function that imports a pickle or folder and returns all rows and the stats."""

    def run(path: Path, form: str = "pickle", **changes: Any) -> Any:
        encoder = encoder_name(params.encoder.model, params.encoder.pretrained)
        prefixes = parse_prefixes(changes.pop("prefixes", []))
        arguments = {"name": "pool", "source": pool, "encoder": encoder, "params": params}
        embeddings.run(
            path=path,
            read=embeddings.READERS[form],
            out_dir=tmp_path / "embeddings" / "pool",
            prefixes=prefixes,
            stats_path=tmp_path / "stats.json",
            **(arguments | changes),
        )
        shards = sorted((tmp_path / "embeddings" / "pool").glob("*.parquet"))
        rows = [row for path in shards for row in pq.read_table(path).to_pylist()]
        return rows, json.loads((tmp_path / "stats.json").read_text())

    return run


@pytest.fixture
def import_archives(
    tmp_path: Path, pool: SourceParams
) -> Callable[..., tuple[list[ArchiveRow], dict[str, Any]]]:
    """Function that imports a dict as archives JSON and returns all rows and the stats."""

    def run(content: Any, **changes: Any) -> Any:
        json_path = tmp_path / "category_to_p_images.json"
        json_path.write_text(json.dumps(content))
        prefixes = parse_prefixes(changes.pop("prefixes", []))
        arguments = {
            "categories": CATEGORIES,
            "sources": {"pool": pool},
            "k": 500,
            "overlap": "all",
            "max_pixels": 10_000,
            "workers": 2,
        }
        archives.run(
            json_path=json_path,
            out_path=tmp_path / "archives.parquet",
            prefixes=prefixes,
            stats_path=tmp_path / "stats.json",
            **(arguments | changes),
        )
        stats = json.loads((tmp_path / "stats.json").read_text())
        return read_archives(tmp_path / "archives.parquet"), stats

    return run


def places(rows: list[ArchiveRow]) -> list[tuple[str, int, str]]:
    return [(row.category, row.rank, Path(row.path).name) for row in rows]


# Embeddings: pickles


def test_a_pickle_of_the_published_form_gives_what_embedding_gives(
    tmp_path: Path,
    params: EmbedParams,
    pool: SourceParams,
    runtime: Runtime,
    import_embeddings: Callable,
) -> None:
    paths = sorted(pool.root.iterdir())
    (pool.root / "broken.jpg").write_bytes(b"nothing")
    vectors = clip_embeddings(params.encoder, paths)
    tensors = {path.name: vector for path, vector in zip(paths, vectors, strict=True)}
    tensors["broken.jpg"] = vectors[0]
    shuffled = {name: tensors[name] for name in sorted(tensors, reverse=True)}
    rows, stats = import_embeddings(write_pickle(tmp_path / "emb.pkl", shuffled))

    embed.run(
        name="pool",
        source=pool,
        out_dir=tmp_path / "embedded",
        params=params,
        runtime=runtime,
        stats_path=tmp_path / "embed.json",
    )
    *ours, manifest = sorted((tmp_path / "embedded").iterdir())
    *theirs, _ = sorted((tmp_path / "embeddings" / "pool").iterdir())
    assert [*(path.name for path in theirs), MANIFEST] == [*(p.name for p in ours), manifest.name]
    assert [pq.read_schema(path) for path in ours] == [pq.read_schema(path) for path in theirs]
    assert shard_encoder(ours[0]) == shard_encoder(theirs[0])
    expected = [row for path in ours for row in pq.read_table(path).to_pylist()]
    for row, other in zip(rows, expected, strict=True):
        if row["status"] == "ok":
            np.testing.assert_allclose(vector_of(row), vector_of(other), atol=1e-3)
            del row["embedding"], other["embedding"]
        assert row == other
    assert (stats["items"], stats["skipped"]) == (8, 1)
    assert stats["counts"] == {"without_embedding": 0}


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_every_protocol_of_bytes_is_read(
    tmp_path: Path, import_embeddings: Callable, protocol: int
) -> None:
    tensors = random_tensors(["1.jpg", "2.jpg"])
    rows, _ = import_embeddings(write_pickle(tmp_path / "emb.pkl", tensors, protocol))
    for row, vector in zip(rows, tensors.values(), strict=True):
        unit = (vector / vector.norm()).numpy()
        np.testing.assert_array_equal(vector_of(row), unit.astype(np.float16))


def test_views_half_precision_and_other_lengths_than_one(
    tmp_path: Path, import_embeddings: Callable
) -> None:
    table = torch.randn(C, 3)
    tensors = {
        "0.jpg": table[:, 1],  # strided, shares its storage
        "1.jpg": (1e4 * table[:, 2]).half(),
        "2.jpg": 1e30 * table[:, 0].double(),
        "3.jpg": torch.nn.functional.normalize(table[:, 0], dim=0).requires_grad_(True).detach(),
    }
    rows, _ = import_embeddings(write_pickle(tmp_path / "emb.pkl", tensors))
    assert [row["status"] for row in rows] == ["ok"] * 4
    for row, vector in zip(rows, tensors.values(), strict=True):
        expected = vector.double() / vector.double().norm()
        np.testing.assert_allclose(vector_of(row), expected.numpy(), atol=1e-3)


def test_embeddings_without_direction_and_names_without_an_image_are_skipped(
    tmp_path: Path, import_embeddings: Callable
) -> None:
    tensors = random_tensors(["0.jpg", "1.jpg", "2.jpg", "3.jpg", "gone.jpg"])
    tensors["1.jpg"][3] = float("nan")
    tensors["2.jpg"][3] = float("inf")
    tensors["3.jpg"][:] = 0
    rows, stats = import_embeddings(write_pickle(tmp_path / "emb.pkl", tensors))
    reasons = [(row["status"], row["error_message"]) for row in rows]
    assert reasons == [
        ("ok", None),
        ("skipped", "embedding is not finite"),
        ("skipped", "embedding is not finite"),
        ("skipped", "embedding is zero"),
    ]
    assert all(row["embedding"] is None for row in rows[1:])
    assert {"item": "gone.jpg", "reason": "no such image"} in stats["skipped_items"]
    assert (stats["items"], stats["skipped"]) == (1, 4)
    assert stats["counts"]["without_embedding"] == 4


def test_bare_names_are_found_in_subfolders_unless_two_have_them(
    tmp_path: Path, pool: SourceParams, import_embeddings: Callable
) -> None:
    for folder in ("n01", "n02"):
        (pool.root / folder).mkdir()
    (pool.root / "0.jpg").rename(pool.root / "n01" / "n01_0.JPEG")
    (pool.root / "1.jpg").rename(pool.root / "n01" / "same.jpg")
    (pool.root / "2.jpg").rename(pool.root / "n02" / "same.jpg")
    tensors = random_tensors(["n01_0.JPEG", "same.jpg"])
    rows, stats = import_embeddings(write_pickle(tmp_path / "emb.pkl", tensors))
    assert [row["key"] for row in rows] == [sample_key("pool", "n01/n01_0.JPEG")]
    assert stats["skipped_items"] == [{"item": "same.jpg", "reason": "2 images have this name"}]


def test_imported_embeddings_are_retrieved_from(
    tmp_path: Path,
    params: EmbedParams,
    pool: SourceParams,
    runtime: Runtime,
    import_embeddings: Callable,
) -> None:
    paths = sorted(pool.root.iterdir())
    vectors = clip_embeddings(params.encoder, paths)
    tensors = {path.name: vector for path, vector in zip(paths, vectors, strict=True)}
    import_embeddings(write_pickle(tmp_path / "emb.pkl", tensors))
    retrieve.run(
        embeddings_dir=tmp_path / "embeddings",
        sources=["pool"],
        out_path=tmp_path / "archives.parquet",
        categories=CATEGORIES,
        background=["background"],
        k=3,
        params=RetrieveParams(templates="name", overlap="all"),
        encoder=params.encoder,
        runtime=runtime,
        stats_path=tmp_path / "retrieve.json",
    )
    rows = read_archives(tmp_path / "archives.parquet")
    assert [(row.label_id, row.rank) for row in rows] == [(n, r) for n in (1, 2) for r in (1, 2, 3)]
    assert {row.path for row in rows} <= {str(path) for path in paths}


class _Shell:
    """Runs a command when it is unpickled by the usual means."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


class _Storage:
    """A tensor whose storage, a pickle within the pickle, runs a command."""

    def __init__(self, storage: bytes) -> None:
        self._storage = storage

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self._storage,)


class _Tensor:
    def __init__(self, storage: Any, size: Any = (C,), stride: Any = (1,)) -> None:
        self._arguments = (storage, 0, size, stride, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self._arguments


class _Tampered(_Tensor):
    """Sets attributes of what the pickle's names stand for."""

    def __reduce__(self) -> Any:
        return *super().__reduce__(), {"data": b""}


def saved_storage(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def test_pickles_that_run_code_are_refused_and_do_not_run_it(
    tmp_path: Path, import_embeddings: Callable
) -> None:
    trap = tmp_path / "sprung"
    shell = _Shell(f"touch {trap}")
    hostile = {
        "plain": shell,
        "value": {"0.jpg": shell},
        "key": {"0.jpg": torch.ones(C), shell: 1},
        "hooks": {"0.jpg": _Tensor(shell)},
        "storage": {"0.jpg": _Tensor(_Storage(saved_storage([shell])))},
    }
    for content in hostile.values():
        path = write_pickle(tmp_path / "evil.pkl", content)
        with pytest.raises(PipelineError, match=r"evil\.pkl: .*refused: .* asks for posix\.system"):
            import_embeddings(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(shell))
    assert trap.exists()  # the trap works


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.ones(C), r"asks for numpy\._?core\.multiarray\._reconstruct"),
        ({"0.jpg": np.ones(C)}, r"asks for numpy\._?core\.multiarray\._reconstruct"),
        ({"0.jpg": torch.nn.Parameter(torch.ones(C))}, r"torch\._utils\._rebuild_parameter"),
        ([torch.ones(C)], "found a list"),
        ({"0.jpg": [torch.ones(C)]}, "entry '0.jpg' is a list"),
        ({0: torch.ones(C)}, "entry 0 is a StoredTensor"),
        ({"0.jpg": None}, "entry '0.jpg' is a NoneType"),
        ({}, "the dict is empty"),
        ({"0.jpg": torch.ones(C), "1.jpg": torch.ones(4)}, r"'1.jpg': shape \(4,\).* length 16"),
        ({"0.jpg": torch.ones(1, C)}, r"'0.jpg': shape \(1, 16\), expected one vector"),
        ({"0.jpg": torch.ones(())}, r"shape \(\), expected one vector"),
        ({"0.jpg": torch.ones(0)}, r"shape \(0,\), expected one vector"),
        ({"0.jpg": torch.ones(C, dtype=torch.int64)}, "of type torch.int64, not floating-point"),
        ({"0.jpg": _Tensor(_Storage(b"not a storage"))}, "embedding of '0.jpg': "),
        ({"0.jpg": _Tensor(None)}, "embedding of '0.jpg': "),
        ({"0.jpg": _Tensor(_Storage(saved_storage([1])))}, "a list in place of a storage"),
        ({"0.jpg": _Tampered(None)}, "not a readable pickle"),
    ],
)
def test_pickles_of_anything_else_are_refused(
    tmp_path: Path, import_embeddings: Callable, content: Any, reason: str
) -> None:
    path = write_pickle(tmp_path / "other.pkl", content)
    with pytest.raises(PipelineError, match=rf"other\.pkl: .*{reason}"):
        import_embeddings(path)
    assert not (tmp_path / "embeddings").exists()


def test_a_tensor_larger_than_its_storage_is_refused(
    tmp_path: Path, import_embeddings: Callable
) -> None:
    storage = _Storage(saved_storage(torch.ones(4)._typed_storage()))
    for size, stride in [((C,), (1,)), ((10**12,), (0,)), ((4,), (2,)), ((-1,), (1,))]:
        path = write_pickle(tmp_path / "emb.pkl", {"0.jpg": _Tensor(storage, size, stride)})
        with pytest.raises(PipelineError, match=r"embedding of '0\.jpg'"):
            import_embeddings(path)


def test_a_cut_off_pickle_and_no_pickle_are_refused(
    tmp_path: Path, import_embeddings: Callable
) -> None:
    path = write_pickle(tmp_path / "emb.pkl", random_tensors(["0.jpg", "1.jpg"]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PipelineError, match="not a readable pickle"):
        import_embeddings(path)
    torch.save(random_tensors(["0.jpg"]), path)
    with pytest.raises(PipelineError, match="not a readable pickle"):
        import_embeddings(path)
    with pytest.raises(PipelineError, match=r"gone\.pkl: no such file"):
        import_embeddings(tmp_path / "gone.pkl")


def test_another_encoder_is_refused_before_anything_is_read(
    tmp_path: Path, import_embeddings: Callable
) -> None:
    with pytest.raises(PipelineError, match=r"'ViT-L-14/openai' is not '.*tiny\.safetensors'"):
        import_embeddings(tmp_path / "gone.pkl", encoder="ViT-L-14/openai")


def test_clip_retrievals_model_string_names_the_same_encoder(
    tmp_path: Path, params: EmbedParams, import_embeddings: Callable
) -> None:
    path = write_pickle(tmp_path / "emb.pkl", random_tensors(["0.jpg"]))
    text = "open_clip:ViT-B-32/laion2b_s34b_b79k"
    for encoder in (
        EncoderParams(model="ViT-B-32", pretrained="laion2b_s34b_b79k"),
        EncoderParams(model=text, pretrained=""),
    ):
        changed = params.model_copy(update={"encoder": encoder})
        import_embeddings(path, encoder=text, params=changed)
        shard = tmp_path / "embeddings" / "pool" / "00000.parquet"
        assert shard_encoder(shard)[0] == encoder_name(encoder.model, encoder.pretrained)


def test_when_nothing_matches_the_old_output_stays(
    tmp_path: Path, pool: SourceParams, import_embeddings: Callable
) -> None:
    import_embeddings(write_pickle(tmp_path / "emb.pkl", random_tensors(["0.jpg"])))
    before = (tmp_path / "embeddings" / "pool" / "00000.parquet").read_bytes()
    path = write_pickle(tmp_path / "emb.pkl", random_tensors(["/theirs/a.jpg"]))
    with pytest.raises(PipelineError, match=r"none of its 1 names .*/theirs/a\.jpg.*--prefix"):
        import_embeddings(path)
    (pool.root / "1.jpg").write_bytes(b"")
    path = write_pickle(tmp_path / "emb.pkl", random_tensors(["1.jpg"]))
    with pytest.raises(PipelineError, match=r"none of the 1 images .*1\.jpg: empty file"):
        import_embeddings(path)
    assert (tmp_path / "embeddings" / "pool" / "00000.parquet").read_bytes() == before


# Embeddings: clip-retrieval


def test_clip_retrievals_folder_over_files(
    tmp_path: Path, pool: SourceParams, import_embeddings: Callable
) -> None:
    vectors = np.random.default_rng(0).normal(size=(9, C)).astype(np.float16)
    names = [f"/old/pool/{number}.jpg" for number in (*range(8), 3)]
    parts = [
        (vectors[:2], {"image_path": names[:2], "caption": ["", "a"]}),
        (vectors[2:3], {"image_path": names[2:3], "caption": ["b"]}),
        (vectors[3:], {"image_path": names[3:], "caption": ["c"] * 6}),
    ]
    folder = write_clip_retrieval(tmp_path / "theirs", parts, ["0", "2", "10"])
    (folder / "text_emb").mkdir()
    (folder / "text_emb" / "text_emb_0.npy").write_bytes(b"left alone")
    rows, stats = import_embeddings(folder, "clip-retrieval", prefixes=[f"/old/pool={pool.root}/"])
    assert [Path(row["path"]).name for row in rows] == [f"{number}.jpg" for number in range(8)]
    for row, vector in zip(rows, vectors[:8].astype(np.float64), strict=True):
        np.testing.assert_allclose(vector_of(row), vector / np.linalg.norm(vector), atol=1e-3)
    assert stats["skipped_items"] == [
        {"item": "/old/pool/3.jpg", "reason": "the image has an embedding already"}
    ]


def test_clip_retrievals_folder_over_the_tars_of_img2dataset(
    tmp_path: Path, import_embeddings: Callable
) -> None:
    root = tmp_path / "tars"
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for number in range(2):
                buffer = io.BytesIO()
                Image.new("RGB", (30 + number, 40), (shard * 99, number * 99, 0)).save(
                    buffer, "JPEG"
                )
                for name, data in {"jpg": buffer.getvalue(), "json": b"{}", "txt": b"x"}.items():
                    info = tarfile.TarInfo(f"{shard:05d}{number:04d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    names = ["000000000", "000000001", None, "000010001", "000010000"]
    vectors = np.random.default_rng(0).normal(size=(5, C)).astype(np.float32)
    columns = {"image_path": names, "caption": [""] * 5, "url": ["http://x"] * 5, "key": names}
    folder = write_clip_retrieval(tmp_path / "theirs", [(vectors, columns)], ["0"])
    source = SourceParams(format="webdataset", root=root)
    rows, stats = import_embeddings(folder, "clip-retrieval", source=source)
    members = ["000000000.jpg", "000000001.jpg", "000010000.jpg", "000010001.jpg"]
    assert [row["member"] for row in rows] == members
    assert [row["width"] for row in rows] == [30, 31, 30, 31]
    assert all(row["offset"] for row in rows)
    expected = vectors[[0, 1, 4, 3]]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose([vector_of(row) for row in rows], expected, atol=1e-3)
    assert stats["skipped_items"] == [{"item": "row 2", "reason": "no image_path"}]


def _remove_metadata(folder: Path) -> None:
    (folder / "metadata" / "metadata_1.parquet").unlink()


def _remove_row(folder: Path) -> None:
    pq.write_table(pa.table({"image_path": ["0.jpg"]}), folder / "metadata" / "metadata_1.parquet")


def _remove_column(folder: Path) -> None:
    pq.write_table(pa.table({"url": ["a", "b"]}), folder / "metadata" / "metadata_1.parquet")


def _pickled_objects(folder: Path) -> None:
    objects = np.array([[_Shell("false")] * C] * 2, dtype=object)
    np.save(folder / "img_emb" / "img_emb_1.npy", objects, allow_pickle=True)


def _bare_pickle(folder: Path) -> None:
    write_pickle(folder / "img_emb" / "img_emb_1.npy", _Shell("false"))


def _cut_off(folder: Path) -> None:
    path = folder / "img_emb" / "img_emb_1.npy"
    path.write_bytes(path.read_bytes()[:-8])


def _other_length(folder: Path) -> None:
    np.save(folder / "img_emb" / "img_emb_1.npy", np.ones((2, 4), np.float16))


def _integers(folder: Path) -> None:
    np.save(folder / "img_emb" / "img_emb_1.npy", np.ones((2, C), int))


def _no_parts(folder: Path) -> None:
    for path in (folder / "img_emb").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_remove_metadata, r"metadata_1\.parquet: no such file"),
        (_remove_row, r"metadata_1\.parquet: 1 rows, but .*img_emb_1\.npy has 2"),
        (_remove_column, r"no column 'image_path'; its columns are url"),
        (_pickled_objects, r"img_emb_1\.npy: not a plain NumPy array"),
        (_bare_pickle, r"img_emb_1\.npy: not a plain NumPy array"),
        (_cut_off, r"img_emb_1\.npy: not a plain NumPy array"),
        (_other_length, r"img_emb_1\.npy: embeddings of length 4, but .* has 16"),
        (_integers, r"expected an array \(N, C\) of floating point, found int64 \(2, 16\)"),
        (_no_parts, r"theirs: no img_emb/img_emb_0\.npy"),
    ],
)
def test_a_damaged_folder_of_clip_retrieval_is_refused(
    tmp_path: Path, import_embeddings: Callable, damage: Callable[[Path], None], reason: str
) -> None:
    parts = [(np.ones((2, C), np.float16), {"image_path": ["0.jpg", "1.jpg"]})] * 2
    folder = write_clip_retrieval(tmp_path / "theirs", parts, ["0", "1"])
    damage(folder)
    with pytest.raises(PipelineError, match=reason):
        import_embeddings(folder, "clip-retrieval")


# Archives


def test_published_archives_become_a_table_in_the_order_of_the_params(
    pool: SourceParams, import_archives: Callable
) -> None:
    theirs = "/home/author/datasets/pool"
    rows, stats = import_archives(
        {
            "dog": [f"{theirs}/5.jpg", f"{theirs}/gone.jpg", f"{theirs}/2.jpg"],
            "cat": [f"{theirs}/7.jpg", f"{theirs}/0.jpg"],
        },
        prefixes=[f"{theirs}={pool.root}"],
    )
    assert places(rows) == [
        ("cat", 1, "7.jpg"),
        ("cat", 2, "0.jpg"),
        ("dog", 1, "5.jpg"),
        ("dog", 3, "2.jpg"),
    ]
    assert [row.label_id for row in rows] == [1, 1, 2, 2]
    first = rows[0]
    assert first.key == sample_key("pool", "7.jpg")
    assert (first.source, first.path) == ("pool", str(pool.root / "7.jpg"))
    assert (first.member, first.offset) == (None, None)
    assert (first.width, first.height) == (27, 23)
    assert all(np.isnan(row.similarity) for row in rows)
    assert (stats["items"], stats["skipped"]) == (4, 1)
    assert stats["skipped_items"] == [{"item": f"{theirs}/gone.jpg", "reason": "no such image"}]


def test_the_size_is_that_of_the_upright_image(
    pool: SourceParams, import_archives: Callable
) -> None:
    image = Image.new("RGB", (60, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(pool.root / "turned.jpg", exif=exif)
    rows, _ = import_archives({"cat": ["turned.jpg"], "dog": []})
    assert (rows[0].width, rows[0].height) == (20, 60)


def test_only_the_first_k_are_taken_and_duplicates_once(
    pool: SourceParams, import_archives: Callable
) -> None:
    names = [f"{pool.root}/{name}" for name in ("1.jpg", "./1.jpg", "2.jpg", "3.jpg")]
    rows, stats = import_archives({"cat": names, "dog": ["3.jpg"]}, k=3)
    assert places(rows) == [("cat", 1, "1.jpg"), ("cat", 3, "2.jpg"), ("dog", 1, "3.jpg")]
    assert stats["counts"]["duplicates"] == 1


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        (
            "all",
            [("cat", 1, "0.jpg"), ("cat", 2, "1.jpg"), ("dog", 1, "1.jpg"), ("dog", 2, "0.jpg")],
        ),
        ("last", [("dog", 1, "1.jpg"), ("dog", 2, "0.jpg")]),
        ("best", [("cat", 1, "0.jpg"), ("dog", 1, "1.jpg")]),
    ],
)
def test_images_of_several_categories_go_by_the_policy(
    import_archives: Callable, overlap: str, expected: list[tuple[str, int, str]]
) -> None:
    content = {"cat": ["0.jpg", "1.jpg"], "dog": ["1.jpg", "0.jpg"]}
    rows, stats = import_archives(content, overlap=overlap)
    assert places(rows) == expected
    assert stats["counts"]["dropped"] == 4 - len(expected)
    assert stats["counts"]["empty_archives"] == (overlap == "last")


def test_several_sources_and_the_longest_prefix(
    pool: SourceParams, make_image_folder: Callable[..., Path], import_archives: Callable
) -> None:
    other = SourceParams(root=make_image_folder("other/images"))
    rows, _ = import_archives(
        {"cat": ["/data/pool/1.jpg"], "dog": ["/data/pass/images/1.jpg"]},
        sources={"pool": pool, "other": other},
        prefixes=["/data=/nowhere", f"/data/pool={pool.root}", f"/data/pass={other.root.parent}"],
    )
    assert [(row.category, row.source) for row in rows] == [("cat", "pool"), ("dog", "other")]


def test_nothing_outside_the_sources_is_opened(
    tmp_path: Path, pool: SourceParams, import_archives: Callable
) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    hostile = [
        "../secret.png",
        f"{pool.root}/../secret.png",
        f"{tmp_path}/secret.png",
        "/old/../secret.png",
        "/etc/passwd",
        f"{pool.root}",
        "",
        "nul\0.jpg",
        "\ud800.jpg",
    ]
    rows, stats = import_archives(
        {"cat": ["0.jpg", *hostile], "dog": []}, prefixes=[f"/old={pool.root}"]
    )
    assert places(rows) == [("cat", 1, "0.jpg")]
    assert stats["skipped"] == len(hostile)
    assert {item["reason"] for item in stats["skipped_items"]} == {"no such image"}


def test_damaged_and_large_images_are_skipped_with_their_reason(
    pool: SourceParams, import_archives: Callable
) -> None:
    (pool.root / "1.jpg").write_bytes(b"")
    (pool.root / "2.jpg").write_bytes(b"plain text")
    Image.new("RGB", (200, 100)).save(pool.root / "3.jpg")
    rows, stats = import_archives({"cat": [f"{n}.jpg" for n in range(4)], "dog": []})
    assert places(rows) == [("cat", 1, "0.jpg")]
    reasons = {Path(item["item"]).name: item["reason"] for item in stats["skipped_items"]}
    assert reasons == {
        "1.jpg": "empty file",
        "2.jpg": "not an image",
        "3.jpg": "too large: 200x100",
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"cat": [], "dog": []}, "all lists are empty"),
        (
            {"cat": ["0.jpg"], "cow": [], "sheep": []},
            r"lacks 'dog'; the params lack 'cow', 'sheep'",
        ),
        ({"dog": ["0.jpg"], "cat": [], "background": []}, "the params lack 'background'"),
        ({"dog": ["0.jpg"]}, "the file lacks 'cat'"),
        (["0.jpg"], "expected an object of category -> list of paths, found list"),
        ({"cat": "0.jpg", "dog": []}, "'cat': expected a list of image paths"),
        ({"cat": ["0.jpg", 3], "dog": []}, "'cat': expected a list of image paths"),
        ({"cat": ["/x/0.jpg"], "dog": []}, r"none of its 1 images .* /x/0\.jpg: no such image"),
    ],
)
def test_archives_that_do_not_fit_are_refused(
    tmp_path: Path, import_archives: Callable, content: Any, reason: str
) -> None:
    with pytest.raises(PipelineError, match=rf"category_to_p_images\.json: .*{reason}"):
        import_archives(content)
    assert not (tmp_path / "archives.parquet").exists()


@pytest.mark.parametrize("prefix", ["/data", "=/data", ""])
def test_a_prefix_without_both_parts_is_refused(prefix: str) -> None:
    with pytest.raises(PipelineError, match="expected OLD=NEW"):
        parse_prefixes([prefix])


def test_a_prefix_given_twice_is_refused() -> None:
    with pytest.raises(PipelineError, match="'/data' is given twice"):
        parse_prefixes(["/data=a", "/data/=b"])


def test_sources_of_parquet_files_are_refused(
    pool: SourceParams, import_archives: Callable
) -> None:
    source = SourceParams(format="parquet", root=pool.root)
    with pytest.raises(PipelineError, match=r"index\.pool\.format: .* no names"):
        import_archives({"cat": ["0.jpg"], "dog": []}, sources={"pool": source})


def test_imported_archives_are_masked(
    tmp_path: Path, encoder: EncoderParams, runtime: Runtime, import_archives: Callable
) -> None:
    import_archives({"cat": ["3.jpg", "1.jpg"], "dog": ["0.jpg"]})
    mask.run(
        archives_path=tmp_path / "archives.parquet",
        out_dir=tmp_path / "masks",
        params=SpectralParams(source="spectral", encoder=encoder, clusters=[2], refine=False),
        runtime=runtime,
        stats_path=tmp_path / "mask.json",
    )
    samples = list(read_shards(tmp_path / "masks"))
    origins = [json.loads(sample["json"]) for sample in samples]
    assert [(origin["category"], origin["rank"]) for origin in origins] == [
        ("cat", 1),
        ("cat", 2),
        ("dog", 1),
    ]
    assert json.loads((tmp_path / "mask.json").read_text())["skipped"] == 0


# The commands


def test_the_commands_write_where_the_stages_do(
    tmp_path: Path, pool: SourceParams, encoder: EncoderParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {
        "categories": CATEGORIES,
        "index": {"pool": {"root": str(pool.root)}},
        "embed": {"encoder": encoder.model_dump(), "workers": 1},
        "k": 1,
        "retrieve": {"overlap": "all"},
    }
    Path("params.yaml").write_text(json.dumps(settings))
    Path("published.json").write_text(json.dumps({"dog": ["/a/1.jpg", "/b/2.jpg"], "cat": []}))
    write_pickle(Path("emb.pkl"), random_tensors(["0.jpg"]))
    parts = [(np.ones((1, C), np.float16), {"image_path": ["1.jpg"]})]
    write_clip_retrieval(Path("theirs"), parts, ["0"])

    def run(*words: str) -> None:
        result = CliRunner().invoke(app, ["import", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    prefixes = ["--prefix", f"/a={pool.root}", "--prefix", f"/b={pool.root}"]
    run("archives", "--from", "published.json", *prefixes)
    assert places(read_archives(Path("data/archives.parquet"))) == [("dog", 1, "1.jpg")]
    assert Path("reports/stats/retrieve.json").is_file()

    made_by = ["--source", "pool", "--encoder", encoder_name(encoder.model, encoder.pretrained)]
    shard = Path("data/embeddings/pool/00000.parquet")
    run("embeddings", "--from", "emb.pkl", *made_by)
    assert pq.read_table(shard)["path"].to_pylist() == [str(pool.root / "0.jpg")]
    run("clip-retrieval", "--from", "theirs", *made_by)
    assert pq.read_table(shard)["path"].to_pylist() == [str(pool.root / "1.jpg")]
    assert Path("reports/stats/embed-pool.json").is_file()
