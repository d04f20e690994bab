"""Parts of the app that large workspaces rest on: pages of shards, bounded caches, locks."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.files import claim
from pipeline.formats.review import Decision, Reviewed, read_review
from tests.formats.shard_folders import write_shards

pytest.importorskip("starlette", reason="the extra `app` is not installed")

from pipeline.app.guard import is_loopback
from pipeline.app.paged_shards import OPEN_SHARDS, PagedShards
from pipeline.app.pictures import PictureCache
from pipeline.app.review_book import ReviewBook
from pipeline.app.site import number as number_of
from pipeline.app.survey import Survey


def test_any_sample_of_many_shards(tmp_path: Path) -> None:
    count = 3 * (OPEN_SHARDS + 4) - 1
    samples = [{"__key__": f"k{it}", "txt": str(it).encode()} for it in range(count)]
    write_shards(samples, tmp_path / "shards", shard_size=3)
    found = PagedShards(tmp_path / "shards")
    assert len(found) == count
    for number in [*range(count), 0, count - 1, 7]:
        assert found.key(number) == f"k{number}"
        assert found.member(number, "txt") == str(number).encode()
    for number in (-1, count):
        with pytest.raises(PipelineError, match=rf"sample {number} of {count}: there is none"):
            found.key(number)
    with pytest.raises(KeyError):
        found.member(0, "jpg")


def test_no_sample_at_all(tmp_path: Path) -> None:
    write_shards([], tmp_path / "shards", shard_size=3)
    assert len(PagedShards(tmp_path / "shards")) == 0


def test_a_missing_shard_is_named_when_it_is_wanted(tmp_path: Path) -> None:
    samples = [{"__key__": f"k{it}", "txt": b"x"} for it in range(4)]
    write_shards(samples, tmp_path / "shards", shard_size=2)
    (tmp_path / "shards/00001.tar").unlink()
    found = PagedShards(tmp_path / "shards")
    assert found.key(1) == "k1"
    with pytest.raises(PipelineError, match=r"00001.tar: no bytes, _manifest.json says \d+; run"):
        found.key(2)


def test_the_cache_forgets_what_was_not_used_for_longest() -> None:
    cache = PictureCache(max_bytes=10)
    made = []

    def get(name: str) -> bytes:
        return cache.get(name, lambda: made.append(name) or bytes(4))

    for name in ("a", "b", "a", "c", "a", "b"):
        get(name)
    assert made == ["a", "b", "c", "b"]
    assert cache.num_bytes == 8
    cache.get("huge", lambda: bytes(11))
    assert cache.num_bytes == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7", 7), ("0", 2), ("9" * 5000, 50), ("-1", 3), ("", 3), ("1e1", 3), ("²", 3), ("0007", 7)],
)
def test_numbers_of_a_query_are_kept_within_bounds(text: str, expected: int) -> None:
    assert number_of({"page": text}, "page", 3, least=2, most=50) == expected


def test_many_at_once_lose_no_decision(tmp_path: Path) -> None:
    book = ReviewBook(tmp_path / "archives.csv", ["drop"])
    threads = [
        threading.Thread(target=book.change, args=({Reviewed("cat", f"k{it}"): Decision("drop")},))
        for it in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_review(book.path, ["drop"])) == 20


def test_a_file_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    book = ReviewBook(tmp_path / "archives.csv", ["drop"])
    change = {Reviewed("cat", "a"): Decision("drop")}
    with claim(book.path), pytest.raises(PipelineError, match="another run is writing it"):
        book.change(change)
    assert book.read() == {}
    with pytest.raises(PipelineError, match="nothing to undo"):
        book.undo()
    book.change(change)
    assert book.read() == change


def test_undo_keeps_what_was_changed_by_hand_meanwhile(tmp_path: Path) -> None:
    book = ReviewBook(tmp_path / "labels.csv", ["accept", "reject"])
    item, other = Reviewed("cat", "a"), Reviewed("dog", "b")
    book.change({item: Decision("accept")})
    book.change({item: Decision("reject")})
    with book.path.open("a") as file:
        file.write("dog,b,accept,\n")
    assert book.undo() == {item: Decision("accept")}
    assert book.read() == {item: Decision("accept"), other: Decision("accept")}


def test_a_survey_shows_what_it_has_and_what_ended_it() -> None:
    go_on = threading.Event()

    def items():
        yield 1
        go_on.wait(10)
        yield 2
        raise PipelineError("shard 3 is damaged")

    survey = Survey(items, 3)
    survey.wait(0.05)
    assert not survey.is_done
    assert survey.rows in ([], [1])
    go_on.set()
    with pytest.raises(PipelineError, match="shard 3 is damaged"):
        survey.wait(10)
    assert survey.is_done
    assert survey.rows == [1, 2]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("127.8.8.8", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.3", False),
        ("example.org", False),
    ],
)
def test_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
