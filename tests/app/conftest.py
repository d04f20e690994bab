"""A workspace in which all stages have run on a few images, and the app over it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("starlette", reason="the extra `app` is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

from starlette.testclient import TestClient

from pipeline.app.web import create_app
from pipeline.app.workspace import Workspace
from pipeline.engine.runtime import Runtime
from pipeline.files import write_json
from pipeline.formats.review import write_review
from pipeline.params.reading import parse_params
from tests.stages.tiny_checkpoint import CATEGORIES
from tests.stages.tiny_workspace import write_workspace

FOLDERS = {
    "archives": "archives.parquet",
    "embeddings": "embeddings",
    "masks": "masks/made",
    "labels": "labels/made",
    "predictions": "predictions",
    "reports": "reports",
    "stats": "reports/stats",
    "review_archives": "data/review/archives.csv",
    "review_labels": "data/review/labels.csv",
}


@dataclass(frozen=True)
class Made:
    """A workspace and what a browser would hold of its app.

    Attributes:
        root: the folder.
        client: asks the app.
    """

    root: Path
    client: TestClient

    def page(self, address: str, status: int = 200) -> str:
        """The text of a page."""
        response = self.client.get(address)
        assert response.status_code == status, response.text
        return response.text

    def post(self, address: str, body: Any, status: int = 200, **headers: str) -> dict[str, Any]:
        """What the app answers to a script."""
        response = self.client.post(address, json=body, headers=self.headers | headers)
        assert response.status_code == status, response.text
        answer: dict[str, Any] = response.json()
        return answer

    @property
    def headers(self) -> dict[str, str]:
        """What a script of a page sends along."""
        found = re.search(r'name="csrf-token" content="([^"]+)"', self.page("/try"))
        assert found
        return {"X-CSRF-Token": found.group(1)}

    def review(self, name: str) -> list[str]:
        """The lines of a file of decisions."""
        return (self.root / "data/review" / f"{name}.csv").read_text().splitlines()[1:]


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_clip: tuple[Path, Path]
) -> tuple[Path, tuple[Path, Path]]:
    """A workspace that nobody writes to, and its encoder."""
    root = tmp_path_factory.mktemp("app") / "workspace"
    workspace = write_workspace(root, tiny_clip, index=24, bench=5)
    workspace.run("pseudo_label", root / "labels")
    workspace.run("predict_bench", root / "predictions")
    (root / "predictions/made").rename(root / "predictions/tiny")
    write_json(root / "reports/metrics/tiny.json", {"n_images": 5, "miou": 12.5})
    plots = root / "reports/plots/tiny_per_class.csv"
    plots.parent.mkdir()
    plots.write_text("category,iou\nbackground,50.0\ncat,3.0\ndog,\nbird,20.0\n")
    stats = {"categories": {"cat": {"similarity": 0.5}, "dog": {"similarity": 0.25}}}
    write_json(root / "reports/stats/retrieve.json", stats)
    return root, tiny_clip


@pytest.fixture
def make(finished: tuple[Path, tuple[Path, Path]], tmp_path: Path) -> Callable[..., Made]:
    """Function that copies the workspace, without some of its parts, and starts the app."""

    def start(*without: str, benches: dict[str, Any] | None = None, **options: Any) -> Made:
        source, clip = finished
        root = tmp_path / "copy"
        shutil.copytree(source, root)
        for name in without:
            path = root / name
            path.unlink() if path.is_file() else shutil.rmtree(path)
        for name in ("archives", "labels"):
            write_review(root / f"data/review/{name}.csv", {})
        encoder = dict(zip(("model", "pretrained"), map(str, clip), strict=True))
        bench = {"format": "voc", "root": str(root / "voc"), "categories": CATEGORIES}
        params = parse_params(
            {
                "categories": CATEGORIES,
                "index": {"made": {"root": str(root / "images")}},
                "embed": {"encoder": encoder},
                "benches": {"tiny": bench} if benches is None else benches,
            }
        )
        runtime = Runtime(
            device=torch.device("cpu"), amp_dtype=None, seed=0, cache_dir=tmp_path / "cache"
        )
        workspace = Workspace(
            name="<b>tiny</b>",
            params=params,
            categories=CATEGORIES,
            paths={name: root / path for name, path in FOLDERS.items()},
            checkpoint=root / "zutis",
            runtime=lambda: runtime,
        )
        client = TestClient(create_app(workspace, **options), base_url="http://localhost:7861")
        return Made(root, client)

    return start


@pytest.fixture
def made(make: Callable[..., Made]) -> Made:
    """The whole workspace."""
    return make()
