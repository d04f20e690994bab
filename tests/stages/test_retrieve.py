"""The retrieve stage against an exact numpy top-k, ties, overlaps, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.engine.progress import Tally
from pipeline.engine.runtime import Runtime
from pipeline.engine.shard_run import LocalExecutor, Task
from pipeline.errors import PipelineError
from pipeline.formats.review import Decision, Reviewed, write_review
from pipeline.formats.tables import (
    ArchiveRow,
    embedding_bytes,
    embedding_schema,
    encoder_name,
    read_archives,
    write_table,
)
from pipeline.models.clip import load_clip, text_embeddings
from pipeline.params.base import EncoderParams
from pipeline.params.sections import RetrieveParams
from pipeline.retrieval.ranking import Ranking, settle_overlaps
from pipeline.stages import retrieve
from pipeline.vocabulary.prompts import templates

CATEGORIES = ["cat", "dog", "potted plant"]
BACKGROUND = ["background", "house"]


@pytest.fixture
def texts(encoder: EncoderParams) -> np.ndarray:
    """(K, C) text embeddings of CATEGORIES."""
    clip = load_clip(encoder, torch.device("cpu"))
    return text_embeddings(clip, CATEGORIES, templates("name")).numpy()


@pytest.fixture
def write_shards(tmp_path: Path, encoder: EncoderParams) -> Callable[..., None]:
    """Function that writes one shard: embeddings (N, C), or None for a skipped image, and keys."""

    def write(name: str, embeddings: list[Any], keys: list[str], encoder_id: str = "") -> None:
        rows = [
            {
                "key": key,
                "source": name.split("/")[0],
                "path": f"data/{key}.jpg",
                "member": None if number % 2 else f"{key}.jpg",
                "offset": None if number % 2 else 512 * number,
                "width": None if embedding is None else 10 + number,
                "height": None if embedding is None else 20,
                "bytes": 7,
                "sha256": None if embedding is None else f"{number:064d}",
                "status": "skipped" if embedding is None else "ok",
                "embedding": None if embedding is None else embedding_bytes(np.asarray(embedding)),
            }
            for number, (key, embedding) in enumerate(zip(keys, embeddings, strict=True))
        ]
        known = encoder_id or encoder_name(encoder.model, encoder.pretrained)
        table = pa.Table.from_pylist(rows, schema=embedding_schema(16, known))
        write_table(tmp_path / "embeddings" / f"{name}.parquet", table)

    return write


class ShardByShard(LocalExecutor):
    """Searches every shard by itself, the last one first, so that lists have to be merged."""

    def run(self, tasks: Sequence[Task], **options: Any) -> Iterator[tuple[Task, int, Tally]]:
        return super().run(tasks[::-1], **options)

    def task_size(self, count: int) -> int:
        del count
        return 1


@pytest.fixture(params=[LocalExecutor(), ShardByShard()], ids=["at once", "merged"])
def run(
    tmp_path: Path, runtime: Runtime, encoder: EncoderParams, request: pytest.FixtureRequest
) -> Callable[..., tuple[list[ArchiveRow], dict[str, Any]]]:
    """Function that runs the stage and returns the archives and the stats."""

    def run_retrieve(
        k: int,
        categories: list[str] = CATEGORIES,
        review_path: Path | None = None,
        **params: Any,
    ) -> tuple[list[ArchiveRow], dict[str, Any]]:
        retrieve.run(
            embeddings_dir=tmp_path / "embeddings",
            sources=sorted(
                {path.parent.name for path in tmp_path.glob("embeddings/*/*")} - {"old"}
            ),
            out_path=tmp_path / "archives.parquet",
            categories=categories,
            background=BACKGROUND,
            k=k,
            params=RetrieveParams(**{"templates": "name", "overlap": "all", **params}),
            encoder=encoder,
            runtime=runtime,
            stats_path=tmp_path / "stats.json",
            review_path=review_path,
            executor=request.param,
        )
        stats = json.loads((tmp_path / "stats.json").read_text())
        return read_archives(tmp_path / "archives.parquet"), stats

    return run_retrieve


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def random_index(rng: np.random.Generator, count: int) -> tuple[np.ndarray, list[str]]:
    """Unit embeddings (N, 16) as stored, and keys that do not come in order."""
    embeddings = unit(rng.normal(size=(count, 16))).astype(np.float16)
    return embeddings, [f"{number:020x}" for number in rng.permutation(count)]


def numpy_top_k(
    embeddings: np.ndarray, keys: list[str], texts: np.ndarray, k: int
) -> list[list[str]]:
    similarities = (embeddings.astype(np.float64) @ texts.T.astype(np.float64)).astype(np.float32)
    return [
        [keys[row] for row in sorted(range(len(keys)), key=lambda r: (-column[r], keys[r]))[:k]]
        for column in similarities.T
    ]


def keys_by_category(rows: list[ArchiveRow]) -> list[list[str]]:
    return [[row.key for row in rows if row.label_id == n] for n in (1, 2, 3)]


@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize("block_rows", [1, 64, 65_536])
def test_exact_top_k_whatever_the_blocks(
    run: Callable,
    write_shards: Callable,
    texts: np.ndarray,
    rng: np.random.Generator,
    k: int,
    block_rows: int,
) -> None:
    embeddings, keys = random_index(rng, 300)
    for shard, start in enumerate((0, 100, 200)):
        part = slice(start, start + 100)
        write_shards(f"s{shard % 2}/{shard:05d}", list(embeddings[part]), keys[part])
    rows, stats = run(k, block_rows=block_rows)
    assert keys_by_category(rows) == numpy_top_k(embeddings, keys, texts, k)
    assert [row.rank for row in rows] == [*range(1, k + 1)] * 3
    assert [row.category for row in rows] == [name for name in CATEGORIES for _ in range(k)]
    assert (stats["items"], stats["skipped"]) == (300, 0)
    by_key = dict(zip(keys, embeddings, strict=True))
    for row in rows:
        expected = by_key[row.key].astype(np.float64) @ texts[row.label_id - 1]
        assert row.similarity == pytest.approx(expected, abs=1e-6)


def test_rows_carry_what_the_shards_know(
    run: Callable, write_shards: Callable, texts: np.ndarray
) -> None:
    write_shards("a/00000", [None, texts[0]], ["00", "01"])
    write_shards("b/00000", [texts[1], None, texts[2]], ["02", "03", "04"])
    rows, stats = run(1)
    assert stats["items"] == 3
    found = [
        (row.category, row.key, row.source, row.path, row.member, row.offset, row.width, row.sha256)
        for row in rows
    ]
    assert found == [
        ("cat", "01", "a", "data/01.jpg", None, None, 11, f"{1:064d}"),
        ("dog", "02", "b", "data/02.jpg", "02.jpg", 0, 10, f"{0:064d}"),
        ("potted plant", "04", "b", "data/04.jpg", "04.jpg", 1024, 12, f"{2:064d}"),
    ]


@pytest.mark.parametrize("block_rows", [1, 3, 50, 65_536])
def test_equal_similarities_are_ranked_by_key_across_shards(
    run: Callable, write_shards: Callable, texts: np.ndarray, block_rows: int
) -> None:
    """200 copies of one image, keys descending, then a few better and worse ones."""
    better, copy, worse = (unit(texts[0] + scale * np.eye(16)[3]) for scale in (0.1, 0.5, 0.9))
    order = [f"{number:020x}" for number in reversed(range(200))]
    write_shards("a/00000", [copy] * 90 + [better], [*order[:90], "better"])
    write_shards("a/00001", [worse, *[copy] * 110], ["worse", *order[90:]])
    rows, _ = run(4, categories=["cat"], block_rows=block_rows)
    assert [row.key for row in rows] == ["better", *sorted(order)[:3]]
    assert len({row.similarity for row in rows[1:]}) == 1


def test_same_bytes_each_time(
    run: Callable, write_shards: Callable, rng: np.random.Generator, tmp_path: Path
) -> None:
    embeddings, keys = random_index(rng, 50)
    write_shards("a/00000", list(embeddings), keys)
    outputs = []
    for block_rows in (7, 50):
        run(10, block_rows=block_rows, overlap="best", num_negatives=5)
        outputs.append((tmp_path / "archives.parquet").read_bytes())
    assert outputs[0] == outputs[1]


def test_embeddings_without_direction_are_skipped_and_listed(
    run: Callable, write_shards: Callable, texts: np.ndarray
) -> None:
    nan = np.full(16, np.nan)
    infinite = np.where(np.arange(16) == 2, np.inf, texts[0])
    write_shards(
        "a/00000",
        [nan, texts[0], np.zeros(16), None, infinite, texts[1]],
        ["nan", "one", "zero", "unread", "inf", "two"],
    )
    rows, stats = run(2)
    assert {row.key for row in rows} == {"one", "two"}
    assert (stats["items"], stats["skipped"]) == (2, 3)
    assert sorted((skip["item"], skip["reason"]) for skip in stats["skipped_items"]) == [
        ("inf", "embedding is not finite"),
        ("nan", "embedding is not finite"),
        ("zero", "embedding is zero"),
    ]
    with pytest.raises(PipelineError, match=r"k: 3 is larger than the 2 embedded images"):
        run(3)


def test_skipped_images_are_listed_in_the_order_of_the_shards(
    run: Callable, write_shards: Callable, texts: np.ndarray
) -> None:
    for shard in range(3):
        write_shards(f"a/{shard:05d}", [np.zeros(16), texts[0]], [f"zero{shard}", f"one{shard}"])
    _, stats = run(2)
    assert [skip["item"] for skip in stats["skipped_items"]] == ["zero0", "zero1", "zero2"]
    assert (stats["items"], stats["skipped"]) == (3, 3)


@pytest.mark.parametrize("block_rows", [1, 2, 65_536])
def test_one_image(
    run: Callable, write_shards: Callable, texts: np.ndarray, block_rows: int
) -> None:
    write_shards("a/00000", [None, None, texts[0], None], ["0", "1", "2", "3"])
    rows, stats = run(1, block_rows=block_rows)
    assert [row.key for row in rows] == ["2", "2", "2"]
    assert (stats["items"], stats["skipped"]) == (1, 0)


@pytest.mark.parametrize("block_rows", [1, 3, 65_536])
def test_many_ties_across_shards_go_by_key(
    run: Callable,
    write_shards: Callable,
    texts: np.ndarray,
    rng: np.random.Generator,
    block_rows: int,
) -> None:
    """Forty copies of one image, one better image, and a shard without any embedded row."""
    keys = [f"{number:02d}" for number in rng.permutation(41)]
    embeddings = [texts[1]] * 41
    embeddings[keys.index("40")] = texts[0]
    write_shards("a/00000", embeddings[:20], keys[:20])
    write_shards("a/00001", [None] * 5, [f"x{number}" for number in range(5)])
    write_shards("b/00000", embeddings[20:], keys[20:])
    rows, _ = run(6, categories=["cat"], block_rows=block_rows)
    assert [row.key for row in rows] == ["40", "00", "01", "02", "03", "04"]


def test_same_bytes_whatever_blocks_row_groups_and_form_of_the_embeddings(
    run: Callable, write_shards: Callable, rng: np.random.Generator, tmp_path: Path
) -> None:
    embeddings, keys = random_index(rng, 100)
    embeddings[50:60] = embeddings[0]
    write_shards("a/00000", list(embeddings), keys)
    run(20, num_negatives=9)
    expected = (tmp_path / "archives.parquet").read_bytes()
    shard = tmp_path / "embeddings/a/00000.parquet"
    table = pq.read_table(shard)
    lists = pa.array(list(embeddings), pa.list_(pa.float16(), 16))
    place = table.schema.names.index("embedding")
    of_lists = table.set_column(place, "embedding", lists)
    for form, row_group_size, block_rows in ((table, 7, 64), (of_lists, 1, 3), (of_lists, 64, 10)):
        pq.write_table(form, shard, row_group_size=row_group_size)
        run(20, num_negatives=9, block_rows=block_rows)
        assert (tmp_path / "archives.parquet").read_bytes() == expected


def clustered_index(rng: np.random.Generator, texts: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """2,000 unit embeddings (N, 16) around 20 centres, three of them the texts; and keys."""
    centres = np.concatenate([texts, unit(rng.normal(size=(17, 16)))])
    embeddings = unit(centres[rng.integers(0, 20, 2000)] + 0.05 * rng.normal(size=(2000, 16)))
    return embeddings.astype(np.float16), [f"{number:04d}" for number in rng.permutation(2000)]


def test_ivf_finds_what_exact_search_finds(
    run: Callable, write_shards: Callable, texts: np.ndarray, rng: np.random.Generator
) -> None:
    embeddings, keys = clustered_index(rng, texts)
    rows = [*embeddings, None, np.zeros(16), np.full(16, np.nan)]
    write_shards("a/00000", rows[:900], keys[:900])
    write_shards("b/00000", rows[900:], [*keys[900:], "unread", "zero", "nan"])
    exact, exact_stats = run(30, overlap="best")
    approximate, stats = run(30, overlap="best", search="ivf", probes=12)
    assert approximate == exact
    assert stats["skipped_items"] == exact_stats["skipped_items"] != []
    assert stats["items"] == 2000
    counts = dict(stats["counts"])
    assert 12 < counts.pop("ivf_lists") < 100
    assert counts == exact_stats["counts"] | {
        "ivf_built": 1,
        "ivf_probes": 12,
        "recall_found": 90,
        "recall_wanted": 90,
    }


def test_ivf_reports_a_recall_that_is_not_full(
    run: Callable, write_shards: Callable, rng: np.random.Generator
) -> None:
    """Without clusters, one list of many holds a part of the nearest images only."""
    embeddings, keys = random_index(rng, 2000)
    write_shards("a/00000", list(embeddings), keys)
    exact, _ = run(20)
    approximate, stats = run(20, search="ivf", probes=1)
    found = {(row.label_id, row.key) for row in exact} & {
        (row.label_id, row.key) for row in approximate
    }
    assert stats["counts"]["recall_found"] == len(found) < stats["counts"]["recall_wanted"] == 60
    assert len(approximate) == 60


def test_an_index_serves_other_categories_until_a_shard_changes(
    run: Callable, write_shards: Callable, texts: np.ndarray, rng: np.random.Generator
) -> None:
    embeddings, keys = clustered_index(rng, texts)
    write_shards("a/00000", list(embeddings), keys)
    assert run(9, search="ivf")[1]["counts"]["ivf_built"] == 1
    rows, stats = run(9, categories=["dog"], search="ivf")
    assert stats["counts"]["ivf_built"] == 0
    assert rows == run(9, categories=["dog"])[0]
    write_shards("a/00000", [*embeddings, texts[1]], [*keys, "new"])
    rows, stats = run(9, categories=["dog"], search="ivf")
    assert stats["counts"]["ivf_built"] == 1
    assert rows[0].key == "new"


def test_ivf_of_fewer_images_than_it_would_look_at(
    run: Callable, write_shards: Callable, texts: np.ndarray
) -> None:
    write_shards("a/00000", [texts[0], np.zeros(16), texts[1]], ["0", "1", "2"])
    rows, _ = run(2, search="ivf")
    assert rows == run(2)[0]
    with pytest.raises(PipelineError, match="k: 3 is larger than the 2 embedded images"):
        run(3, search="ivf")


def test_ivf_of_embeddings_without_direction(run: Callable, write_shards: Callable) -> None:
    write_shards("a/00000", [np.zeros(16), np.full(16, np.nan)], ["0", "1"])
    with pytest.raises(PipelineError, match="every embedding is zero or not finite"):
        run(1, search="ivf")


def test_a_damaged_index_is_an_error_that_names_it(
    run: Callable, write_shards: Callable, texts: np.ndarray, runtime: Runtime
) -> None:
    write_shards("a/00000", list(texts), ["0", "1", "2"])
    run(1, search="ivf")
    (path,) = runtime.cache_dir.glob("retrieve/*/index.faiss")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PipelineError, match=r"index\.faiss: not a readable index: .*built again"):
        run(1, search="ivf")


def test_negatives_need_exact_search(
    run: Callable, write_shards: Callable, texts: np.ndarray
) -> None:
    write_shards("a/00000", list(texts), ["0", "1", "2"])
    with pytest.raises(PipelineError, match=r"retrieve\.num_negatives: 2.*retrieve\.search: exact"):
        run(1, search="ivf", num_negatives=2)


def test_k_larger_than_the_index(
    run: Callable, write_shards: Callable, texts: np.ndarray, tmp_path: Path
) -> None:
    write_shards("a/00000", [texts[0], None, texts[1]], ["0", "1", "2"])
    with pytest.raises(PipelineError, match=r"k: 500 is larger than the 2 .*lower k to 2"):
        run(500)
    assert not (tmp_path / "archives.parquet").exists()
    assert not (tmp_path / "stats.json").exists()
    assert len(run(2)[0]) == 6


def test_embeddings_of_another_encoder(
    run: Callable, write_shards: Callable, texts: np.ndarray
) -> None:
    write_shards("a/00000", [texts[0]], ["0"], encoder_id="ViT-L-14-336-quickgelu/openai")
    with pytest.raises(PipelineError, match=r"embedded by ViT-L-14-336-quickgelu/openai, but"):
        run(1)


def test_no_embeddings(run: Callable) -> None:
    with pytest.raises(PipelineError, match="no source is named"):
        run(1)


def make_lists() -> list[Ranking]:
    """Image 7 is wanted by all three, best by the second; 8 by the first two alike; 9 by one."""
    lists = [([0.75, 0.5], [8, 7]), ([0.875, 0.75], [7, 8]), ([0.625, 0.25], [7, 9])]
    return [
        Ranking(np.array([1, 2]), np.array(similarities, np.float32), np.array(positions))
        for similarities, positions in lists
    ]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("all", [[(1, 8), (2, 7)], [(1, 7), (2, 8)], [(1, 7), (2, 9)]]),
        ("best", [[(1, 8)], [(1, 7)], [(2, 9)]]),
        ("last", [[], [(2, 8)], [(1, 7), (2, 9)]]),
    ],
)
def test_overlap_policies(policy: str, expected: list[list[tuple[int, int]]]) -> None:
    archives = settle_overlaps(make_lists(), policy)
    found = [
        list(zip(part.ranks.tolist(), part.positions.tolist(), strict=True)) for part in archives
    ]
    assert found == expected


@pytest.mark.parametrize(
    ("policy", "kept", "dropped", "empty"),
    [
        # Three images equal to the text embeddings, k = 3: every category wants every image.
        ("all", [3, 3, 3], 0, 0),
        ("best", [1, 1, 1], 6, 0),
        ("last", [0, 0, 3], 6, 2),
    ],
)
def test_overlaps_are_settled_and_counted(
    run: Callable,
    write_shards: Callable,
    texts: np.ndarray,
    capsys: pytest.CaptureFixture[str],
    policy: str,
    kept: list[int],
    dropped: int,
    empty: int,
) -> None:
    write_shards("a/00000", list(texts), ["0", "1", "2"])
    rows, stats = run(3, overlap=policy)
    assert [sum(row.label_id == n for row in rows) for n in (1, 2, 3)] == kept
    assert stats["counts"] == {
        "overlaps": 3,
        "dropped": dropped,
        "empty_archives": empty,
        "negatives": 0,
    }
    warnings = " ".join(stats["warnings"])
    assert ("no image is left for cat, dog: " in warnings) == bool(empty)
    summary = capsys.readouterr().out.splitlines()[-1]
    assert summary.startswith("retrieve: ")
    assert summary.endswith("; warning: " + "; warning: ".join(stats["warnings"]))
    if policy == "best":
        assert [(row.label_id, row.rank, row.key) for row in rows] == [
            (1, 1, "0"),
            (2, 1, "1"),
            (3, 1, "2"),
        ]


@pytest.mark.parametrize(("k", "share"), [(1, 1), (2, 2), (3, 2)])
def test_k_beyond_the_share_of_a_category_is_warned_of(
    run: Callable, write_shards: Callable, texts: np.ndarray, k: int, share: int
) -> None:
    write_shards("a/00000", [*texts, *-texts, texts[0]], [str(number) for number in range(7)])
    _, stats = run(k)
    expected = f"k: {k} images for each of 3 categories are more than the 7 of the index"
    warned = [text for text in stats.get("warnings", []) if text.startswith(expected)]
    assert len(warned) == (k > share)
    assert all(f"lower k to {share} or less" in text for text in warned)


def test_names_that_are_one_to_the_encoder_are_refused(
    run: Callable, write_shards: Callable, texts: np.ndarray
) -> None:
    write_shards("a/00000", list(texts), ["0", "1", "2"])
    for name in ("\uff43\uff41\uff54", "House"):
        with pytest.raises(PipelineError, match=r"^categories: .* are the same to the encoder"):
            run(1, categories=["cat", name])


def test_overlaps_do_not_count_an_image_of_one_category(
    run: Callable, write_shards: Callable, texts: np.ndarray
) -> None:
    write_shards("a/00000", list(texts), ["0", "1", "2"])
    assert run(1)[1]["counts"]["overlaps"] == 0


@pytest.mark.parametrize("block_rows", [1, 9, 65_536])
def test_negatives_are_the_images_of_no_archive_nearest_to_the_background(
    run: Callable,
    write_shards: Callable,
    encoder: EncoderParams,
    texts: np.ndarray,
    rng: np.random.Generator,
    block_rows: int,
) -> None:
    embeddings, keys = random_index(rng, 40)
    write_shards("a/00000", list(embeddings), keys)
    rows, stats = run(4, num_negatives=6, block_rows=block_rows)
    clip = load_clip(encoder, torch.device("cpu"))
    background = text_embeddings(clip, BACKGROUND, templates("name")).numpy()
    margins = (embeddings @ background.T).max(axis=1) - (embeddings @ texts.T).max(axis=1)
    archived = {row.key for row in rows if row.label_id}
    expected = [keys[row] for row in np.argsort(-margins) if keys[row] not in archived][:6]
    negatives = [row for row in rows if row.label_id == 0]
    assert [row.key for row in negatives] == expected
    assert [row.rank for row in negatives] == [1, 2, 3, 4, 5, 6]
    assert {row.category for row in negatives} == {"background"}
    assert negatives[0].similarity == pytest.approx(margins.max(), abs=1e-6)
    assert stats["counts"]["negatives"] == 6


def test_under_best_an_image_nearer_to_the_background_leaves_its_archive(
    run: Callable, write_shards: Callable, encoder: EncoderParams, texts: np.ndarray
) -> None:
    """With k as large as the index every image is in every list; the house is still a negative."""
    clip = load_clip(encoder, torch.device("cpu"))
    house = text_embeddings(clip, ["house"], templates("name")).numpy()[0]
    write_shards("a/00000", [texts[0], house, texts[1]], ["cat", "house", "dog"])
    rows, stats = run(3, categories=["cat", "dog"], overlap="best", num_negatives=2)
    assert {(row.label_id, row.key) for row in rows} == {(0, "house"), (1, "cat"), (2, "dog")}
    assert stats["counts"]["negatives"] == 1
    kept, _ = run(3, categories=["cat", "dog"], overlap="all", num_negatives=2)
    assert [row.key for row in kept if row.label_id == 0] == []


def test_negatives_end_where_the_archives_begin(
    run: Callable, write_shards: Callable, texts: np.ndarray
) -> None:
    """Of three images one is free, so there is one negative, however many were asked for."""
    write_shards("a/00000", [texts[0], texts[1], -texts[0]], ["0", "1", "2"])
    rows, stats = run(1, categories=["cat", "dog"], num_negatives=3)
    assert [(row.label_id, row.key) for row in rows] == [(0, "2"), (1, "0"), (2, "1")]
    assert stats["counts"]["negatives"] == 1


def test_templates_are_averaged(
    run: Callable, write_shards: Callable, encoder: EncoderParams
) -> None:
    clip = load_clip(encoder, torch.device("cpu"))
    averaged = text_embeddings(clip, ["cat"], templates("prompts85"))[0].numpy()
    write_shards("a/00000", [averaged], ["0"])
    rows, _ = run(1, categories=["cat"], templates="prompts85")
    assert rows[0].similarity == pytest.approx(1, abs=1e-3)


@pytest.fixture
def all_texts(encoder: EncoderParams) -> np.ndarray:
    """(M, C) float64 text embeddings of CATEGORIES, then BACKGROUND."""
    clip = load_clip(encoder, torch.device("cpu"))
    lists = [text_embeddings(clip, names, templates("name")) for names in (CATEGORIES, BACKGROUND)]
    return np.concatenate([texts.numpy() for texts in lists]).astype(np.float64)


def margin_of(embedding: np.ndarray, texts: np.ndarray, own: int) -> np.float32:
    """Similarity to name `own` less the greatest to another, by loops."""
    similarities = [
        np.float32(sum(float(a) * b for a, b in zip(embedding, text, strict=True)))
        for text in texts
    ]
    return similarities[own] - max(s for name, s in enumerate(similarities) if name != own)


def expected_lists(
    embeddings: np.ndarray,
    keys: list[str],
    texts: np.ndarray,
    k: int,
    *,
    min_margin: float = -2.0,
    min_distance: float = 0.0,
) -> list[list[str]]:
    """The filters, image by image, of the whole ranking of each category."""
    by_key = dict(zip(keys, embeddings.astype(np.float64), strict=True))
    lists = []
    for own, ranking in enumerate(
        numpy_top_k(embeddings, keys, texts[: len(CATEGORIES)].astype(np.float32), len(keys))
    ):
        kept: list[str] = []
        for key in ranking:
            if len(kept) == k or margin_of(by_key[key], texts, own) < min_margin:
                continue
            distances = [1 - unit(by_key[key]) @ unit(by_key[other]) for other in kept]
            if all(distance >= min_distance - 1e-12 for distance in distances):
                kept.append(key)
        lists.append(kept)
    return lists


def test_similarity_and_margin_of_each_archive_are_in_the_stats(
    run: Callable, write_shards: Callable, all_texts: np.ndarray, rng: np.random.Generator
) -> None:
    embeddings, keys = random_index(rng, 60)
    write_shards("a/00000", [None, *embeddings[:25]], ["skipped", *keys[:25]])
    write_shards("b/00000", [np.zeros(16), *embeddings[25:]], ["zero", *keys[25:]])
    rows, stats = run(5)
    by_key = dict(zip(keys, embeddings.astype(np.float64), strict=True))
    for own, name in enumerate(CATEGORIES):
        archive = [row for row in rows if row.category == name]
        margins = [margin_of(by_key[row.key], all_texts, own) for row in archive]
        found = stats["categories"][name]
        assert found["images"] == 5
        assert found["margin"] == pytest.approx(np.mean(margins), abs=1e-4)
        similarity = np.mean([row.similarity for row in archive])
        assert found["similarity"] == pytest.approx(similarity, abs=1e-4)
    second = np.sort(embeddings.astype(np.float64) @ all_texts.T)[:, -2]
    assert stats["random_similarity"] == pytest.approx(second.mean(), abs=1e-4)
    assert "passed_over" not in stats["counts"]


@pytest.mark.parametrize("search", ["exact", "ivf"])
def test_images_below_min_margin_give_way_to_the_next_best(
    run: Callable,
    write_shards: Callable,
    all_texts: np.ndarray,
    rng: np.random.Generator,
    search: str,
) -> None:
    embeddings, keys = random_index(rng, 80)
    write_shards("a/00000", list(embeddings[:30]), keys[:30])
    write_shards("a/00001", list(embeddings[30:]), keys[30:])
    plain = expected_lists(embeddings, keys, all_texts, 4)
    by_key = dict(zip(keys, embeddings.astype(np.float64), strict=True))
    at_the_edge = float(sorted(margin_of(by_key[key], all_texts, 0) for key in plain[0])[1])
    expected = expected_lists(embeddings, keys, all_texts, 4, min_margin=at_the_edge)
    rows, stats = run(4, min_margin=at_the_edge, search=search)
    assert keys_by_category(rows) == expected != plain
    ranks = [row.rank for row in rows if row.label_id == 1]
    assert ranks == sorted(ranks) != [1, 2, 3, 4]
    assert stats["counts"]["passed_over"] > 0


@pytest.mark.parametrize("search", ["exact", "ivf"])
@pytest.mark.parametrize("min_distance", [0.0, 0.05, 0.5])
def test_near_duplicates_give_way_to_the_next_best(
    run: Callable,
    write_shards: Callable,
    all_texts: np.ndarray,
    rng: np.random.Generator,
    min_distance: float,
    search: str,
) -> None:
    embeddings, keys = random_index(rng, 40)
    copies = unit(np.repeat(embeddings, 3, axis=0) + 0.01 * rng.normal(size=(120, 16)))
    copies[::3] = embeddings
    embeddings, keys = copies.astype(np.float16), [f"{number:020x}" for number in range(120)]
    embeddings[5] = embeddings[4]
    write_shards("a/00000", list(embeddings), keys)
    rows, _ = run(6, min_distance=min_distance, search=search)
    expected = expected_lists(embeddings, keys, all_texts, 6, min_distance=min_distance)
    assert keys_by_category(rows) == expected
    assert all(len(part) == 6 for part in expected)


def test_lists_that_the_filters_leave_short_or_empty_are_named_with_numbers(
    run: Callable, write_shards: Callable, all_texts: np.ndarray
) -> None:
    apart = all_texts[:2] - all_texts[2:].mean(0)
    write_shards("a/00000", [unit(apart[0]), *[unit(apart[1])] * 3], ["0", "1", "2", "3"])
    greatest = margin_of(unit(apart[0]).astype(np.float16), all_texts, 0)
    rows, stats = run(2, min_margin=1e-3, min_distance=0.1)
    assert keys_by_category(rows) == [["0"], ["1"], []]
    text = next(it for it in stats["warnings"] if "min_margin" in it)
    assert "retrieve.min_margin: 0.001 and retrieve.min_distance: 0.1 leave less than k: 2" in text
    assert "cat 1, dog 1, potted plant 0" in text
    assert any("no image is left for potted plant" in it for it in stats["warnings"])
    assert greatest > 1e-3
    with pytest.raises(PipelineError, match=r"retrieve\.min_margin: 1\.5 leaves no image.*lower"):
        run(2, min_margin=1.5)


def test_names_that_the_encoder_hardly_knows_are_said(
    run: Callable,
    write_shards: Callable,
    all_texts: np.ndarray,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No image has anything of a potted plant: it is no nearer to its best ones than to any."""
    unknown = all_texts[2]
    shown = [unit(text - (text @ unknown) * unknown) for text in all_texts[:2]]
    write_shards("a/00000", [*[shown[0]] * 10, *[shown[1]] * 10], [f"{n:02d}" for n in range(20)])
    _, stats = run(3)
    text = next(it for it in stats["warnings"] if "hardly knows" in it)
    assert "hardly knows potted plant" in text
    assert f"{stats['random_similarity']:.4f}" in text
    assert text in capsys.readouterr().err
    write_shards("a/00000", list(all_texts), list("01234"))
    assert "hardly knows" not in str(run(1)[1].get("warnings"))
    assert "hardly" not in capsys.readouterr().err


class TestReview:
    """Images that a person has dropped from archives."""

    @pytest.fixture
    def decide(self, tmp_path: Path) -> Callable[..., Path]:
        """Function that writes decisions (category, key) and returns the file."""

        def write(*dropped: tuple[str, str]) -> Path:
            path = tmp_path / "review.csv"
            decisions = {Reviewed(*item): Decision("drop") for item in dropped}
            write_review(path, decisions)
            return path

        return write

    def test_the_next_images_move_up(
        self,
        run: Callable,
        write_shards: Callable,
        texts: np.ndarray,
        rng: np.random.Generator,
        decide: Callable,
    ) -> None:
        embeddings, keys = random_index(rng, 90)
        write_shards("a/00000", list(embeddings[:40]), keys[:40])
        write_shards("b/00000", list(embeddings[40:]), keys[40:])
        best = numpy_top_k(embeddings, keys, texts, 90)
        review = decide(("cat", best[0][0]), ("cat", best[0][2]), ("cat", best[0][60]))
        rows, stats = run(5, review_path=review)
        expected = [best[0][place] for place in (1, 3, 4, 5, 6)]
        assert keys_by_category(rows) == [expected, best[1][:5], best[2][:5]]
        assert [row.rank for row in rows] == [1, 2, 3, 4, 5] * 3
        assert stats["counts"]["reviewed"] == 3
        assert stats["counts"]["unknown_reviews"] == 0
        assert "warnings" not in stats

    @pytest.mark.parametrize("params", [{"search": "ivf", "probes": 8}, {"min_distance": 0.01}])
    def test_they_move_up_however_images_are_found(
        self,
        run: Callable,
        write_shards: Callable,
        rng: np.random.Generator,
        decide: Callable,
        params: dict[str, Any],
    ) -> None:
        embeddings, keys = random_index(rng, 90)
        write_shards("a/00000", list(embeddings), keys)
        before = keys_by_category(run(6, **params)[0])
        review = decide(*(("dog", key) for key in before[1][:2]))
        after = keys_by_category(run(6, review_path=review, **params)[0])
        assert after[1][:4] == before[1][2:]
        assert len(after[1]) == 6
        assert after[0] == before[0]

    def test_a_dropped_image_is_no_negative_and_another_category_may_have_it(
        self, run: Callable, write_shards: Callable, rng: np.random.Generator, decide: Callable
    ) -> None:
        embeddings, keys = random_index(rng, 60)
        write_shards("a/00000", list(embeddings), keys)
        params = {"overlap": "best", "num_negatives": 10}
        before, _ = run(4, **params)
        negatives = [row.key for row in before if row.label_id == 0]
        wanted = [row.key for row in before if row.category == "dog"]
        review = decide(("cat", negatives[1]), ("background", negatives[3]), ("cat", wanted[0]))
        after, stats = run(4, review_path=review, **params)
        kept = [row.key for row in after if row.label_id == 0]
        assert kept[:8] == [key for key in negatives if key not in (negatives[1], negatives[3])]
        assert len(kept) == 10
        assert [row.key for row in after if row.category == "dog"] == wanted
        assert stats["counts"]["reviewed"] == 3

    def test_nothing_decided_changes_no_byte(
        self, run: Callable, write_shards: Callable, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        embeddings, keys = random_index(rng, 50)
        write_shards("a/00000", list(embeddings), keys)
        made = []
        for review in (None, tmp_path / "missing.csv", tmp_path / "empty.csv"):
            if review and review.name == "empty.csv":
                write_review(review, {})
            run(7, num_negatives=5, review_path=review)
            made.append([(tmp_path / it).read_bytes() for it in ("archives.parquet", "stats.json")])
        assert made[0] == made[1] == made[2]

    def test_what_is_not_there_is_counted_and_warned_of(
        self, run: Callable, write_shards: Callable, rng: np.random.Generator, decide: Callable
    ) -> None:
        embeddings, keys = random_index(rng, 20)
        write_shards("a/00000", list(embeddings), keys)
        review = decide(("cat", keys[0]), ("cat", "nowhere"), ("cow", keys[1]))
        rows, stats = run(3, review_path=review)
        assert len(rows) == 9
        assert stats["counts"]["reviewed"] == 1
        assert stats["counts"]["unknown_reviews"] == 2
        (warning,) = stats["warnings"]
        assert warning.startswith(f"{review}: 2 of its lines name no image of the index: ")

    def test_a_short_list_says_why_and_an_empty_one_is_no_archive(
        self, run: Callable, write_shards: Callable, rng: np.random.Generator, decide: Callable
    ) -> None:
        embeddings, keys = random_index(rng, 5)
        write_shards("a/00000", list(embeddings), keys)
        rows, stats = run(5, review_path=decide(*(("cat", key) for key in keys)))
        assert [len(part) for part in keys_by_category(rows)] == [0, 5, 5]
        assert any(
            "review.csv leave less than k: 5 images for cat 0" in it for it in stats["warnings"]
        )
        everything = [(name, key) for name in CATEGORIES for key in keys]
        with pytest.raises(PipelineError, match="drops every image from every category"):
            run(5, review_path=decide(*everything))
