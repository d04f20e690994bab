"""What the commands share: the session that the options before a command make, paths, options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from ruamel.yaml import YAML

from pipeline.errors import PipelineError, did_you_mean, listing
from pipeline.files import Location, as_location, check_writable, is_url

if TYPE_CHECKING:  # importing torch takes seconds that `--help` and mistakes need not wait for
    from pipeline.engine.runtime import Runtime
    from pipeline.engine.shard_run import Executor
    from pipeline.params.base import EncoderParams
    from pipeline.params.sections import Params

ExecutorName = Literal["local", "ray"]
MasksPath = Annotated[Path, typer.Option(help="Folder of the mask shards.")]
CorrectionsPath = Annotated[Path, typer.Option(help="Folder of the masks that were corrected.")]
LabelReviewPath = Annotated[
    Path,
    typer.Option("--review", help="CSV file of labels accepted and rejected (`pipeline app`)."),
]
StatsPath = Annotated[Path, typer.Option("--stats", help="Where the counts are written (JSON).")]
EntryStatsPath = Annotated[
    Path | None, typer.Option("--stats", help="Where the counts are written (JSON).")
]

PHOTO_CLIP = "photo_clip"  # as in pipeline.models.clip.photo_clip, which imports torch
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

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint in force: that of the last round, of `train` without rounds."""
        rounds = list(self.params.rounds)
        return PATHS["rounds"] / rounds[-1] if rounds else PATHS["checkpoint"]

    @cached_property
    def categories(self) -> list[str]:
        """The category set of the params.

        Raises:
            PipelineError: a name that cannot be used, or that an encoder of the params does not
                know.
        """
        from pipeline.vocabulary.categories import all_texts, check_texts, load_category_set

        params = self.params
        found = load_category_set(params.category_names, background=params.background)
        check_texts(found, params.texts, background=params.background)
        _check_evaluated(params, found)
        asked = {
            "categories": all_texts(found, params.texts),
            "background": params.background,
            "evaluate.others": params.evaluate.others,
        }
        for section in ("embed", "pseudo_label", "train"):
            encoder, place = getattr(params, section).encoder, f"{section}.encoder"
            for key, listed in asked.items():
                check_known(listed, encoder, field=f"{self.params_path}: {key}", place=place)
        return found

    @cached_property
    def runtime(self) -> Runtime:
        """Device, precision and cache folder; asking for it seeds the global generators."""
        from pipeline.engine.runtime import make_runtime, seed_generators

        seed_generators(self.params.seed)
        params = self.params
        return make_runtime(
            device=params.device,
            precision=params.precision,
            seed=params.seed,
            threads=params.threads,
        )

    def executor(self) -> Executor:
        """Where the shards of a stage are made."""
        if self.executor_name == "ray":
            from pipeline.engine.ray_executor import RayExecutor

            params = self.params
            return RayExecutor(
                device=params.device,
                precision=params.precision,
                seed=params.seed,
                workers=self.ray_workers,
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


def _check_evaluated(params: Params, categories: Sequence[str]) -> None:
    """Refuse names of section `evaluate` that have no effect.

    Raises:
        PipelineError: a score of what is no category, here or of a benchmark; others that are
            categories or repeat each other.
    """
    from pipeline.vocabulary.categories import load_category_set, plain_name

    evaluate = params.evaluate
    asked = {plain_name(name) for name in categories}
    if evaluate.others:
        for name in load_category_set(evaluate.others, field="evaluate.others"):
            if plain_name(name) in asked:
                raise PipelineError(f"evaluate.others: {name!r} is a category; remove one")
    if evaluate.min_scores:
        for bench in params.benches.values():
            asked |= {plain_name(name) for name in load_category_set(bench.categories)}
        for name in evaluate.min_scores:
            if plain_name(name) not in asked:
                raise PipelineError(
                    f"evaluate.min_scores: {name!r} is not among the categories; "
                    f"{did_you_mean(name, categories)}they are: {listing(categories)}"
                )


def location(text: str) -> Any:
    """An option for a path or a URL."""
    return typer.Option(parser=_location, metavar="<path|url>", help=text)


def _location(text: str) -> Any:
    try:
        return as_location(text)
    except ValueError as error:  # of which typer would keep the value alone
        raise typer.BadParameter(str(error)) from None


def finite(number: float | None) -> float | None:
    """The number of an option, as it is: a range without an end takes infinity, and some take NaN.

    Raises:
        BadParameter: it is one of these; typer names the option.
    """
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"{number} is not a finite number")
    return number


def try_outputs(*files: Location, folders: Sequence[Location] = ()) -> None:
    """Find out now, before any network is loaded, whether a command can write what it is to.

    URLs are tried when they are opened.

    Raises:
        OSError, PipelineError: as `check_writable`.
    """
    for is_folder, paths in ((False, files), (True, folders)):
        for path in paths:
            if not is_url(path):
                check_writable(path, folder=is_folder)


def refuse_with_onnx(**options: object) -> None:
    """Refuse options of networks that are loaded by torch beside `--onnx`.

    Raises:
        PipelineError: one of them is given; the message names it.
    """
    if given := given_options(options):
        raise PipelineError(f"--onnx: the file is the network; leave {given[0]} out")


def given_options(options: Mapping[str, object]) -> list[str]:
    """Those of some options, by the names of their arguments, that have a value: `--max-pixels`."""
    return [f"--{name.replace('_', '-')}" for name, value in options.items() if value]


def names(text: str | None, option: str = "--categories") -> list[str] | None:
    """Names of an option such as `--categories`: separated by commas, quoted as in CSV.

    The name of a shipped set, alone and not quoted, stands for its names.

    Raises:
        PipelineError: a quote that is not closed, or names that are no categories.
    """
    if text is None:
        return None
    from pipeline.vocabulary.categories import category_set_names, load_category_set, split_names

    sets = category_set_names()
    if text.strip() in sets:
        return load_category_set(text.strip())
    if "_" in text and (close := get_close_matches(text.strip(), sets, n=1, cutoff=0.8)):
        raise PipelineError(
            f"{option}: {text!r} is no category set; did you mean {close[0]}? There are: "
            f"{', '.join(sets)}"
        )
    return load_category_set(split_names(text, option), field=option)


def preset_names(text: str | None, preset: str) -> list[str] | None:
    """Names of `--categories` for a preset, see `names`.

    Raises:
        PipelineError: also if the preset is unknown, or its encoder does not know a name.
    """
    listed = names(text)
    if listed is not None:
        from pipeline.params.reading import parse_params
        from pipeline.presets import preset_text

        content = YAML(typ="safe", pure=True).load(preset_text(preset))
        check_known(listed, parse_params(content).embed.encoder, field="--categories")
    return listed


def check_known(
    categories: Sequence[str], encoder: EncoderParams, *, field: str, place: str = "encoder"
) -> None:
    """Refuse names that are not in the closed list of an encoder, if it has one.

    Args:
        categories: the names.
        encoder: model and weights.
        field: where the names come from, for the message.
        place: where the encoder stands in the params, for the message.

    Raises:
        PipelineError: names the field and the name.
    """
    if encoder.model != PHOTO_CLIP and not Path(encoder.model).is_file():
        return
    from pipeline.models.clip import clip_config
    from pipeline.models.clip.names import resolve_name

    known = clip_config(encoder, field=place).get("names")
    if known is None:
        return
    for name in categories:
        resolve_name(name, known, source=encoder.model, field=field)
