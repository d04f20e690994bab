"""Threads that work ahead, in order."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.engine.parallel import Workers, read_ahead


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_come_in_the_order_of_the_items(count: int) -> None:
    def slow_if_even(number: int) -> int:
        time.sleep(0.002 * (number % 2 == 0))
        return -number

    with Workers(count) as workers:
        assert list(workers.map(slow_if_even, range(20), ahead=3)) == [-i for i in range(20)]
        assert list(workers.map(slow_if_even, [], ahead=3)) == []
        assert workers.submit(slow_if_even, 5).result() == -5


@pytest.mark.parametrize("count", [0, 2])
def test_an_error_arrives_where_the_result_is_taken(count: int) -> None:
    with Workers(count) as workers:
        broken = workers.submit(int, "seven")
        with pytest.raises(ValueError, match="seven"):
            broken.result()
        results = workers.map(int, ["1", "two", "3"], ahead=1)
        assert next(results) == 1
        with pytest.raises(ValueError, match="two"):
            next(results)


def test_no_more_is_read_than_is_allowed_ahead() -> None:
    taken = []

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    with Workers(2) as workers:
        results = workers.map(lambda item: item, items(), ahead=4)
        next(results)
        assert len(taken) <= 4 + 2 + 1


def test_threads_end_with_the_block() -> None:
    before = threading.active_count()
    with Workers(3) as workers:
        list(workers.map(abs, range(9), ahead=9))
    assert threading.active_count() == before


@pytest.mark.parametrize("count", [0, 1, 5])
def test_reading_ahead_yields_all_in_order(count: int) -> None:
    assert list(read_ahead(range(count))) == list(range(count))


def test_reading_ahead_makes_one_item_while_another_is_used() -> None:
    making_second, using_first = threading.Event(), threading.Event()

    def items():
        yield "first"
        making_second.set()
        assert using_first.wait(10)
        yield "second"

    for item in read_ahead(items()):
        assert making_second.wait(10)
        using_first.set()
        assert item in ("first", "second")


def test_an_error_of_the_reader_comes_after_the_items_before_it() -> None:
    def items():
        yield 1
        raise OSError("gone")

    reader = read_ahead(items())
    assert next(reader) == 1
    with pytest.raises(OSError, match="gone"):
        next(reader)


def test_whoever_stops_reading_leaves_no_thread() -> None:
    before = threading.active_count()
    reader = read_ahead(range(9))
    next(reader)
    reader.close()
    assert threading.active_count() == before
