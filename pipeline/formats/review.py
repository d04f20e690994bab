"""What a person has decided about archive images: two small CSV files, kept in git.

`data/review/archives.csv` lists images that are to be in no archive of a category (verdict `drop`),
`data/review/labels.csv` what was thought of an image's pseudo-labels (`accept`, `reject`). Columns:

category  name, or `background` for the negatives
key       sample key of the image
verdict   see above
file      the image, for people; nothing reads it

A file that is missing, empty or has the header alone says nothing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import PipelineError, listing
from pipeline.files import write_bytes
from pipeline.formats.shards import KEY

HEADER = ("category", "key", "verdict", "file")
DROP, ACCEPT, REJECT = "drop", "accept", "reject"
ARCHIVE_VERDICTS, LABEL_VERDICTS = (DROP,), (ACCEPT, REJECT)
NEGATIVES = "background"  # what archive 0 is called


class Reviewed(NamedTuple):
    """An image in one category's archive."""

    category: str
    key: str


@dataclass(frozen=True)
class Decision:
    """What was decided about one image of one category.

    Attributes:
        verdict: one of `ARCHIVE_VERDICTS` or of `LABEL_VERDICTS`.
        file: where the image lies, for people.
    """

    verdict: str
    file: str = ""


Review = Mapping[Reviewed, Decision]


def read_review(path: Path, verdicts: Collection[str]) -> dict[Reviewed, Decision]:
    """The decisions of a file, in its order; none where it is missing.

    Args:
        path: the CSV file.
        verdicts: those that it may hold.

    Raises:
        PipelineError: a line is malformed, or about an image that an earlier one is about; the
            message names the line.
    """
    found: dict[Reviewed, Decision] = {}
    lines: dict[Reviewed, int] = {}
    for number, row in _rows(path):
        if len(row) != len(HEADER):
            raise _wrong(path, number, f"{len(row)} fields, expected {','.join(HEADER)}")
        category, key, verdict, file = row
        item = Reviewed(category, key)
        if not category:
            raise _wrong(path, number, "the category is empty")
        if not KEY.fullmatch(key):
            raise _wrong(path, number, f"{key!r} is no sample key")
        if verdict not in verdicts:
            raise _wrong(path, number, f"verdict {verdict!r}, expected {' or '.join(verdicts)}")
        if item in found:
            raise _wrong(path, number, f"{category}, {key} stands in line {lines[item]} already")
        found[item], lines[item] = Decision(verdict, file), number
    return found


def write_review(path: Path, review: Review) -> None:
    """Write decisions atomically, sorted by category and key."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for item in sorted(review):
        writer.writerow([*item, review[item].verdict, review[item].file])
    write_bytes(path, text.getvalue().encode())


def unknown_warning(path: Path | str, unknown: Sequence[Reviewed], where: str) -> str:
    """The warning about lines that name nothing that is there.

    Args:
        path: the file, or its name.
        unknown: what it names in vain.
        where: where that was looked for.
    """
    named = listing([f"{category} {key}" for category, key in unknown], 3)
    return f"{path}: {len(unknown)} of its lines name no image of {where}: {named}; remove them"


class LabelReview:
    """Decisions about labels, set against the samples of mask shards.

    Args:
        review: the decisions.
        sample_keys: `KEY_LABEL` of each sample.
        categories: names by label id from 1.

    Attributes:
        rejected: numbers of the samples whose labels are rejected.
        unknown: decisions about what is no sample.
    """

    def __init__(
        self, review: Review, sample_keys: Sequence[str], categories: Sequence[str]
    ) -> None:
        self._is_empty = not review
        self.rejected: set[int] = set()
        names = {str(label_id): name for label_id, name in enumerate([NEGATIVES, *categories])}
        unknown = dict(review)
        for number, sample_key in enumerate(sample_keys if review else ()):
            key, _, label_id = sample_key.rpartition("_")
            decision = unknown.pop(Reviewed(names.get(label_id, ""), key), None)
            if decision and decision.verdict == REJECT:
                self.rejected.add(number)
        self.unknown = list(unknown)

    @property
    def counts(self) -> dict[str, int]:
        """What training counts of them; nothing where nothing was decided."""
        if self._is_empty:
            return {}
        return {"rejected": len(self.rejected), "unknown_reviews": len(self.unknown)}

    @property
    def warnings(self) -> list[str]:
        """What training warns of."""
        if not self.unknown:
            return []
        return [unknown_warning("the review of labels", self.unknown, "the archives")]


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each line after the header; blank lines are passed over."""
    try:
        text = path.read_bytes().decode("utf-8-sig") if path.is_file() else ""
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise _wrong(path, line, "not UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    is_first = True
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise _wrong(path, reader.line_num, str(error)) from None
        if row is None:
            return
        if is_first and tuple(row) != HEADER:
            raise _wrong(path, 1, f"expected the header {','.join(HEADER)}")
        if row and not is_first:
            yield reader.line_num, row
        is_first = False


def _wrong(path: Path, line: int, problem: str) -> PipelineError:
    return PipelineError(f"{path}: line {line}: {problem}; mend or remove the line")
