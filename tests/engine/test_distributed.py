"""A group of processes: sums, gradients, agreement, and launchers that say too little."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from pipeline.engine.distributed import Group, process_group
from pipeline.errors import PipelineError

CPU = torch.device("cpu")

Task = Callable[[Group], Any]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def on_two_processes(task: Task, *, late: float = 0, **environment: str) -> list[Any]:
    """What `task` returns for each rank, on two processes joined by Gloo, the second one `late`."""
    environment = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **environment,
    }
    context = multiprocessing.get_context("fork")
    results: SimpleQueue[tuple[int, Any]] = context.SimpleQueue()

    def work(rank: int) -> None:
        os.environ.update(environment, RANK=str(rank))
        time.sleep(late * rank)
        with process_group(CPU) as group:
            results.put((group.rank, task(group)))

    processes = [context.Process(target=work, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    return [result for _, result in sorted(results.get() for _ in processes)]


def test_every_process_gets_the_sum() -> None:
    def task(group: Group) -> list[float]:
        group.barrier()
        return group.all_reduce(torch.tensor([1.0, 10.0 * group.rank])).tolist()

    assert on_two_processes(task) == [[2.0, 10.0], [2.0, 10.0]]


def test_gradients_are_summed_where_there_are_any() -> None:
    def task(group: Group) -> list[Any]:
        parameters = [torch.ones(2, 2), torch.ones(3), torch.ones(())]
        parameters[0].grad = torch.full((2, 2), 1.0 + group.rank)
        parameters[2].grad = torch.tensor(0.5)
        group.reduce_gradients(parameters)
        return [None if p.grad is None else p.grad.tolist() for p in parameters]

    expected = [[[3.0, 3.0], [3.0, 3.0]], None, 1.0]
    assert on_two_processes(task) == [expected, expected]


def test_restarted_processes_do_not_call_the_dead_ones() -> None:
    """torchrun keeps its store over a restart, with the addresses of the first attempt in it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchrun = {
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "LOCAL_WORLD_SIZE": "2",
    }
    for attempt in ("0", "1"):
        ranks = on_two_processes(
            lambda group: group.rank, late=0.3, TORCHELASTIC_RESTART_COUNT=attempt, **torchrun
        )
        assert ranks == [0, 1]


def test_processes_know_whether_they_agree() -> None:
    def task(group: Group) -> tuple[bool, bool, bool]:
        return group.is_main, group.agree(7), group.agree(group.rank)

    assert on_two_processes(task) == [(True, True, False), (False, True, False)]


def test_a_process_alone_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with process_group(CPU) as group:
        group.barrier()
        assert group == Group(CPU)
        assert group.is_main
        assert group.agree(3)
        assert group.all_reduce(torch.ones(1)).item() == 1


def test_a_launcher_that_names_no_meeting_point_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(PipelineError, match=r"WORLD_SIZE \(2\).*MASTER_ADDR.*torchrun"),
        process_group(CPU),
    ):
        pass
