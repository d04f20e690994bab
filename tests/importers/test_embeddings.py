"""Imports of published embeddings: what comes out, what the next stages make of it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.formats.shards import MANIFEST
from pipeline.formats.tables import encoder_name, read_archives, shard_encoder
from pipeline.models.clip import load_clip
from pipeline.params.base import EncoderParams, TaggedFile
from pipeline.params.sections import EmbedParams, RetrieveParams
from pipeline.params.sources import SourceParams
from pipeline.stages import embed, retrieve
from tests.importers.helpers import (
    CATEGORIES,
    C,
    Shell,
    random_tensors,
    vector_of,
    write_clip_retrieval,
    write_pickle,
)


def clip_embeddings(encoder: EncoderParams, paths: list[Path]) -> torch.Tensor:
    """Unit embeddings (N, C) float32, each computed as the published code does it."""
    clip = load_clip(encoder, torch.device("cpu"))
    images = torch.stack([clip.preprocess(Image.open(path)) for path in paths])
    with torch.no_grad():
        features = clip.encode_images(images)
    return features / features.norm(dim=1, keepdim=True)


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


def test_another_encoder_is_refused_before_anything_is_read(
    tmp_path: Path, import_embeddings: Callable
) -> None:
    with pytest.raises(PipelineError, match=r"'ViT-L-14/openai' is not '.*tiny\.safetensors'"):
        import_embeddings(tmp_path / "gone.pkl", encoder="ViT-L-14/openai")


def test_clip_retrievals_model_string_names_the_same_encoder(
    tmp_path: Path, params: EmbedParams, import_embeddings: Callable
) -> None:
    path = write_pickle(tmp_path / "emb.pkl", random_tensors(["0.jpg"], dim=512))
    text = "open_clip:ViT-B-32/laion2b_s34b_b79k"
    for encoder in (
        EncoderParams(model="ViT-B-32", pretrained="laion2b_s34b_b79k"),
        EncoderParams(model=text, pretrained=""),
    ):
        changed = params.model_copy(update={"encoder": encoder})
        import_embeddings(path, encoder=text, params=changed)
        shard = tmp_path / "embeddings" / "pool" / "00000.parquet"
        assert shard_encoder(shard)[0] == encoder_name(encoder.model, encoder.pretrained)


@pytest.mark.parametrize("form", ["pickle", "clip-retrieval"])
def test_embeddings_of_another_length_are_refused(
    tmp_path: Path, params: EmbedParams, import_embeddings: Callable, form: str
) -> None:
    path = tmp_path / "theirs"
    if form == "pickle":
        write_pickle(path, random_tensors(["0.jpg"], dim=12))
    else:
        write_clip_retrieval(path, [(np.ones((1, 12), np.float16), {"image_path": ["0.jpg"]})], "0")
    message = (
        r"theirs: embeddings of length 12, but .*tiny\.safetensors, embed\.encoder .* makes 16"
    )
    with pytest.raises(PipelineError, match=message):
        import_embeddings(path, form)
    named = EncoderParams(model="open_clip:ViT-B-32/openai", pretrained="")
    changed = params.model_copy(update={"encoder": named})
    with pytest.raises(PipelineError, match="makes 512"):
        import_embeddings(path, form, params=changed, encoder=named.model)


@pytest.mark.parametrize("names", [[], [None, None]])
def test_a_folder_that_names_no_image_is_refused(
    tmp_path: Path, import_embeddings: Callable, names: list[None]
) -> None:
    columns = {"image_path": pa.array(names, pa.string())}
    part = (np.ones((len(names), C), np.float16), columns)
    folder = write_clip_retrieval(tmp_path / "theirs", [part], ["0"])
    with pytest.raises(PipelineError, match="theirs: none of its embeddings names an image"):
        import_embeddings(folder, "clip-retrieval")


def test_a_folder_of_something_else_is_not_replaced(
    tmp_path: Path, pool: SourceParams, import_embeddings: Callable
) -> None:
    path = write_pickle(tmp_path / "emb.pkl", random_tensors(["0.jpg"]))
    import_embeddings(path)
    for out_dir, other in ((tmp_path / "embeddings", "pool"), (pool.root, "0.jpg")):
        before = sorted(out_dir.rglob("*"))
        with pytest.raises(PipelineError, match=f"{out_dir}: .* other things too, such as {other}"):
            import_embeddings(path, out_dir=out_dir)
        assert sorted(out_dir.rglob("*")) == before
    import_embeddings(path)


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
    objects = np.array([[Shell("false")] * C] * 2, dtype=object)
    np.save(folder / "img_emb" / "img_emb_1.npy", objects, allow_pickle=True)


def _bare_pickle(folder: Path) -> None:
    write_pickle(folder / "img_emb" / "img_emb_1.npy", Shell("false"))


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


@pytest.mark.parametrize("text", ["ViT-B-32/openai", "open_clip:ViT-B-32/openai"])
@pytest.mark.parametrize("model", ["ViT-B-32", "open_clip:ViT-B-32/openai"])
def test_the_file_of_a_tag_is_the_encoder_that_the_tag_names(
    tmp_path: Path, import_embeddings: Callable, params: EmbedParams, text: str, model: str
) -> None:
    tagged = TaggedFile(tag="openai", file="ViT-B-32.pt")
    encoder = EncoderParams(model=model, pretrained=tagged)
    pickled = write_pickle(tmp_path / "emb.pkl", random_tensors(["0.jpg"], dim=512))
    changed = params.model_copy(update={"encoder": encoder})
    rows, _ = import_embeddings(pickled, encoder=text, params=changed)
    assert rows[0]["status"] == "ok"
    with pytest.raises(PipelineError, match="is not"):
        import_embeddings(pickled, encoder="ViT-B-32/laion2b_e16", params=changed)
