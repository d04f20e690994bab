"""View "try": a photo, any names, and what the network makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import unquote

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.app.site import Site, disk_faults_named, read_body, status_of, threshold_of
from pipeline.app.trial import (
    MAX_PIXELS,
    Trial,
    Trials,
    coco_file,
    labels_file,
    overlay_file,
    picture_file,
)
from pipeline.app.view import View
from pipeline.app.workspace import Workspace
from pipeline.errors import PipelineError
from pipeline.vocabulary.categories import join_names, split_names

MAX_UPLOAD_BYTES = 32 * 2**20
NAMES_HEADER = "x-names"
PICTURES = ("objects", "semantic", "image")
FILES = {
    "overlay.png": "image/png",
    "labels.png": "image/png",
    "coco.json": "application/json",
}


class TryView(View):
    """The page, the upload, and pictures and files of what came out."""

    name = "try"

    def __init__(self, site: Site, workspace: Workspace) -> None:
        super().__init__(site, workspace)
        self._trials = Trials(workspace)

    def routes(self) -> list[Route]:
        """All addresses of the view."""
        pages = self._reading(
            {
                "/try": self.page,
                "/try/{token}/confidence": self.confidence,
                "/try/{token}/pictures/{what}": self.picture,
                "/try/{token}/files/{name}": self.file,
            }
        )
        return [*pages, Route("/try", self.upload, methods=["POST"])]

    def page(self, request: Request) -> Response:
        """Where a photo is dropped."""
        del request
        return self._page(
            "try",
            names=join_names(self._workspace.categories),
            max_mb=MAX_UPLOAD_BYTES // 2**20,
            max_megapixels=MAX_PIXELS // 10**6,
            checkpoint=str(self._workspace.checkpoint),
            is_trained=self._trials.is_trained,
        )

    async def upload(self, request: Request) -> Response:
        """Segment the photo in the body by the names in a header."""
        try:
            data = await read_body(request, MAX_UPLOAD_BYTES)
            names = _names(unquote(request.headers.get(NAMES_HEADER, "")))
            with disk_faults_named():
                trial = await run_in_threadpool(self._trials.segment, data, names)
        except PipelineError as error:
            return JSONResponse({"error": str(error)}, status_of(error))
        return JSONResponse(_described(trial))

    def picture(self, request: Request) -> Response:
        """A picture of a photo that was tried."""
        trial, what = self._trial(request), request.path_params["what"]
        if what not in PICTURES:
            raise PipelineError(f"picture {what!r}: expected {', '.join(PICTURES)}")
        data = picture_file(trial, what, threshold_of(request.query_params))
        return Response(data, media_type="image/jpeg")

    def confidence(self, request: Request) -> Response:
        """How sure the network is of one name, pixel by pixel."""
        name = request.query_params.get("name", "")
        data = self._trials.confidence(self._trial(request), name)
        return Response(data, media_type="image/png")

    def file(self, request: Request) -> Response:
        """A file to keep."""
        trial, name = self._trial(request), request.path_params["name"]
        if name not in FILES:
            raise PipelineError(f"file {name!r}: expected {', '.join(FILES)}")
        threshold = threshold_of(request.query_params)
        makers = {
            "overlay.png": partial(overlay_file, trial, threshold),
            "labels.png": partial(labels_file, trial),
            "coco.json": partial(coco_file, trial, threshold),
        }
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(makers[name](), media_type=FILES[name], headers=headers)

    def _trial(self, request: Request) -> Trial:
        return self._trials.get(str(request.path_params["token"]))


def _names(text: str) -> list[str]:
    """Names between commas or on lines of their own; see `split_names`."""
    return [
        name.strip()
        for line in text.splitlines()
        for name in split_names(line, "names")
        if name.strip()
    ]


def _described(trial: Trial) -> Mapping[str, Any]:
    """What the script shows of a photo besides pictures."""
    labels = trial.prediction.semantic
    values, counts = np.unique(labels, return_counts=True)
    names = ["background", *trial.prediction.categories]
    return {
        "token": trial.token,
        "width": trial.image.width,
        "height": trial.image.height,
        "original": list(trial.original_size),
        "names": trial.prediction.categories,
        "present": [
            {"name": names[value], "label_id": value, "share": count / labels.size}
            for value, count in sorted(
                zip(values.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1]
            )
        ],
        "objects": [
            {"name": names[item.label_id], "label_id": item.label_id, "score": item.score}
            for item in trial.prediction.instances
        ],
    }
