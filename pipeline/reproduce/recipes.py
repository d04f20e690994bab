"""From a way of `reports/published.yaml` to params and the commands that make its numbers.

The folder of what a command makes is named by all that decides it, so that rows and tables share
whatever is the same, and nothing is made twice.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.ablations.definitions import Settings, read_ablation
from pipeline.ablations.plan import set_at
from pipeline.errors import PipelineError
from pipeline.files import digest
from pipeline.params.reading import parse_bench, parse_params
from pipeline.params.sections import Params
from pipeline.presets import bench_text, list_presets, preset_text
from pipeline.report.published import Way
from pipeline.vocabulary.categories import load_category_set

WORK = Path("data/reproduced")
REPORTS = Path("reports/reproduced")
DATA = "data/raw"  # where presets and benchmarks have their data
DONE = "done.json"
DIGITS = 10


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        words: those after `pipeline --params PATH`.
        folder: of all that it writes.
        sections: the params that decide it, by name.
        done: a pattern in the folder; there is a file of it once the command has ended well.
        marked: whether that file is left to the caller.
    """

    words: tuple[str, ...]
    folder: Path
    sections: Mapping[str, Any]
    done: str = DONE
    marked: bool = True

    @property
    def result(self) -> Path | None:
        """The file that says that it has been run; None before."""
        return min(self.folder.glob(self.done), default=None)


@dataclass(frozen=True)
class Recipe:
    """Params and commands that make the numbers of a cell; the last one writes its metrics."""

    origin: str
    params: Mapping[str, Any]
    steps: tuple[Step, ...]

    @property
    def params_path(self) -> Path:
        """Where the commands expect the params."""
        return WORK / f"params-{digest(self.params)[:DIGITS]}.yaml"

    @property
    def params_text(self) -> str:
        """Content of the params file."""
        buffer = StringIO()
        YAML().dump(dict(self.params), buffer)
        return f"# {self.origin}\n{buffer.getvalue()}"

    def command(self, step: Step) -> str:
        """A command in the words of a shell."""
        return shlex.join(["pipeline", "--params", str(self.params_path), *step.words])


def recipe(way: Way, *, bench: str, column: str, data: Path | None = None) -> Recipe:
    """Params and commands of a way.

    Args:
        way: how the numbers are made.
        bench: the table's benchmark, if it has one.
        column: stands for `{column}`, and for the benchmark where neither way nor table has one.
        data: folder in place of `data/raw`.

    Raises:
        PipelineError: a preset, benchmark or variant that there is not, or params that contradict
            each other.
    """
    fill = partial(_filled, column=column)
    bench = fill(way.bench) or bench or column
    settings = {**_variant(way), **fill(way.params)}
    preset = fill(way.preset)
    if preset not in dict(list_presets()):
        raise PipelineError(f"preset {preset}, which is not shipped")
    content = _parsed(preset_text(preset))
    if not way.measure:
        benches = content.get("benches") or {}
        content["benches"] = {bench: benches.get(bench) or _parsed(bench_text(bench))}
    for key, value in settings.items():
        set_at(content, key, value)
    if data is not None:
        content = _moved(content, data)
    if way.unseen:
        scored = parse_bench(content["benches"][bench], bench, name=f"benches.{bench}")
        names = load_category_set(scored.categories)
        content["categories"] = [name for name in names if name not in scored.unseen]
    changes = ", ".join(f"{key}: {value}" for key, value in settings.items())
    origin = f"preset {preset}{'; ' if changes else ''}{changes}"
    params = parse_params(content, name=origin)
    dump = params.model_dump(mode="json")
    if way.measure:
        return Recipe(origin, content, (_measuring(dump),))
    training = [] if way.model or way.checkpoint else _training(params, dump)
    scoring = _scoring(way, bench, dump, training, fill)
    return Recipe(origin, content, (*training, scoring))


def _parsed(text: str) -> dict[str, Any]:
    return deepcopy(_loaded(text))


@cache
def _loaded(text: str) -> dict[str, Any]:
    content: dict[str, Any] = YAML(typ="safe", pure=True).load(text)
    return content


def _variant(way: Way) -> Settings:
    if not way.ablation:
        return {}
    variants = {variant.label: variant for variant in read_ablation(way.ablation).variants}
    if way.variant not in variants:
        raise PipelineError(
            f"ablation {way.ablation} has no variant {way.variant!r}; there are: "
            f"{', '.join(variants)}"
        )
    return dict(variants[way.variant].params)


def _filled(value: Any, *, column: str) -> Any:
    """The same with the column's name in its place."""
    if isinstance(value, str):
        return value.replace("{column}", column)
    if isinstance(value, Mapping):
        return {key: _filled(item, column=column) for key, item in value.items()}
    return value


def _moved(value: Any, data: Path) -> Any:
    """The same with another folder in place of `data/raw` at the beginning of paths."""
    if isinstance(value, str) and (value == DATA or value.startswith(f"{DATA}/")):
        return str(data / value.removeprefix(DATA).lstrip("/"))
    if isinstance(value, Mapping):
        return {key: _moved(item, data) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, data) for item in value]
    return value


def _folder(stage: str, sections: Mapping[str, Any], before: Sequence[Path] = ()) -> Path:
    """A folder's name from all that decides its content."""
    decides = {"params": sections, "before": [path.name for path in before]}
    return Path(f"{stage}-{digest(decides)[:DIGITS]}")


def _training(params: Params, dump: Mapping[str, Any]) -> list[Step]:
    """The stages up to a checkpoint."""
    chosen = partial(_chosen, dump)
    steps: list[Step] = []
    words = ["train"]
    if getattr(params.train, "data", "archives") == "archives":
        steps = _archive_steps(params, dump)
        words += ["--masks", str(_output(steps, "mask"))]
        if params.train.needs_labels:
            words += ["--labels", str(_output(steps, "pseudo_label"))]
    sections = chosen("train", "categories", "background", "seed")
    folder = WORK / _folder("train", sections, [step.folder for step in steps])
    words += ["--out", str(folder / "train"), "--live", str(folder / "live")]
    return [*steps, Step((*words, "--stats", str(folder / "stats.json")), folder, sections)]


def _archive_steps(params: Params, dump: Mapping[str, Any]) -> list[Step]:
    """Embeddings, archives, pseudo-masks and, where training reads them, dense labels."""
    chosen = partial(_chosen, dump)
    pool = chosen("index", "embed", "categories", "background")
    embedded = WORK / _folder("embed", pool)
    embeddings = embedded / "embed"
    steps = [
        Step(
            (
                *("embed", "--source", source, "--out", str(embeddings / source)),
                *("--stats", str(embedded / f"{source}.json")),
            ),
            embedded,
            {"index": {source: entry}, "embed": dump["embed"]},
            done=f"{source}.{DONE}",
        )
        for source, entry in dump["index"].items()
    ]
    found = chosen("k", "seed", "retrieve", "categories", "background", "embed")
    stages = [("retrieve", "--embeddings", found), ("mask", "--archives", chosen("mask"))]
    if params.train.needs_labels:
        labels = chosen("pseudo_label", "categories", "background")
        stages.append(("pseudo_label", "--masks", labels))
    source_path, before = embeddings, embedded
    for stage, option, sections in stages:
        folder = WORK / _folder(stage, sections, [before])
        out = folder / (f"{stage}.parquet" if stage == "retrieve" else stage)
        words = (stage, option, str(source_path), "--out", str(out))
        steps.append(Step((*words, "--stats", str(folder / "stats.json")), folder, sections))
        source_path, before = out, folder
    return steps


def _scoring(
    way: Way,
    bench: str,
    dump: Mapping[str, Any],
    training: Sequence[Step],
    fill: Callable[[str | None], str | None],
) -> Step:
    """Predictions on a benchmark and their scores."""
    words = ["evaluate", "--bench", bench]
    checkpoint, corruption = fill(way.checkpoint), fill(way.corruption)
    sections = _chosen(dump, "benches", "background", "evaluate", "pseudo_label", "seed")
    if way.model:
        words += ["--model", way.model]
    else:
        words += ["--checkpoint", checkpoint or str(_output(training, "train"))]
    if checkpoint:
        sections["checkpoint"] = checkpoint
    elif training:
        sections["encoder"] = dump["train"]["encoder"]
    if way.unseen:
        words.append("--open-vocabulary")
    if corruption:
        words += ["--corruption", corruption]
    name = _folder(bench, {"words": words, **sections})
    folder = REPORTS / name
    words += ["--predictions", str(WORK / name / "predictions"), "--out", str(folder)]
    return Step(tuple(words), folder, sections, done="metrics/*.json", marked=False)


def _measuring(dump: Mapping[str, Any]) -> Step:
    """Size and speed of the network."""
    folder = REPORTS / _folder("network", {"train": dump["train"]})
    words = ("measure", "--out", str(folder / "metrics/network.json"))
    return Step(words, folder, {}, done="metrics/*.json", marked=False)


def _chosen(dump: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: dump[name] for name in (*names, "precision")}


def _output(steps: Sequence[Step], stage: str) -> Path:
    """What the command of a stage writes."""
    (step,) = (step for step in steps if step.words[0] == stage)
    return Path(step.words[step.words.index("--out") + 1])
