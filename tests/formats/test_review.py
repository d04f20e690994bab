"""Files of decisions: what is read, written, and refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.formats.review import (
    ARCHIVE_VERDICTS,
    LABEL_VERDICTS,
    Decision,
    LabelReview,
    Reviewed,
    read_review,
    write_review,
)
from tests.paths import ROOT

HEADER = "category,key,verdict,file\n"


def test_what_is_written_is_read_and_sorted(tmp_path: Path) -> None:
    path = tmp_path / "new" / "labels.csv"
    review = {
        Reviewed("dog", "0b"): Decision("reject", 'a "b", c/ü.jpg'),
        Reviewed("cat, wild", "0b"): Decision("accept"),
        Reviewed("cat, wild", "0a"): Decision("reject", "two\nlines.jpg"),
    }
    write_review(path, review)
    assert read_review(path, LABEL_VERDICTS) == review
    assert [item.key for item in read_review(path, LABEL_VERDICTS)] == ["0a", "0b", "0b"]
    before = path.read_bytes()
    write_review(path, dict(reversed(review.items())))
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["archives.csv", "labels.csv"])
def test_a_fresh_clone_has_nothing_but_the_header(name: str) -> None:
    assert (ROOT / "data/review" / name).read_text() == HEADER


@pytest.mark.parametrize("content", [None, b"", HEADER.encode(), HEADER.encode() + b"\n\n"])
def test_nothing_decided(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "archives.csv"
    if content is not None:
        path.write_bytes(content)
    assert read_review(path, ARCHIVE_VERDICTS) == {}


def test_as_other_programs_save_it(tmp_path: Path) -> None:
    path = tmp_path / "archives.csv"
    path.write_bytes("\ufeffcategory,key,verdict,file\r\nkäfer,a1,drop,x.jpg\r\n".encode())
    assert read_review(path, ARCHIVE_VERDICTS) == {
        Reviewed("käfer", "a1"): Decision("drop", "x.jpg")
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"category,key\n", r"line 1: expected the header category,key,verdict,file"),
        (HEADER.encode() + b"cat,a1,drop\n", r"line 2: 3 fields, expected category,key"),
        (HEADER.encode() + b"cat,a1,drop,x\n,a2,drop,x\n", r"line 3: the category is empty"),
        (HEADER.encode() + b"cat,../a,drop,x\n", r"line 2: '../a' is no sample key"),
        (HEADER.encode() + b"cat,a1,reject,x\n", r"line 2: verdict 'reject', expected drop"),
        (HEADER.encode() + b"cat,a1,drop,\n\ncat,a1,drop,\n", r"line 4: .* in line 2 already"),
        (HEADER.encode() + b'cat,a1,drop,"x\n', r"line 2: unexpected end of data"),
        (HEADER.encode() + b"cat,a1,drop,\xff\n", r"line 2: not UTF-8"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "archives.csv"
    path.write_bytes(content)
    with pytest.raises(PipelineError, match=message) as caught:
        read_review(path, ARCHIVE_VERDICTS)
    assert str(caught.value).startswith(f"{path}: line ")
    assert "\n" not in str(caught.value)


def test_labels_are_decided_by_category_and_image() -> None:
    review = {
        Reviewed("cat", "a"): Decision("reject"),
        Reviewed("dog", "a"): Decision("accept"),
        Reviewed("background", "n"): Decision("reject"),
        Reviewed("dog", "b"): Decision("reject"),
        Reviewed("cow", "a"): Decision("reject"),
    }
    found = LabelReview(review, ["a_1", "a_2", "b_1", "n_0"], ["cat", "dog"])
    assert found.rejected == {0, 3}
    assert found.unknown == [Reviewed("dog", "b"), Reviewed("cow", "a")]
    assert found.counts == {"rejected": 2, "unknown_reviews": 2}
    assert len(found.warnings) == 1
    assert "dog b, cow a" in found.warnings[0]
    assert LabelReview({}, ["a_1"], ["cat"]).counts == {}
    assert LabelReview({}, ["a_1"], ["cat"]).warnings == []
