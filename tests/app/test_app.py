"""The app as a browser sees it: pages, pictures, decisions, and what it refuses."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.app.trial import KEPT_SEGMENTERS
from pipeline.formats.images import decode_label, decode_png, encode_png, load_image
from pipeline.formats.predictions import PredictionStore
from pipeline.formats.review import LABEL_VERDICTS, read_review
from pipeline.formats.shards import MANIFEST, open_samples
from pipeline.formats.tables import read_archives
from pipeline.inference.segmenter import Segmenter
from pipeline.report.inputs import NO_VALUE
from tests.conftest import encoded_image, noise_image
from tests.formats.shard_folders import read_shards, write_shards
from tests.stages.tiny_checkpoint import CATEGORIES

VIEWS = ("/archives", "/labels", "/predictions", "/try")


def pictures(page: str) -> list[str]:
    return [it.replace("&amp;", "&") for it in re.findall(r'src="(/pictures/[^"]+)"', page)]


def keys_on(page: str) -> list[str]:
    return re.findall(r'<li class="tile[^>]*data-key="([^"]+)"', page)


def size_of(response: Any) -> tuple[int, int]:
    return Image.open(io.BytesIO(response.content)).size


# -- pages and pictures ----------------------------------------------------------------------------


@pytest.mark.parametrize("address", [*VIEWS, "/archives/1", "/archives/2", "/predictions/tiny/0"])
def test_every_page_shows_its_pictures_and_escapes_names(made: Any, address: str) -> None:
    page = made.page(address)
    assert "&lt;b&gt;tiny&lt;/b&gt;" in page
    assert "<b>tiny</b>" not in page
    found = pictures(page)
    assert bool(found) == (address != "/try")
    for picture in found:
        response = made.client.get(picture)
        assert response.status_code == 200, picture
        load_image(response.content)


def test_nothing_is_asked_of_other_hosts(made: Any) -> None:
    for address in VIEWS:
        page = made.page(address)
        assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
        assert "<style" not in page
        assert " style=" not in page
        assert not re.findall(r"<script(?![^>]*src=)", page)
        for path in re.findall(r'(?:src|href)="(/static/[^"]+|/colours[^"]+)"', page):
            assert made.client.get(path).status_code == 200
    assert made.client.get("/static/../web.py").status_code == 404
    assert made.client.get("/static/%2e%2e/web.py").status_code == 404


def test_archives_are_in_the_order_of_the_table_or_by_a_number(made: Any) -> None:
    rows = read_archives(made.root / "archives.parquet")
    assert keys_on(made.page("/archives/2")) == [it.key for it in rows if it.label_id == 2]
    order = re.compile(r'<h2>.*?href="/archives/(\d)">')
    assert order.findall(made.page("/archives")) == ["1", "2", "3"]
    assert order.findall(made.page("/archives?sort=similarity")) == ["2", "1", "3"]
    page = made.page("/archives/9", status=400)
    assert "archive 9: there is none; run <code>pipeline retrieve</code> again" in page


def test_large_pictures_are_larger_and_pages_beyond_the_last_are_the_last(made: Any) -> None:
    (address, *_) = pictures(made.page("/archives/1?page=99"))
    small, large = made.client.get(address), made.client.get(f"{address}&large=1")
    assert max(size_of(small)) <= 256 < max(size_of(large)) <= 1024
    assert "immutable" in small.headers["Cache-Control"]


def test_a_picture_whose_file_is_gone_says_so(made: Any) -> None:
    row = read_archives(made.root / "archives.parquet")[0]
    Path(row.path).rename(Path(row.path).with_suffix(".moved"))
    try:
        response = made.client.get("/pictures/archive/0")
    finally:
        Path(row.path).with_suffix(".moved").rename(row.path)
    assert response.status_code == 404
    assert response.headers["Content-Type"] == "image/svg+xml"
    assert "file is missing" in response.text
    assert "no such image" in made.client.get(f"/pictures/archive/{10**30}").text


@pytest.mark.parametrize(
    ("without", "address", "command"),
    [
        ("archives.parquet", "/archives", "pipeline retrieve"),
        ("masks/made", "/labels", "pipeline mask"),
        ("predictions/tiny", "/predictions", "pipeline predict_bench --bench tiny"),
        ("embeddings/made", "/archives/1/alike?key=0a", "pipeline embed"),
    ],
)
def test_what_is_missing_names_the_stage(
    make: Callable[..., Any], without: str, address: str, command: str
) -> None:
    page = make(without).page(address, status=404)
    assert "Nothing here yet" in page
    assert f"run <code>dvc repro</code> first, or <code>{command}</code> alone" in page
    assert MANIFEST not in page


def test_labels_are_optional_but_said_to_be_missing(make: Callable[..., Any]) -> None:
    made = make("labels/made")
    page = made.page("/labels")
    assert "<code>pipeline pseudo_label</code> makes them" in page
    assert made.client.get("/pictures/sample/0/mask").status_code == 200
    assert made.client.get("/pictures/sample/0/labels").status_code == 404
    assert made.client.get("/labels/facts/0").json()["present"] == []


def test_labels_of_masks_that_were_made_anew_at_another_size_are_said_to_be_missing(
    made: Any,
) -> None:
    samples = list(read_shards(made.root / "masks/made"))
    for sample in samples:
        mask = np.kron(decode_png(sample["mask.png"]), np.ones((2, 2), np.uint8))
        sample["mask.png"] = encode_png(mask)
    write_shards(samples, made.root / "masks/made", shard_size=8)
    page = made.page("/labels?verdict=all")
    assert "<code>pipeline pseudo_label</code> makes them" in page
    assert set(re.findall(r'data-disagreement="([^"]+)"', page)) == {NO_VALUE}
    assert made.client.get("/pictures/sample/0/mask").status_code == 200
    page = made.page("/pictures/sample/0/labels", status=404)
    assert "run <code>pipeline pseudo_label</code> first" in page
    assert made.client.get("/labels/facts/0").json()["present"] == []


def test_own_photos_without_truth_are_no_fault(make: Callable[..., Any]) -> None:
    page = make(benches={}).page("/predictions")
    assert "nothing is missing" in page
    assert 'href="/try"' in page
    assert "cannot be shown" not in page


def test_damaged_artefacts_are_pages_with_the_fix(made: Any) -> None:
    (made.root / "archives.parquet").write_bytes(b"no table")
    assert "run <code>pipeline retrieve</code> again" in made.page("/archives", status=400)
    shard = made.root / "masks/made/00000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    assert "run the stage that writes it again" in made.page("/labels", status=400)


def test_a_changed_table_is_read_again(made: Any) -> None:
    before = keys_on(made.page("/archives/1"))
    from pipeline.formats.tables import write_archives

    rows = read_archives(made.root / "archives.parquet")
    write_archives(made.root / "archives.parquet", [it for it in rows if it.rank > 1])
    assert keys_on(made.page("/archives/1")) == before[1:]


# -- archives --------------------------------------------------------------------------------------


def test_dropping_writes_the_file_and_undo_takes_it_back(made: Any) -> None:
    rows = [it for it in read_archives(made.root / "archives.parquet") if it.label_id == 1]
    first, second = rows[0].key, rows[1].key
    body = {"category": "cat", "verdict": "drop", "images": [first]}
    assert made.post("/archives/change", body)["total"] == 1
    assert made.review("archives") == [f"cat,{first},drop,{rows[0].path}"]
    page = made.page("/archives/1")
    assert re.search(rf'<li class="tile is-dropped"[^>]*data-key="{first}"', page)
    made.post("/archives/change", body | {"images": [second]})
    made.post("/archives/change", body | {"images": [first], "verdict": None})
    assert [it.split(",")[1] for it in made.review("archives")] == [second]
    answer = made.post("/archives/undo", {})
    assert answer["changes"] == [{"category": "cat", "key": first, "verdict": "drop"}]
    made.post("/archives/undo", {})
    made.post("/archives/undo", {})
    assert made.review("archives") == []
    assert "nothing to undo" in made.post("/archives/undo", {}, 400)["error"]


def test_dropped_images_that_are_gone_can_be_restored(made: Any) -> None:
    rows = read_archives(made.root / "archives.parquet")
    inside, outside = (next(it.key for it in rows if it.label_id == label) for label in (1, 2))
    body = {"category": "cat", "verdict": "drop", "images": [inside, outside]}
    made.post("/archives/change", body)
    page = made.page("/archives/1")
    assert "<b data-dropped>1</b>" in page
    assert keys_on(page.partition("data-others")[2]) == [outside]
    for picture in pictures(page):
        assert made.client.get(picture).status_code == 200
    assert '<div class="alert"><dt>Dropped</dt><dd>2</dd></div>' in made.page("/archives")


def test_a_neighbourhood_is_shown_first_and_dropped_in_one_step(made: Any) -> None:
    rows = [it for it in read_archives(made.root / "archives.parquet") if it.label_id == 1]
    address = f"/archives/1/alike?key={rows[0].key}&count=3"
    page = made.page(address)
    seed, *near = keys_on(page)
    assert seed == rows[0].key
    assert len(near) == 3
    assert set(near) <= {it.key for it in rows[1:]}
    assert made.review("archives") == []
    similarities = [float(it) for it in re.findall(r"<span>(-?\d\.\d{3})</span>", page)]
    assert similarities == sorted(similarities, reverse=True)
    body = {"category": "cat", "verdict": "drop", "images": [seed, *near]}
    made.post("/archives/change", body)
    assert len(made.review("archives")) == 4
    made.post("/archives/undo", {})
    assert made.review("archives") == []


def test_neighbours_are_those_of_numpy(made: Any) -> None:
    from pipeline.formats.tables import embedding_matrix, iter_embedding_rows, list_embedding_shards

    keys, parts = [], []
    shards = list_embedding_shards([made.root / "embeddings/made"])
    for block in iter_embedding_rows(shards, columns=["key", "embedding"], block_rows=7):
        keys += block["key"].to_pylist()
        parts.append(embedding_matrix(block["embedding"]).astype(np.float64))
    vectors = np.concatenate(parts)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarities = vectors @ vectors[4]
    order = [keys[row] for row in np.argsort(-similarities, kind="stable") if row != 4]
    page = made.page(f"/archives/1/alike?key={keys[4]}&count=6&scope=index")
    assert set(keys_on(page)[1:]) == set(order[:6])
    rows = {it.key for it in read_archives(made.root / "archives.parquet") if it.label_id == 1}
    page = made.page(f"/archives/1/alike?key={keys[4]}&count=6&scope=archive")
    assert set(keys_on(page)[1:]) == set([key for key in order if key in rows][:6])
    assert "no image of the index" in made.page("/archives/1/alike?key=00", status=400)


@pytest.mark.parametrize(
    "body",
    [
        {"category": "cow", "verdict": "drop", "images": ["0a"]},
        {"category": "cat", "verdict": "burn", "images": ["0a"]},
        {"category": "cat", "verdict": "drop", "images": []},
        {"category": "cat", "verdict": "drop", "images": ["../../x"]},
        {"category": "cat", "verdict": "drop", "images": [7]},
        {"category": "cat", "verdict": "drop", "images": ["0a"] * 501},
        {"category": ["cat"], "verdict": "drop", "images": ["0a"]},
        {},
    ],
)
def test_senseless_changes_are_refused(made: Any, body: dict[str, Any]) -> None:
    assert made.post("/archives/change", body, 400)["error"]
    assert made.review("archives") == []


def test_a_file_broken_by_hand_is_named_and_kept(made: Any) -> None:
    path = made.root / "data/review/archives.csv"
    path.write_text("category,key,verdict,file\ncat,0a,dropp,x\n")
    body = {"category": "cat", "verdict": "drop", "images": ["0b"]}
    assert (
        "archives.csv: line 2: verdict 'dropp'" in made.post("/archives/change", body, 400)["error"]
    )
    assert "line 2" in made.page("/archives", status=400)
    assert "dropp" in path.read_text()


def test_a_disk_that_takes_no_decision_is_named_with_what_to_do(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made.root / "data/review"
    body = {"number": 4, "verdict": "reject"}

    def full(path: Path, *_: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.formats.review.write_bytes", full)
        assert made.post("/labels/change", body, 500)["error"] == (
            f"no space left on the disk ({folder}/labels.csv): free some, then try again"
        )
    shutil.rmtree(folder)
    folder.write_bytes(b"")
    error = made.post("/labels/change", body, 500)["error"]
    assert error.startswith(f"{os.strerror(errno.EEXIST)} ({folder}): make it writable")
    folder.unlink()
    (folder / "labels.csv").mkdir(parents=True)
    assert str(folder / "labels.csv") in made.post("/labels/change", body, 500)["error"]
    (folder / "labels.csv").rmdir()
    assert made.post("/labels/change", body)["rejected"] == 1


@pytest.mark.parametrize("depth", [500, 5000, 100_000])
def test_a_request_nested_without_end_is_refused(made: Any, depth: int) -> None:
    for body in ("[" * depth, '{"verdict": ' + "[" * depth + "]" * depth + ', "number": 4}'):
        response = made.client.post("/labels/change", content=body, headers=made.headers)
        assert response.status_code == 400
        assert response.json()["error"]


def test_an_address_without_end_is_refused(made: Any) -> None:
    assert keys_on(made.page(f"/archives/1?page={'9' * 3000}"))
    assert "there is none" in made.page(f"/labels/facts/{'9' * 3000}", status=400)
    for address in (f"/labels?page={'9' * 5000}", f"/labels/facts/{'9' * 5000}"):
        assert "too long" in made.page(address, status=414)


# -- masks and labels ------------------------------------------------------------------------------


def test_samples_come_by_disagreement(made: Any) -> None:
    masks, labels = open_samples(made.root / "masks/made"), open_samples(made.root / "labels/made")
    expected: dict[int, float] = {}
    for number, key in enumerate(masks.keys):
        mask = np.array(Image.open(io.BytesIO(masks.member(number, "mask.png")))) > 0
        label = decode_label(labels.member(labels.keys.index(key), "label.png"))
        if mask.any():
            label_id = int(key.rpartition("_")[2])
            expected[number] = 1 - float((label[mask] == label_id).mean())
    page = made.page("/labels?verdict=all")
    shown = [int(it) for it in re.findall(r'data-number="(\d+)"', page)]
    known = [number for number in shown if number in expected]
    assert sorted(shown) == [*range(24)]
    assert shown[: len(known)] == known
    assert [expected[number] for number in known] == sorted(expected.values(), reverse=True)
    texts = re.findall(r'data-number="(\d+)".*?data-disagreement="([^"]+)"', page, re.DOTALL)
    for number, text in texts:
        wanted = f"{100 * expected[int(number)]:.0f} %" if int(number) in expected else NO_VALUE
        assert text == wanted


def test_verdicts_are_written_filtered_and_undone(made: Any) -> None:
    info = open_samples(made.root / "masks/made").json(4)
    assert made.post("/labels/change", {"number": 4, "verdict": "reject"})["rejected"] == 1
    made.post("/labels/change", {"number": 5, "verdict": "accept"})
    path = made.root / "data/review/labels.csv"
    review = read_review(path, LABEL_VERDICTS)
    assert review[info["category"], info["key"]].verdict == "reject"

    def numbers(verdict: str) -> set[int]:
        page = made.page(f"/labels?verdict={verdict}")
        return {int(it) for it in re.findall(r'data-number="(\d+)"', page)}

    assert numbers("reject") == {4}
    assert numbers("accept") == {5}
    assert numbers("open") == {*range(24)} - {4, 5}
    page = made.page("/labels?verdict=all&category=2")
    assert set(re.findall(r'data-category="([^"]+)"', page)) == {"dog"}
    answer = made.post("/labels/undo", {})
    assert (answer["accepted"], answer["rejected"]) == (0, 1)
    for wrong in (
        {"number": 99, "verdict": "accept"},
        {"number": True, "verdict": "accept"},
        {"number": 1, "verdict": "drop"},
        {"verdict": "accept"},
    ):
        assert made.post("/labels/change", wrong, 400)["error"]
    assert len(made.review("labels")) == 1


def test_numbers_of_a_page_mean_nothing_once_the_artefacts_are_made_anew(made: Any) -> None:
    page = made.page("/labels")
    found = re.search(r'data-version="([^"]+)"', page)
    assert found
    verdict = {"number": 4, "verdict": "reject", "version": found.group(1)}
    made.post("/labels/change", verdict)
    asked = [pictures(made.page(it))[0] for it in ("/labels", "/archives/1", "/predictions")]
    asked.append(f"/labels/facts/4?v={found.group(1)}")
    assert all(made.client.get(it).status_code == 200 for it in asked)
    for path in ("masks/made", "predictions/tiny", "archives.parquet"):
        file = made.root / path / MANIFEST if (made.root / path).is_dir() else made.root / path
        state = file.stat()
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
    assert "load the page again" in made.post("/labels/change", verdict, 400)["error"]
    for address in asked:
        response = made.client.get(address)
        assert response.status_code == 400
        assert "load the page again" in response.text
    assert len(made.review("labels")) == 1


def test_facts_are_those_of_the_sample(made: Any) -> None:
    store = open_samples(made.root / "masks/made")
    facts = made.client.get("/labels/facts/3").json()
    assert facts["file"] == store.json(3)["path"]
    assert facts["rank"] == store.json(3)["rank"]
    assert sum(it["share"] for it in facts["present"]) == pytest.approx(1, abs=0.02)
    assert {it["name"] for it in facts["present"]} <= {"background", *CATEGORIES}
    assert "there is none" in made.client.get("/labels/facts/99").text
    assert made.client.get("/pictures/sample/3/truth").status_code == 400


# -- predictions -----------------------------------------------------------------------------------


def test_predictions_come_by_their_score_on_the_truth(made: Any) -> None:
    store = PredictionStore(made.root / "predictions/tiny")
    expected = {}
    for number in range(5):
        target = np.zeros((32, 40), int)
        target[8:20, 8:30] = 1 + number % 3
        prediction = store.get(number, f"im{number:03d}")
        assert prediction
        found = prediction.labels
        present = set(np.unique(target)) | set(np.unique(found))
        ious = [
            ((target == it) & (found == it)).sum() / ((target == it) | (found == it)).sum()
            for it in present
        ]
        expected[number] = float(np.mean(ious))

    def order(query: str) -> list[int]:
        page = made.page(f"/predictions?{query}")
        return [int(it) for it in re.findall(r'href="/predictions/tiny/(\d+)"', page)]

    assert order("sort=worst") == sorted(expected, key=lambda it: (expected[it], it))
    assert order("sort=best") == sorted(expected, key=lambda it: (-expected[it], it))
    assert sorted(order("sort=doubtful")) == [*range(5)]
    assert {0, 3} <= set(order("category=1"))
    page = made.page("/predictions?sort=best")
    shown = [
        float(it)
        for it in re.findall(r"<dt>mIoU</dt><dd>([\d.]+)</dd></div>\s*<div><dt>Mean", page)
    ]
    assert shown == [pytest.approx(100 * it, abs=0.051) for it in sorted(expected.values())[::-1]]
    assert "<dt>mIoU</dt><dd>12.5</dd>" in page
    bars = re.findall(r'IoU of (\w+)"></meter><span class="value">([\d.]+)', page)
    assert bars == [("cat", "3.0"), ("bird", "20.0"), ("background", "50.0")]


def test_the_threshold_takes_objects_away(made: Any) -> None:
    store = PredictionStore(made.root / "predictions/tiny")
    number = next(it for it in range(5) if store.get(it, f"im{it:03d}").objects)
    address = f"/pictures/prediction/tiny/{number}/objects?large=1&threshold="
    plain = made.client.get(f"/pictures/prediction/tiny/{number}/image?large=1").content
    assert made.client.get(f"{address}0").content != plain
    assert made.client.get(f"{address}1").content == plain
    assert made.client.get(f"{address}7").content == plain  # kept within bounds
    assert made.client.get(f"{address}nan").content == made.client.get(f"{address}0").content
    assert made.client.get("/pictures/prediction/tiny/0/secret").status_code == 400
    assert made.client.get("/pictures/prediction/other/0/image").status_code == 404
    assert made.client.get("/pictures/prediction/tiny/99/image").status_code == 400


# -- try -------------------------------------------------------------------------------------------


def upload(made: Any, data: bytes, names: str = "", **headers: str) -> Any:
    sent = {**made.headers, "X-Names": names, **headers}
    return made.client.post("/try", content=data, headers=sent)


def test_a_photo_is_segmented_as_in_python(made: Any) -> None:
    image = noise_image(3, 40, 56)
    answer = upload(made, encoded_image(image), "cat%2C%20dog").json()
    expected = Segmenter.load(made.root / "zutis", categories=["cat", "dog"], device="cpu")(image)
    assert (answer["width"], answer["height"], answer["names"]) == (40, 56, ["cat", "dog"])
    assert len(answer["objects"]) == len(expected.instances)
    base = f"/try/{answer['token']}"
    labels = Image.open(io.BytesIO(made.client.get(f"{base}/files/labels.png").content))
    assert np.array_equal(np.array(labels), expected.semantic)
    content = json.loads(made.client.get(f"{base}/files/coco.json").content)
    assert [it["name"] for it in content["categories"]] == ["cat", "dog"]
    masks = [coco_mask.decode(it["segmentation"]) for it in content["annotations"]]
    assert [it.tolist() for it in masks] == [it.mask.tolist() for it in expected.instances]
    none = json.loads(made.client.get(f"{base}/files/coco.json?threshold=1").content)
    assert none["annotations"] == []
    for path in (
        "files/overlay.png",
        "pictures/objects",
        "pictures/semantic",
        "confidence?name=dog",
    ):
        load_image(made.client.get(f"{base}/{path}").content)
    assert "not among the names" in made.client.get(f"{base}/confidence?name=cow").text
    assert made.client.get(f"{base}/files/..%2f..%2fparams.yaml").status_code in (400, 404)


def test_what_cannot_be_segmented_is_said(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the photo cannot be used: not an image" in upload(made, b"text").json()["error"]
    assert "empty file" in upload(made, b"").json()["error"]
    good = encoded_image(noise_image(1))
    assert "listed twice" in upload(made, good, "cat,cat").json()["error"]
    assert "not names between commas" in upload(made, good, "%22cat").json()["error"]
    assert (
        "201 names, at most 200"
        in upload(made, good, ",".join(map(str, range(201)))).json()["error"]
    )
    huge = encoded_image(Image.new("1", (8000, 6000)))
    assert "too large: 8000x6000" in upload(made, huge).json()["error"]
    monkeypatch.setattr("pipeline.app.try_view.MAX_UPLOAD_BYTES", 2**20)
    response = upload(made, bytes(2**20 + 1))
    assert response.status_code == 413
    assert "larger than 1 MiB" in response.json()["error"]


def test_photos_are_forgotten_and_nothing_is_written(made: Any) -> None:
    before = sorted(made.root.rglob("*"))
    data = encoded_image(noise_image(3, 32, 32))
    tokens = [upload(made, data).json()["token"] for _ in range(7)]
    assert made.client.get(f"/try/{tokens[0]}/pictures/image").status_code == 404
    assert made.client.get(f"/try/{tokens[-1]}/pictures/image").status_code == 200
    assert sorted(made.root.rglob("*")) == before


def test_without_a_checkpoint_the_stage_is_named(make: Callable[..., Any]) -> None:
    made = make("zutis")
    assert "No network is trained yet" in made.page("/try")
    response = upload(made, encoded_image(noise_image(1)))
    assert "run `dvc repro` first, or `pipeline train` alone" in response.json()["error"]


def test_a_trained_network_is_named(made: Any) -> None:
    page = made.page("/try")
    assert f"The network is <code>{made.root / 'zutis'}</code>" in page
    assert "No network" not in page


def test_only_a_few_networks_stay_however_many_names_are_tried(made: Any) -> None:
    gc.collect()
    before = {id(item) for item in gc.get_objects() if type(item) is Segmenter}
    data = encoded_image(noise_image(3, 32, 32))
    tokens = [upload(made, data, name).json()["token"] for name in ("cat", "dog", "bird", "cow")]
    gc.collect()
    kept = [item for item in gc.get_objects() if type(item) is Segmenter]
    assert len({id(item) for item in kept} - before) <= KEPT_SEGMENTERS
    asked = f"/try/{tokens[0]}/confidence?name=cat"
    first = made.client.get(asked)
    assert first.status_code == 200
    again = upload(made, data, "cat").json()["token"]
    assert first.content == made.client.get(f"/try/{again}/confidence?name=cat").content
    os.utime(made.root / "zutis/model.safetensors", ns=(1, 1))
    assert "trained anew since" in made.client.get(asked).text


# -- who may ask -----------------------------------------------------------------------------------


CHANGE = {"category": "cat", "verdict": "drop", "images": ["0a"]}


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "[::1", "a b"])
def test_other_names_of_this_server_are_refused(made: Any, host: str) -> None:
    assert made.client.get("/archives", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:7861", "127.0.0.1", "[::1]:80", "192.168.1.9:7861"])
def test_addresses_are_no_names_and_fine(made: Any, host: str) -> None:
    assert made.client.get("/try", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/archives/change", "/archives/undo", "/labels/change", "/try"])
def test_changes_need_the_token_and_a_page_of_this_host(made: Any, path: str) -> None:
    for headers in (
        {},
        {"X-CSRF-Token": "guess"},
        made.headers | {"Origin": "http://evil.example"},
        made.headers | {"Origin": "null"},
        made.headers | {"Origin": "http://localhost:1"},
    ):
        response = made.client.post(path, json=CHANGE, headers=headers)
        assert response.status_code == 403, headers
    assert made.review("archives") == []
    made.post("/archives/change", CHANGE, Origin="http://localhost:7861")
    assert len(made.review("archives")) == 1


def test_bodies_are_json_objects_of_bounded_size(made: Any) -> None:
    for body in (b"[]", b"{", b"\xff", b"7"):
        response = made.client.post("/archives/change", content=body, headers=made.headers)
        assert response.status_code == 400
    response = made.client.post("/archives/change", content=bytes(2**20 + 1), headers=made.headers)
    assert response.status_code == 413


def test_every_answer_forbids_what_pages_do_not_need(made: Any) -> None:
    for address in ("/archives", "/nowhere", "/pictures/archive/0", "/static/app.css"):
        headers = made.client.get(address).headers
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
    assert "no-store" in made.client.get("/archives").headers["Cache-Control"]
    page = made.page("/nowhere/%3Cscript%3E", status=404)
    assert "<script>" not in page
    assert made.post("/archives", {}, 405)["error"] == "Method Not Allowed"
    assert made.post("/nowhere", {}, 404)["error"].startswith("/nowhere: no such page")
