"""Shards on a Ray cluster: Ray Data with one actor for each GPU."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import socket
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.engine.progress import Tally
from pipeline.engine.runtime import CACHE_VARIABLE, make_runtime
from pipeline.engine.shard_run import Load, ShardMaker, Task
from pipeline.errors import PipelineError, install_command
from pipeline.files import write_bytes

INSTALL = f"--executor ray needs Ray: {install_command('ray')}"
ADDRESS_VARIABLE = "RAY_ADDRESS"
KNOCK_S = 10
TASKS_PER_WORKER = 4  # so that none waits long for the last one
FORWARDED = (CACHE_VARIABLE,)  # to the workers


class RayExecutor:
    """Sends shards to the actors of a Ray cluster and writes what they send back.

    The cluster is the one of $RAY_ADDRESS, else one on this machine that ends with the process. Its
    nodes need this package and see the inputs under the same paths: on a shared file system, or as
    URLs. Shards of an actor that is lost are made again by another one.

    Args:
        device: as in params.yaml; an actor takes a GPU unless it is "cpu" or there is none.
        precision: as in params.yaml.
        seed: of the run.
        workers: number of actors; None: one for each GPU, without GPUs one for each core.
    """

    def __init__(
        self, *, device: str, precision: str = "auto", seed: int, workers: int | None = None
    ) -> None:
        try:
            import ray.data  # noqa: F401
        except ImportError:
            raise PipelineError(INSTALL) from None
        self._device = device
        self._precision = precision
        self._seed = seed
        self._workers = workers

    def run(
        self, tasks: Sequence[Task], *, load: Load, maker: ShardMaker, tally: Tally
    ) -> Iterator[tuple[Task, int, Tally]]:
        """See `Executor`; shards come in the order in which they are done."""
        if not tasks:
            return
        settings = json.dumps(maker.settings, sort_keys=True, default=str)
        by_number = {task.number: task for task in tasks}
        for row in self._rows(tasks, load):
            if row["error"]:
                raise PipelineError(row["error"])
            if row["settings"] != settings:
                raise PipelineError(
                    f"a worker computes otherwise than this process: {row['settings']} there, "
                    f"{settings} here; start where the devices are the same, or set device: cpu"
                )
            part = Tally.from_dict(json.loads(row["tally"]))
            tally.add(part)
            task = by_number[row["number"]]
            write_bytes(task.path, row["data"])
            yield task, row["samples"], part

    def _rows(self, tasks: Sequence[Task], load: Load) -> Iterator[dict[str, Any]]:
        import ray

        gpus, workers = self._actors()
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        items = [
            {"number": task.number, "items": pickle.dumps(task.items), "name": task.path.name}
            for task in tasks
        ]
        made = ray.data.from_items(items, override_num_blocks=len(items)).map(
            _Worker,  # type: ignore[arg-type]
            fn_constructor_kwargs={
                "load": load,
                "device": self._device,
                "precision": self._precision,
                "seed": self._seed,
                "threads": torch.get_num_threads(),
                "folder": str(Path.cwd()),
            },
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(tasks))),
            num_gpus=1 if gpus else 0,
        )
        yield from made.iter_rows()

    def task_size(self, count: int) -> int:
        """See `Executor`."""
        _, workers = self._actors()
        return max(1, math.ceil(count / (TASKS_PER_WORKER * workers)))

    def _actors(self) -> tuple[int, int]:
        """Number of GPUs that are used, and of actors."""
        import ray

        _connect()
        resources = ray.cluster_resources()
        gpus = 0 if self._device == "cpu" else int(resources.get("GPU", 0))
        return gpus, self._workers or gpus or max(1, int(resources.get("CPU", 1)))


class _Worker:
    """An actor: loads at its first shard, on its own device.

    Items travel pickled, as all that Ray sends: whoever may join the cluster is trusted.
    """

    def __init__(
        self, *, load: Load, device: str, precision: str, seed: int, threads: int, folder: str
    ) -> None:
        self._load = load
        self._runtime = partial(make_runtime, device=device, precision=precision, seed=seed)
        self._maker: ShardMaker | None = None
        torch.set_num_threads(threads)  # sums in the order in which the driver would take them
        if Path(folder).is_dir():
            os.chdir(folder)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make the shard of a row."""
        tally, data, samples, error, settings = Tally(), b"", 0, "", ""
        try:
            if self._maker is None:
                self._maker = self._load(self._runtime())
            settings = json.dumps(self._maker.settings, sort_keys=True, default=str)
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / row["name"]
                samples = self._maker.make(pickle.loads(row["items"]), path, tally)
                data = path.read_bytes()
        except (PipelineError, OSError) as problem:
            error = str(problem)
        return {
            "number": row["number"],
            "samples": samples,
            "data": data,
            "tally": json.dumps(tally.as_dict()),
            "error": error,
            "settings": settings,
        }


def _connect() -> None:
    """Join the cluster of $RAY_ADDRESS, or start one here.

    Raises:
        PipelineError: there is no cluster at that address.
    """
    import ray

    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    forwarded = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    address = os.environ.get(ADDRESS_VARIABLE)
    try:
        _check_reachable(address)
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            runtime_env={"env_vars": forwarded},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except OSError as error:
        raise PipelineError(f"{ADDRESS_VARIABLE}={address}: no Ray cluster: {error}") from None


def _check_reachable(address: str | None) -> None:
    """Raise OSError soon where nobody listens; Ray itself tries for two minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()
