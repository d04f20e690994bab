"""The service's routes: what a client gets for an image, and for everything else."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.inference.segmenter import Segmenter
from pipeline.params.base import PredictionSettings
from pipeline.serve.options import CheckpointSource, Limits
from tests.conftest import encoded_image, noise_image
from tests.serve.slow import SlowSource
from tests.stages.tiny_checkpoint import CATEGORIES, write_checkpoint

pytest.importorskip("starlette")
pytest.importorskip("httpx")
from starlette.testclient import TestClient

from pipeline.serve.app import make_app

PHOTO = noise_image(5, 40, 56)
PNG = encoded_image(PHOTO)


def client(source: object, **limits: float) -> TestClient:
    app = make_app(source.load(1), source, Limits(**limits))
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_clip: tuple[Path, Path]) -> object:
    folder = write_checkpoint(tmp_path_factory.mktemp("served") / "zutis", tiny_clip)
    return CheckpointSource(folder, None, PredictionSettings(), device="cpu")


@pytest.fixture(scope="module")
def served(source: CheckpointSource) -> Iterator[TestClient]:
    with client(source) as connected:
        yield connected


@pytest.fixture
def slow() -> Iterator[TestClient]:
    with client(SlowSource()) as connected:
        yield connected


def masks_of(content: dict) -> list[np.ndarray]:
    return [coco_mask.decode(item["segmentation"]).astype(bool) for item in content["annotations"]]


def test_an_image_is_answered_by_what_the_segmenter_says(
    served: TestClient, source: CheckpointSource
) -> None:
    expected = Segmenter.load(source.checkpoint_dir, device="cpu")(PHOTO)
    content = served.post("/predict", content=PNG).json()
    assert content["images"] == [{"id": 1, "file_name": "", "width": 40, "height": 56}]
    assert [item["name"] for item in content["categories"]] == CATEGORIES
    assert len(content["annotations"]) == len(expected.instances) > 0
    assert [item["id"] for item in content["annotations"]] == list(
        range(1, len(expected.instances) + 1)
    )
    for mask, item, instance in zip(
        masks_of(content), content["annotations"], expected.instances, strict=True
    ):
        assert np.array_equal(mask, instance.mask)
        assert item["category_id"] == instance.label_id
        assert item["score"] == pytest.approx(instance.score, abs=1e-6)
        assert item["area"] == mask.sum()
    labels = served.post("/predict?labels=png", content=PNG)
    assert labels.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(labels.content)) as image:
        assert np.array_equal(np.asarray(image), expected.semantic)


def test_a_form_gives_the_same_and_the_file_its_name(served: TestClient) -> None:
    plain = served.post("/predict", content=PNG).json()
    for name, stored in (("cat.png", "cat.png"), ("../../etc/pass wd", "pass wd"), ("", "")):
        files = {"image": (name, PNG, "image/png")}
        answer = served.post("/predict", files=files, data={"note": "x"}).json()
        if not name:  # httpx then sends a field that is no file
            assert "error" in answer
            continue
        assert answer["images"][0]["file_name"] == stored
        assert answer["annotations"] == plain["annotations"]


def test_an_image_is_put_upright(slow: TestClient) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded_image(noise_image(1, 30, 20), "JPEG", exif=exif)
    image = slow.post("/predict", content=data).json()["images"][0]
    assert (image["width"], image["height"]) == (20, 30)


def test_other_names_are_those_of_a_network_loaded_with_them(
    served: TestClient, source: CheckpointSource
) -> None:
    names = ["red car", "dog, old"]
    expected = Segmenter.load(source.checkpoint_dir, categories=names, device="cpu")(PHOTO)
    for _ in range(2):  # loaded, and kept
        answer = served.post("/predict", params={"categories": 'red car,"dog, old"'}, content=PNG)
        content = answer.json()
        assert [item["name"] for item in content["categories"]] == names
        assert [item["category_id"] for item in content["annotations"]] == [
            instance.label_id for instance in expected.instances
        ]
        for mask, instance in zip(masks_of(content), expected.instances, strict=True):
            assert np.array_equal(mask, instance.mask)
    again = served.post("/predict", content=PNG).json()
    assert [item["name"] for item in again["categories"]] == CATEGORIES


def test_networks_of_other_names_share_its_weights(source: CheckpointSource) -> None:
    own = source.load(1)
    other = source.with_names(own, ["zebra"])
    weights = dict(own.student.network.named_parameters())
    for name, weight in other.student.network.named_parameters():
        assert weight.data_ptr() == weights[name].data_ptr()


def test_names_and_health(served: TestClient) -> None:
    names = served.get("/categories").json()["categories"]
    assert names == [{"id": number, "name": name} for number, name in enumerate(CATEGORIES, 1)]
    assert served.get("/health").json() == {"status": "ok", "waiting": 0}


@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        ("/predict", b"", 400, "no image"),
        ("/predict", b"hello", 415, "not an image"),
        ("/predict", b'{"image": 1}', 415, "not an image"),
        ("/predict", PNG[:200], 400, "truncated"),
        ("/predict", encoded_image(noise_image(1, 200, 200)), 413, "too large: 200x200"),
        ("/predict", encoded_image(noise_image(1, 1000, 2)), 400, "too elongated"),
        ("/predict", bytes(20_001), 413, "body: 20001 bytes; at most 20000"),
        ("/predict?labels=jpg", PNG, 400, "labels=jpg: expected png"),
        ("/predict?label=png", PNG, 400, "label: unknown"),
        ("/predict?categories=", PNG, 400, "list is empty"),
        ("/predict?categories=a,a", PNG, 400, "listed twice"),
        ('/predict?categories="a', PNG, 400, "not names between commas"),
        ("/predict?categories=" + ",".join(map(str, range(201))), PNG, 400, "201 names"),
        ("/predict?categories=zebra", PNG, 400, "only its own"),
        ("/other", PNG, 404, "/other: Not Found"),
        ("/health", PNG, 405, "POST /health: Method Not Allowed"),
    ],
)
def test_a_bad_request_is_told_why(path: str, body: bytes, status: int, reason: str) -> None:
    with client(SlowSource(), max_bytes=20_000, max_pixels=30_000) as connected:
        answer = connected.post(path, content=body)
        assert answer.status_code == status
        assert list(answer.json()) == ["error"]
        assert reason in answer.json()["error"]
        # It goes on.
        assert connected.post("/predict", content=PNG).status_code == 200


def test_another_method_is_refused(slow: TestClient) -> None:
    answer = slow.get("/predict")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a": ("a.png", PNG), "b": ("b.png", PNG)}, "Too many files"),
        ({"a": ("a.png", b"")}, "no image"),
        ({"a": ("a.png", b"no")}, "not an image"),
    ],
)
def test_a_bad_form_is_told_why(slow: TestClient, files: dict, reason: str) -> None:
    answer = slow.post("/predict", files=files)
    assert 400 <= answer.status_code < 500
    assert reason in answer.json()["error"]


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=x"])
def test_a_damaged_form_is_told_so(slow: TestClient, content_type: str) -> None:
    answer = slow.post("/predict", content=b"--y\r\nzzz", headers={"content-type": content_type})
    assert answer.status_code == 400
    assert "error" in answer.json()


def test_a_bug_is_answered_without_its_text(slow: TestClient) -> None:
    answer = slow.post("/predict", content=encoded_image(noise_image(1, 13, 13)))
    assert (answer.status_code, answer.json()) == (500, {"error": "internal error"})


def test_an_answer_that_takes_too_long_is_given_up() -> None:
    with client(SlowSource(seconds=0.5), timeout_s=0.05) as connected:
        answer = connected.post("/predict", content=PNG)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert "0.05 s" in answer.json()["error"]


def test_waiting_images_share_a_batch_and_one_that_fails_spoils_no_other() -> None:
    source = SlowSource(seconds=0.1)
    segmenter = source.load(1)
    app = make_app(segmenter, source, Limits(batch_size=4))
    with (
        TestClient(app, raise_server_exceptions=False) as connected,
        ThreadPoolExecutor(8) as pool,
    ):
        bodies = [encoded_image(noise_image(1, 20 + n, 20)) for n in range(7)]
        bodies.append(encoded_image(noise_image(1, 13, 13)))
        answers = list(pool.map(lambda body: connected.post("/predict", content=body), bodies))
    assert [answer.status_code for answer in answers] == [200] * 7 + [500]
    widths = [answer.json()["images"][0]["width"] for answer in answers[:7]]
    assert widths == [20 + n for n in range(7)]
    assert max(segmenter.batches) > 1
    assert max(segmenter.batches) <= 4


def test_too_many_requests_are_sent_away() -> None:
    with (
        client(SlowSource(seconds=0.2), max_waiting=2) as connected,
        ThreadPoolExecutor(6) as pool,
    ):
        answers = list(
            pool.map(lambda _: connected.post("/predict", content=PNG).status_code, range(6))
        )
    assert set(answers) == {200, 503}
    assert answers.count(200) >= 2


def test_the_answer_is_plain_json(slow: TestClient) -> None:
    answer = slow.post("/predict", content=PNG)
    assert answer.headers["content-type"] == "application/json"
    json.loads(answer.text, parse_constant=pytest.fail)
