"""View "predictions": the best, the worst and the most doubtful ones of a benchmark."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pipeline.app.opened import MissingError, Opened
from pipeline.app.pictures import LARGE_SIDE, picture_response
from pipeline.app.predictions import PICTURES, PredictionRow, Predictions
from pipeline.app.site import Pages, Site, choice, number, threshold_of
from pipeline.app.survey import Survey
from pipeline.app.view import View
from pipeline.app.workspace import Workspace
from pipeline.benchmarks.corruptions import BenchImageReader
from pipeline.benchmarks.opening import open_benchmark
from pipeline.errors import PipelineError
from pipeline.formats.shards import MANIFEST
from pipeline.report.inputs import NO_VALUE, is_number, read_object, read_rows, score, to_float
from pipeline.scoring.task import ScoringTask

A_PAGE, CARD_SIDE = 12, 480
SORTS = ("worst", "best", "doubtful")
WAIT_SECONDS = 3.0


class PredictionsView(View):
    """Pages about the predictions of the params' benchmarks."""

    name = "predictions"

    def __init__(self, site: Site, workspace: Workspace) -> None:
        super().__init__(site, workspace)
        self._reports = workspace.paths["reports"]
        self._opened = {name: self._opened_bench(name) for name in workspace.params.benches}
        self._lock = threading.Lock()
        self._surveys: dict[str, tuple[Predictions, Survey[PredictionRow]]] = {}

    def routes(self) -> list[Route]:
        """All addresses of the view."""
        return self._reading(
            {
                "/predictions": self.overview,
                "/predictions/{bench}/{number:int}": self.detail,
                "/pictures/prediction/{bench}/{number:int}/{what}": self.picture,
            }
        )

    def overview(self, request: Request) -> Response:
        """A page of predictions in some order."""
        query = request.query_params
        if not self._opened:
            return self._page("no_bench")
        bench = choice(query, "bench", self._names())
        predictions = self._opened[bench].get()
        survey = self._survey(bench, predictions)
        survey.wait(WAIT_SECONDS)
        rows = survey.rows[:]
        sort = choice(query, "sort", SORTS)
        category = number(query, "category", 0, most=len(predictions.categories))
        chosen = _ordered(rows, sort, category)
        pages = Pages(
            len(chosen),
            A_PAGE,
            number(query, "page", 1),
            {"bench": bench, "sort": sort, "category": category},
        )
        return self._page(
            "predictions",
            bench=bench,
            benches=self._names(),
            sort=sort,
            sorts=SORTS,
            category=category,
            categories=predictions.categories,
            cards=[_card(row, category) for row in chosen[pages.start : pages.end]],
            pages=pages,
            threshold=threshold_of(query),
            version=self._opened[bench].version,
            headline=self._headline(bench),
            per_class=self._per_class(bench),
            num_predictions=len(predictions),
            num_measured=len(rows),
            is_measured=survey.is_done,
        )

    def detail(self, request: Request) -> Response:
        """One prediction from all sides."""
        bench, place = self._known(request), request.path_params["number"]
        facts = self._opened[bench].get().facts(place)
        return self._page(
            "prediction",
            bench=bench,
            number=place,
            threshold=threshold_of(request.query_params),
            version=self._opened[bench].version,
            **facts,
        )

    def picture(self, request: Request) -> Response:
        """A picture of one prediction."""
        bench, what = self._known(request), request.path_params["what"]
        place, query = request.path_params["number"], request.query_params
        if what not in PICTURES:
            raise PipelineError(f"picture {what!r}: expected {', '.join(PICTURES)}")
        side = LARGE_SIDE if "large" in query else CARD_SIDE
        threshold = threshold_of(query) if what == "objects" else 0.0
        opened = self._opened[bench]
        opened.check(query.get("v"))
        predictions = opened.get()
        address = f"{bench}/{opened.version}/{place}/{what}/{threshold:.2f}/{side}"
        make = partial(predictions.draw, place, what, threshold=threshold, side=side)
        return picture_response(partial(self._site.pictures.get, address, make))

    def _opened_bench(self, name: str) -> Opened[Predictions]:
        folder = self._workspace.paths["predictions"] / name
        return Opened(
            [folder / MANIFEST],
            partial(self._open, name),
            stage=f"pipeline predict_bench --bench {name}",
        )

    def _open(self, name: str) -> Predictions:
        params = self._workspace.params
        bench = params.benches[name]
        benchmark = open_benchmark(name, bench, params.background)
        unseen = frozenset(1 + benchmark.categories.index(it) for it in bench.unseen)
        return Predictions(
            self._workspace.paths["predictions"] / name,
            benchmark,
            ScoringTask(benchmark.categories, background=bench.background, unseen=unseen),
            BenchImageReader(
                bench.corruption,
                channels=bench.corruption_channels,
                bench_name=name,
                seed=params.seed,
            ),
        )

    def _names(self) -> list[str]:
        """The benchmarks, those with predictions first."""
        return sorted(self._opened, key=lambda name: not self._opened[name].is_there)

    def _known(self, request: Request) -> str:
        bench = str(request.path_params["bench"])
        if bench not in self._opened:
            raise MissingError(
                f"benches.{bench}: not in params.yaml; there are: {', '.join(self._opened)}"
            )
        return bench

    def _survey(self, bench: str, predictions: Predictions) -> Survey[PredictionRow]:
        """The measurements of these predictions, begun if they are new."""
        with self._lock:
            known = self._surveys.get(bench)
            if known is None or known[0] is not predictions:
                if known is not None:
                    known[1].stop()
                known = predictions, Survey(predictions.rows, len(predictions))
                self._surveys[bench] = known
            return known[1]

    def _headline(self, bench: str) -> dict[str, str]:
        """Scores of the whole benchmark, as the stage `score` wrote them."""
        path = self._reports / "metrics" / f"{bench}.json"
        metrics = read_object(path) if path.is_file() else {}
        named = {"miou": "mIoU", "ap50": "AP50", "baseline_miou": "dense labels alone, mIoU"}
        return {
            title: score(metrics[key])
            for key, title in named.items()
            if is_number(metrics.get(key))
        }

    def _per_class(self, bench: str) -> list[dict[str, Any]]:
        """IoU of each category, the worst first, as the stage `score` wrote it."""
        path = self._reports / "plots" / f"{bench}_per_class.csv"
        rows = read_rows(path) if path.is_file() else []
        named = [(row.get("category") or "", to_float(row.get("iou"))) for row in rows]
        return [
            {"name": name, "iou": "" if math.isnan(iou) else f"{iou:.1f}", "share": iou}
            for name, iou in sorted(named, key=lambda it: math.inf if math.isnan(it[1]) else it[1])
        ]


def _ordered(rows: Sequence[PredictionRow], sort: str, category: int) -> list[PredictionRow]:
    """Rows that show a category, or any at all, by how good they are; unscored ones are left out.

    Args:
        rows: all of them.
        sort: one of `SORTS`.
        category: label id of the category by whose IoU they are sorted; 0 for the mean of all.
    """

    def worth(row: PredictionRow) -> float:
        if sort == "doubtful":
            return row.certainty
        return row.iou.get(category, math.nan) if category else row.miou

    shown = [
        row
        for row in rows
        if not math.isnan(worth(row))
        and (category in row.iou if category else any(label_id > 0 for label_id in row.iou))
    ]
    return sorted(
        shown, key=lambda row: (-worth(row) if sort == "best" else worth(row), row.number)
    )


def _card(row: PredictionRow, category: int) -> dict[str, Any]:
    return {
        "number": row.number,
        "image_id": row.image_id,
        "miou": score(100 * row.miou),
        "iou": score(100 * row.iou[category]) if category else "",
        "certainty": NO_VALUE if math.isnan(row.certainty) else f"{row.certainty:.2f}",
        "num_objects": row.num_objects,
    }
