"""A service of an ONNX file: the answers of torch, from a process that has none."""

from __future__ import annotations

import http.client
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
from starlette.testclient import TestClient

from pipeline.cli import main
from pipeline.errors import PipelineError
from pipeline.exporters.onnx import export_onnx
from pipeline.params.base import PredictionSettings
from pipeline.serve.app import make_app
from pipeline.serve.options import CheckpointSource, Limits, OnnxSource
from tests.conftest import encoded_image, noise_image
from tests.stages.tiny_checkpoint import CATEGORIES, write_checkpoint
from tests.without_torch import environment_without_torch

PNG = encoded_image(noise_image(5, 40, 56))
SETTINGS = PredictionSettings(suppression="none", threshold=0.45)


def client(source: object) -> TestClient:
    app = make_app(source.load(1), source, Limits())
    return TestClient(app, raise_server_exceptions=False)


def assert_alike(ours: dict, theirs: dict) -> None:
    """The same within what an export promises."""
    assert ours["images"] == theirs["images"]
    assert ours["categories"] == theirs["categories"]
    assert len(ours["annotations"]) == len(theirs["annotations"]) > 0
    for mine, its in zip(ours["annotations"], theirs["annotations"], strict=True):
        assert mine["category_id"] == its["category_id"]
        assert mine["area"] == pytest.approx(its["area"], rel=0.01)
        assert mine["score"] == pytest.approx(its["score"], abs=1e-4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_clip: tuple[Path, Path]) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served") / "zutis", tiny_clip)


@pytest.fixture(scope="module")
def onnx_path(checkpoint: Path) -> Path:
    path = checkpoint.parent / "student.onnx"
    export_onnx(checkpoint, path, settings=SETTINGS, cache_dir=checkpoint.parent)
    return path


@pytest.fixture(scope="module")
def torch(checkpoint: Path) -> Iterator[TestClient]:
    with client(CheckpointSource(checkpoint, None, SETTINGS, device="cpu")) as connected:
        yield connected


@pytest.fixture(scope="module")
def served(onnx_path: Path) -> Iterator[TestClient]:
    with client(OnnxSource(onnx_path, None)) as connected:
        yield connected


@pytest.mark.parametrize("names", [None, "bird", "bird,cat"])
def test_its_answers_are_those_of_torch(
    served: TestClient, torch: TestClient, names: str | None
) -> None:
    query = {} if names is None else {"categories": names}
    ours, theirs = (
        side.post("/predict", params=query, content=PNG).json() for side in (served, torch)
    )
    assert_alike(ours, theirs)
    maps = []
    for side in (served, torch):
        answer = side.post("/predict", params={**query, "labels": "png"}, content=PNG)
        with Image.open(io.BytesIO(answer.content)) as image:
            maps.append(np.array(image))
    assert (maps[0] == maps[1]).mean() >= 0.999


def test_names_that_the_file_has_not_are_refused(served: TestClient, onnx_path: Path) -> None:
    answer = served.post("/predict?categories=cat,zebra", content=PNG)
    assert answer.status_code == 400
    assert "'zebra' is not among the network's names: cat, dog, bird" in answer.json()["error"]
    assert onnx_path.name not in answer.text
    assert served.post("/predict?categories=cat", content=PNG).status_code == 200


def test_it_serves_some_of_the_names(onnx_path: Path) -> None:
    with client(OnnxSource(onnx_path, ["dog"])) as connected:
        assert connected.get("/categories").json() == {"categories": [{"id": 1, "name": "dog"}]}
        names = [
            item["name"] for item in connected.post("/predict", content=PNG).json()["categories"]
        ]
        assert names == ["dog"]
    with pytest.raises(PipelineError, match="'zebra' is not among its names"):
        OnnxSource(onnx_path, ["zebra"]).load(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_command_serves_where_torch_is_not(
    torch: TestClient, onnx_path: Path, tmp_path: Path, workers: int
) -> None:
    """Nor are there any params."""
    words = ["serve", "--onnx", onnx_path, "--port", 0, "--workers", workers]
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline", *map(str, words)],
        cwd=tmp_path,
        env=environment_without_torch(tmp_path / "without_torch"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            line = process.stdout.readline()
            found = re.search(r"http://127.0.0.1:(\d+)", line)
            assert found, line + process.stdout.read()
            for method, path, body in (("GET", "/health", None), ("POST", "/predict", PNG)):
                connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
                connection.request(method, path, body)
                answer = connection.getresponse()
                assert answer.status == 200
                content = json.loads(answer.read())
            assert_alike(content, torch.post("/predict", content=PNG).json())
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_a_checkpoint_beside_the_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["pipeline", "serve", "--onnx", "z.onnx", "--checkpoint", "models/zutis"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="--onnx: the file is the network; leave --checkpoint out"):
        main()


def test_a_file_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pipeline", "serve", "--onnx", "z.onnx", "--port", "0"])
    with pytest.raises(SystemExit, match=r"--onnx z.onnx: no such file; .*writes one"):
        main()


def test_the_names_are_those_of_the_file(served: TestClient) -> None:
    names = [item["name"] for item in served.get("/categories").json()["categories"]]
    assert names == CATEGORIES
    assert served.get("/health").json() == {"status": "ok", "waiting": 0}
