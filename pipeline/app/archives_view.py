"""View "archives": strips by category; images are dropped alone or with those that look alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pipeline.app.archive_table import ArchiveTable
from pipeline.app.neighbours import IndexImages
from pipeline.app.opened import Opened
from pipeline.app.pictures import LARGE_SIDE, THUMB_SIDE, picture_response, thumbnail
from pipeline.app.review_book import Changes, ReviewBook, listed
from pipeline.app.site import Pages, Site, choice, number
from pipeline.app.view import View
from pipeline.app.workspace import Workspace
from pipeline.errors import PipelineError
from pipeline.formats.images import load_image
from pipeline.formats.review import ARCHIVE_VERDICTS, DROP, NEGATIVES, Decision, Review, Reviewed
from pipeline.formats.shards import KEY, MANIFEST
from pipeline.formats.sources import ImageLocation, image_name, read_image
from pipeline.formats.tables import ArchiveRow
from pipeline.report.inputs import NO_VALUE, to_float
from pipeline.report.purity import PURITY_COLUMNS, read_purity

STRIP, CATEGORIES_A_PAGE, IMAGES_A_PAGE = 12, 20, 60
COUNTS = (6, 12, 24, 48)
SORTS = ("name", "images", *PURITY_COLUMNS)
SCOPES = ("archive", "index")
MAX_CHANGES = 500


@dataclass(frozen=True)
class Card:
    """An image on a page.

    Attributes:
        category, key: what is decided about.
        file: where it lies.
        picture, large: addresses of its pictures.
        rank: in its archive; None outside of it.
        similarity: to the name or, among alike images, to the first one; as text.
        is_dropped: whether it is dropped from the category.
    """

    category: str
    key: str
    file: str
    picture: str
    large: str
    rank: int | None
    similarity: str
    is_dropped: bool


class ArchivesView(View):
    """Pages and actions about archives."""

    name = "archives"

    def __init__(self, site: Site, workspace: Workspace) -> None:
        super().__init__(site, workspace)
        paths = workspace.paths
        self._stats_dir = paths["stats"]
        self._categories = list(workspace.categories)
        self._book = ReviewBook(paths["review_archives"], ARCHIVE_VERDICTS)
        self._table: Opened[ArchiveTable] = Opened(
            [paths["archives"]],
            partial(ArchiveTable, paths["archives"]),
            stage="pipeline retrieve",
        )
        folders = [paths["embeddings"] / name for name in workspace.params.index]
        self._index: Opened[IndexImages] = Opened(
            [folder / MANIFEST for folder in folders],
            partial(IndexImages, folders),
            stage="pipeline embed",
        )

    def routes(self) -> list[Route]:
        """All addresses of the view."""
        pages = self._reading(
            {
                "/archives": self.overview,
                "/archives/{label_id:int}": self.archive,
                "/archives/{label_id:int}/alike": self.alike,
                "/pictures/archive/{row:int}": self.row_picture,
                "/pictures/index/{key}": self.index_picture,
            }
        )
        return pages + self._posting({"/archives/change": self.change, "/archives/undo": self.undo})

    def overview(self, request: Request) -> Response:
        """Every category with the beginning of its archive."""
        table, review = self._table.get(), self._book.read()
        query = request.query_params
        sort = choice(query, "sort", SORTS)
        dropped = _count_by_category(review)
        entries = _sorted(self._entries(table, dropped), sort)
        pages = Pages(len(entries), CATEGORIES_A_PAGE, number(query, "page", 1), {"sort": sort})
        shown = entries[pages.start : pages.end]
        numbers = [place for entry in shown for place in entry["places"][:STRIP]]
        cards = dict(zip(numbers, self._cards(table, numbers, review), strict=True))
        for entry in shown:
            entry["cards"] = [cards[place] for place in entry["places"][:STRIP]]
        return self._page(
            "archives",
            entries=shown,
            pages=pages,
            sort=sort,
            sorts=SORTS,
            columns=PURITY_COLUMNS,
            num_images=sum(map(len, table.places.values())),
            num_dropped=len(review),
        )

    def archive(self, request: Request) -> Response:
        """The images of one archive."""
        table, review = self._table.get(), self._book.read()
        label_id, category = self._named(table, request)
        places = table.places[label_id]
        pages = Pages(len(places), IMAGES_A_PAGE, number(request.query_params, "page", 1), {})
        cards = self._cards(table, places[pages.start : pages.end], review)
        shown = {card.key for card in cards}
        keys = {row.key for row in table.rows(places)}
        others = {
            item: decision
            for item, decision in review.items()
            if item.category == category and item.key not in shown
        }
        entry = next(
            it
            for it in self._entries(table, _count_by_category(review))
            if it["label_id"] == label_id
        )
        return self._page(
            "archive",
            label_id=label_id,
            category=category,
            entry=entry,
            columns=PURITY_COLUMNS,
            cards=cards,
            others=self._dropped_cards(others),
            num_pending=sum(Reviewed(category, key) in review for key in keys),
            pages=pages,
        )

    def alike(self, request: Request) -> Response:
        """Images that look like one, to be dropped together; nothing is dropped yet."""
        table, review, query = self._table.get(), self._book.read(), request.query_params
        label_id, category = self._named(table, request)
        key = _checked_key(query.get("key", ""))
        count = number(query, "count", COUNTS[1], least=1, most=COUNTS[-1])
        scope = choice(query, "scope", SCOPES)
        rows = table.rows(table.places[label_id])
        ranks = {row.key: row.rank for row in rows}
        images = self._index.get()
        found = images.like(key, count, list(ranks) if scope == "archive" else None)
        seed = self._index_card(images.image(key), category, review, ranks.get(key), "")
        cards = [
            self._index_card(
                it.image, category, review, ranks.get(it.image.key), f"{it.similarity:.3f}"
            )
            for it in found
        ]
        return self._page(
            "alike",
            label_id=label_id,
            category=category,
            seed=seed,
            cards=cards,
            count=count,
            count_options=[(str(it), str(it)) for it in COUNTS],
            scope=scope,
        )

    def row_picture(self, request: Request) -> Response:
        """Picture of a row of the archives."""
        self._table.check(request.query_params.get("v"))
        table, side = self._table.get(), _side(request)
        rows = table.rows([request.path_params["row"]])
        if not rows:
            raise PipelineError("no such image; load the page again")
        address = f"archive/{self._table.version}/{request.path_params['row']}/{side}"
        return self._picture(address, rows[0], side)

    def index_picture(self, request: Request) -> Response:
        """Picture of an image of the index."""
        key, side = _checked_key(request.path_params["key"]), _side(request)
        return self._picture(
            f"index/{self._index.version}/{key}/{side}", self._index.get().image(key), side
        )

    def change(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Drop images of a category, or take them back."""
        category, verdict, images = (body.get(name) for name in ("category", "verdict", "images"))
        known = [NEGATIVES, *self._categories]
        if category not in known or verdict not in (DROP, None) or not isinstance(images, list):
            raise PipelineError("not a change to archives; load the page again")
        if not 0 < len(images) <= MAX_CHANGES:
            raise PipelineError(f"{len(images)} images at once, at most {MAX_CHANGES}")
        keys = [_checked_key(key) for key in images]
        files = self._files(keys)
        changes: dict[Reviewed, Decision | None] = {
            Reviewed(str(category), key): Decision(DROP, files.get(key, "")) if verdict else None
            for key in keys
        }
        self._book.change(changes)
        return self._answer(changes)

    def undo(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Undo the last change."""
        del body
        return self._answer(self._book.undo())

    def _answer(self, changes: Changes) -> dict[str, Any]:
        """What the script needs to show changes."""
        return {"changes": listed(changes), "total": len(self._book.read())}

    def _named(self, table: ArchiveTable, request: Request) -> tuple[int, str]:
        label_id = request.path_params["label_id"]
        if label_id not in table.places:
            raise PipelineError(f"archive {label_id}: there is none; run `pipeline retrieve` again")
        return label_id, table.rows(table.places[label_id][:1])[0].category

    def _entries(self, table: ArchiveTable, dropped: Mapping[str, int]) -> list[dict[str, Any]]:
        """What is known of every archive, the negatives last."""
        measured = read_purity(self._stats_dir, self._categories)
        cells = {row["name"]: row["cells"] for row in measured}
        unknown = [NO_VALUE] * len(PURITY_COLUMNS)
        firsts = [places[0] for places in table.places.values()]
        names = [row.category for row in table.rows(firsts)]
        entries = [
            {
                "label_id": label_id,
                "name": name,
                "places": places,
                "images": len(places),
                "dropped": dropped.get(name, 0),
                "cells": dict(zip(PURITY_COLUMNS, cells.get(name, unknown), strict=True)),
            }
            for (label_id, places), name in zip(table.places.items(), names, strict=True)
        ]
        return sorted(entries, key=lambda entry: entry["label_id"] == 0)

    def _cards(self, table: ArchiveTable, places: Sequence[int], review: Review) -> list[Card]:
        version = self._table.version
        return [
            Card(
                category=row.category,
                key=row.key,
                file=image_name(row),
                picture=f"/pictures/archive/{place}?v={version}",
                large=f"/pictures/archive/{place}?v={version}&large=1",
                rank=row.rank,
                similarity=_similarity(row),
                is_dropped=Reviewed(row.category, row.key) in review,
            )
            for place, row in zip(places, table.rows(places), strict=True)
        ]

    def _dropped_cards(self, review: Review) -> list[Card]:
        """Images that were dropped and are in the archive no more, as far as they can be shown."""
        address = "/pictures/index/{}?v=" + (self._index.version if self._index.is_there else "")
        return [
            Card(
                category=item.category,
                key=item.key,
                file=decision.file,
                picture=address.format(item.key),
                large=address.format(item.key) + "&large=1",
                rank=None,
                similarity="",
                is_dropped=True,
            )
            for item, decision in list(review.items())[:IMAGES_A_PAGE]
        ]

    def _index_card(
        self, image: Any, category: str, review: Review, rank: int | None, similarity: str
    ) -> Card:
        address = f"/pictures/index/{image.key}?v={self._index.version}"
        return Card(
            category=category,
            key=image.key,
            file=image_name(image),
            picture=address,
            large=address + "&large=1",
            rank=rank,
            similarity=similarity,
            is_dropped=Reviewed(category, image.key) in review,
        )

    def _picture(self, address: str, image: ImageLocation, side: int) -> Response:
        def make() -> bytes:
            return thumbnail(load_image(read_image(image)), side)

        return picture_response(partial(self._site.pictures.get, address, make))

    def _files(self, keys: Sequence[str]) -> dict[str, str]:
        """Where images of the index lie, by key."""
        if not self._index.is_there:
            return {}
        return {key: image_name(image) for key, image in self._index.get().images(keys).items()}


def _checked_key(key: object) -> str:
    if not isinstance(key, str) or not KEY.fullmatch(key):
        raise PipelineError("not the key of an image; load the page again")
    return key


def _side(request: Request) -> int:
    return LARGE_SIDE if "large" in request.query_params else THUMB_SIDE


def _similarity(row: ArchiveRow) -> str:
    return "" if math.isnan(row.similarity) else f"{row.similarity:.3f}"


def _count_by_category(review: Review) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in review:
        counts[item.category] = counts.get(item.category, 0) + 1
    return counts


def _sorted(entries: list[dict[str, Any]], sort: str) -> list[dict[str, Any]]:
    """By name in the order of the params, else the worst first: few images, low purity."""
    if sort == "name":
        return entries
    sign = -1 if sort == "components" else 1

    def worth(entry: Mapping[str, Any]) -> float:
        value = entry["images"] if sort == "images" else to_float(entry["cells"][sort])
        return math.inf if math.isnan(value) else sign * value

    return sorted(entries, key=worth)
