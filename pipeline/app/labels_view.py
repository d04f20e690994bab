"""View "masks and labels": pseudo-labels sorted by disagreement, accepted or rejected."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.app.opened import Opened
from pipeline.app.pictures import THUMB_SIDE, picture_response
from pipeline.app.review_book import Changes, ReviewBook, listed
from pipeline.app.samples import PICTURES, SampleRow, Samples
from pipeline.app.site import Pages, Site, choice, number
from pipeline.app.survey import Survey
from pipeline.app.view import View
from pipeline.app.workspace import Workspace
from pipeline.errors import PipelineError
from pipeline.formats.labels import IGNORE_INDEX
from pipeline.formats.review import ACCEPT, LABEL_VERDICTS, REJECT, Decision, Review
from pipeline.formats.shards import MANIFEST
from pipeline.report.inputs import NO_VALUE

A_PAGE, PANE_SIDE = 24, 640
SORTS = ("disagreement", "order")
FILTERS = ("open", ACCEPT, REJECT, "all")
WAIT_SECONDS = 3.0


class LabelsView(View):
    """Pages and actions about pseudo-masks and dense labels."""

    name = "labels"

    def __init__(self, site: Site, workspace: Workspace) -> None:
        super().__init__(site, workspace)
        masks_dir, labels_dir = workspace.paths["masks"], workspace.paths["labels"]
        self._categories = list(workspace.categories)
        self._book = ReviewBook(workspace.paths["review_labels"], LABEL_VERDICTS)
        self._samples: Opened[Samples] = Opened(
            [masks_dir / MANIFEST],
            partial(Samples, masks_dir, labels_dir, self._categories),
            stage="pipeline mask",
        )
        self._labelled: Opened[Samples] = Opened(
            [masks_dir / MANIFEST, labels_dir / MANIFEST],
            partial(Samples, masks_dir, labels_dir, self._categories),
            stage="pipeline pseudo_label",
        )
        self._lock = threading.Lock()
        self._surveyed: tuple[Samples, Survey[SampleRow]] | None = None

    def routes(self) -> list[Route]:
        """All addresses of the view."""
        pages = self._reading(
            {
                "/labels": self.overview,
                "/labels/facts/{number:int}": self.facts,
                "/pictures/sample/{number:int}/{what}": self.picture,
            }
        )
        return pages + self._posting({"/labels/change": self.change, "/labels/undo": self.undo})

    def overview(self, request: Request) -> Response:
        """A page of samples, one of which is looked at closely."""
        opened = self._newest()
        samples = opened.get()
        survey, review, query = self._survey(samples), self._book.read(), request.query_params
        survey.wait(WAIT_SECONDS)
        rows = survey.rows[:]
        sort = choice(query, "sort", SORTS)
        verdict = choice(query, "verdict", FILTERS)
        category = number(query, "category", -1, most=len(self._categories))
        chosen = self._chosen(samples, rows, review, category=category, verdict=verdict)
        if sort == "disagreement":
            chosen.sort(key=lambda place: (-_known(rows[place].disagreement), place))
        chosen_query = {"sort": sort, "verdict": verdict, "category": category}
        pages = Pages(len(chosen), A_PAGE, number(query, "page", 1), chosen_query)
        shown = chosen[pages.start : pages.end]
        items = [self._item(samples, place, rows[place], review) for place in shown]
        decided = [decision.verdict for decision in review.values()]
        return self._page(
            "labels",
            items=items,
            pages=pages,
            sort=sort,
            sorts=SORTS,
            verdict=verdict,
            filters=FILTERS,
            category=category,
            categories=self._categories,
            version=opened.version,
            has_labels=any(map(samples.has_label, shown)) if shown else samples.has_labels,
            num_samples=len(samples),
            num_measured=len(rows),
            is_measured=survey.is_done,
            num_accepted=decided.count(ACCEPT),
            num_rejected=decided.count(REJECT),
        )

    def facts(self, request: Request) -> Response:
        """What is known of one sample, for the script."""
        samples, _ = self._asked(request.query_params.get("v"))
        found = samples.facts(request.path_params["number"])
        names = {IGNORE_INDEX: "ignored", 0: "background", **dict(enumerate(self._categories, 1))}
        present = sorted(found.present.items(), key=lambda pair: -pair[1])
        return JSONResponse(
            {
                "rank": found.facts.get("rank"),
                "similarity": found.facts.get("similarity"),
                "file": found.facts.get("path"),
                "objects": found.num_objects,
                "has_mask": found.has_mask,
                "present": [
                    {"label_id": label_id, "name": names.get(label_id, "?"), "share": share}
                    for label_id, share in present
                    if share >= 0.005
                ],
            }
        )

    def picture(self, request: Request) -> Response:
        """A picture of one sample."""
        samples, version = self._asked(request.query_params.get("v"))
        place, what = request.path_params["number"], request.path_params["what"]
        if what not in PICTURES:
            raise PipelineError(f"picture {what!r}: expected {', '.join(PICTURES)}")
        side = PANE_SIDE if "large" in request.query_params else THUMB_SIDE
        make = partial(samples.draw, place, what, side)
        address = f"sample/{version}/{place}/{what}/{side}"
        return picture_response(partial(self._site.pictures.get, address, make))

    def change(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Accept or reject the labels of one sample, or take that back."""
        place, verdict = body.get("number"), body.get("verdict")
        samples, _ = self._asked(body.get("version"))
        if type(place) is not int or not 0 <= place < len(samples):
            raise PipelineError("no such sample; load the page again")
        if verdict not in (*LABEL_VERDICTS, None):
            raise PipelineError(f"verdict {verdict!r}: expected {' or '.join(LABEL_VERDICTS)}")
        facts = samples.facts(place).facts
        item = samples.item(SampleRow(facts["label_id"], facts["key"], math.nan))
        decision = Decision(verdict, str(facts.get("path", ""))) if verdict else None
        self._book.change({item: decision})
        return self._answer({item: decision})

    def undo(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Undo the last change."""
        del body
        return self._answer(self._book.undo())

    def _answer(self, changes: Changes) -> dict[str, Any]:
        decided = [decision.verdict for decision in self._book.read().values()]
        counts = {"accepted": decided.count(ACCEPT), "rejected": decided.count(REJECT)}
        return {"changes": listed(changes), **counts}

    def _newest(self) -> Opened[Samples]:
        """The samples, with dense labels if there are any."""
        return self._labelled if self._labelled.is_there else self._samples

    def _asked(self, version: object) -> tuple[Samples, str]:
        """The samples and their version, for a page that asks by number; see `Opened.check`."""
        opened = self._newest()
        opened.check(version)
        return opened.get(), opened.version

    def _survey(self, samples: Samples) -> Survey[SampleRow]:
        """The measurements of these samples, begun if they are new."""
        with self._lock:
            if self._surveyed is None or self._surveyed[0] is not samples:
                if self._surveyed is not None:
                    self._surveyed[1].stop()
                self._surveyed = samples, Survey(samples.rows, len(samples))
            return self._surveyed[1]

    def _chosen(
        self,
        samples: Samples,
        rows: Sequence[SampleRow],
        review: Review,
        *,
        category: int,
        verdict: str,
    ) -> list[int]:
        """Numbers of the samples of a category, or of all objects, with some verdict."""
        return [
            place
            for place, row in enumerate(rows)
            if (row.label_id == category if category >= 0 else row.label_id > 0)
            and _fits(review.get(samples.item(row)), verdict)
        ]

    def _item(self, samples: Samples, place: int, row: SampleRow, review: Review) -> dict[str, Any]:
        category, key = samples.item(row)
        decision = review.get(samples.item(row))
        known = not math.isnan(row.disagreement)
        return {
            "number": place,
            "category": category,
            "label_id": row.label_id,
            "key": key,
            "verdict": decision.verdict if decision else "",
            "disagreement": f"{100 * row.disagreement:.0f} %" if known else NO_VALUE,
        }


def _fits(decision: Decision | None, verdict: str) -> bool:
    if verdict == "all":
        return True
    return (decision.verdict if decision else "open") == verdict


def _known(value: float) -> float:
    """A value for sorting, what is unknown last."""
    return -1.0 if math.isnan(value) else value
