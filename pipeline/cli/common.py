"""What the commands share: the session that the options before a command make, paths, options."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from ruamel.yaml import YAML

from pipeline.errors import PipelineError
from pipeline.files import as_location

if TYPE_CHECKING:  # importing torch takes seconds that `--help` and mistakes need not wait for
    from pipeline.engine.runtime import Runtime
    from pipeline.engine.shard_run import Executor
    from pipeline.params.sections import Params

ExecutorName = Literal["local", "ray"]
StatsPath = Annotated[Path, typer.Option("--stats", help="Where the counts are written (JSON).")]
EntryStatsPath = Annotated[
    Path | None, typer.Option("--stats", help="Where the counts are written (JSON).")
]

PARAMS = Path("params.yaml")  # of the DAG
_PATHS_FILE = Path(__file__).parents[1] / "paths.yaml"
_NAMED_PATHS = YAML(typ="safe", pure=True).load(_PATHS_FILE.read_text(encoding="utf-8"))["paths"]
PATHS = {name: Path(path) for name, path in _NAMED_PATHS.items()}  # also those of dvc.yaml


@dataclass(frozen=True)
class Session:
    """What every command starts from, read or made when it is first asked for.

    Attributes:
        params_path: the params file.
        executor_name: where shards are made.
        ray_workers: actors of the executor `ray`, if not its own choice.
    """

    params_path: Path
    executor_name: ExecutorName
    ray_workers: int | None

    @cached_property
    def params(self) -> Params:
        """The checked content of the params file."""
        from pipeline.params.reading import read_params

        return read_params(self.params_path)

    @cached_property
    def categories(self) -> list[str]:
        """The category set of the params."""
        from pipeline.vocabulary.categories import load_category_set

        return load_category_set(self.params.categories, background=self.params.background)

    @cached_property
    def runtime(self) -> Runtime:
        """Device, precision and cache folder; asking for it seeds the global generators."""
        from pipeline.engine.runtime import make_runtime, seed_generators

        seed_generators(self.params.seed)
        params = self.params
        return make_runtime(device=params.device, seed=params.seed, threads=params.threads)

    def executor(self) -> Executor:
        """Where the shards of a stage are made."""
        if self.executor_name == "ray":
            from pipeline.engine.ray_executor import RayExecutor

            return RayExecutor(
                device=self.params.device, seed=self.params.seed, workers=self.ray_workers
            )
        from pipeline.engine.shard_run import LocalExecutor

        return LocalExecutor()

    def entry(self, section: str, name: str) -> Any:
        """The entry `name` of a table of the params, such as `index`.

        Raises:
            PipelineError: there is none of that name; the known ones are listed.
        """
        table = getattr(self.params, section)
        if name not in table:
            known = ", ".join(sorted(table)) or "none"
            raise PipelineError(
                f"{self.params_path}: {name!r} is not under `{section}:`; there are: {known}"
            )
        return table[name]


def location(text: str) -> Any:
    """An option for a path or a URL."""
    return typer.Option(parser=as_location, metavar="<path|url>", help=text)


def names(text: str | None) -> list[str] | None:
    """Categories of a comma-separated list."""
    if text is None:
        return None
    from pipeline.vocabulary.categories import load_category_set

    return load_category_set([name.strip() for name in text.split(",")])
