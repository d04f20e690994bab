"""Benchmarks by name: entries of params.yaml, and those that are shipped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ruamel.yaml import YAML

from pipeline.errors import PipelineError
from pipeline.presets import bench_text, list_benches

if TYPE_CHECKING:  # pydantic takes a moment that `--help` need not wait for
    from pipeline.methods.dense import PseudoLabelParams
    from pipeline.params.benches import BenchParams, CorruptionParams
    from pipeline.params.sections import Params


def shipped_bench(name: str) -> BenchParams:
    """A shipped benchmark.

    Raises:
        PipelineError: there is none of that name.
    """
    from pipeline.params.reading import parse_bench

    content = YAML(typ="safe", pure=True).load(bench_text(name))
    return parse_bench(content, name, name=f"presets/benches/{name}.yaml")


def find_bench(
    benches: Mapping[str, BenchParams],
    name: str,
    *,
    params_path: Path,
    root: Path | None = None,
    corruption: str | None = None,
) -> BenchParams:
    """The entry of the params with this name, else the shipped one.

    Args:
        benches: the section `benches` of the params.
        name: of the benchmark.
        params_path: where the params come from, for messages.
        root: takes the place of the entry's `root`.
        corruption: NAME:LEVEL, takes the place of its `corruption`.

    Raises:
        PipelineError: an unknown name, no folder at its root, or a corruption that is not of that
            form.
    """
    shipped = [known for known, _ in list_benches()]
    if name not in benches and name not in shipped:
        known = ", ".join(sorted(benches)) or "none"
        raise PipelineError(
            f"{params_path}: {name!r} is not under `benches:`; there are: {known}; "
            "`pipeline benches` lists the shipped ones"
        )
    bench = benches[name] if name in benches else shipped_bench(name)
    changes: dict[str, object] = {}
    if root is not None:
        changes["root"] = root
    if corruption is not None:
        changes["corruption"] = _parse_corruption(corruption)
    bench = bench.model_copy(update=changes)
    if not bench.root.is_dir():
        raise PipelineError(_missing_root(name, bench.root, shipped))
    return bench


def alone(model: str | None) -> str | None:
    """The dense labeller that `--model` names, to be scored alone; None for a checkpoint.

    Raises:
        PipelineError: a model that is neither a student nor a dense labeller.
    """
    from pipeline.methods.dense import DENSE_LABELLERS
    from pipeline.methods.students import STUDENTS

    if model in DENSE_LABELLERS:
        return model
    if model is not None and model not in STUDENTS:
        known = ", ".join([*STUDENTS, *DENSE_LABELLERS])
        raise PipelineError(f"--model: {model!r} is unknown; choose one of {known}")
    return None


def baseline(params: Params, labeller: str | None) -> PseudoLabelParams:
    """The params of the dense labeller: those of section `pseudo_label` if it is theirs."""
    from pipeline.methods.dense import DENSE_LABELLERS

    if labeller in (None, params.pseudo_label.method):
        return params.pseudo_label
    return DENSE_LABELLERS[str(labeller)].params(method=labeller)


def result_name(bench: str, labeller: str | None = None, corruption: str | None = None) -> str:
    """Name of the files of an evaluation: of its benchmark and of what is not the usual."""
    parts = [bench]
    if labeller is not None:
        parts.append(labeller)
    if corruption is not None:
        parts.append(corruption.replace(":", "_"))
    return "_".join(parts)


def _parse_corruption(text: str) -> CorruptionParams:
    from pipeline.params.benches import CorruptionParams

    name, _, level = text.partition(":")
    if level not in ("1", "2", "3", "4", "5"):
        raise PipelineError(
            f"--corruption: {text!r}: expected NAME:LEVEL with a level from 1 to 5, such as "
            "gaussian_noise:3"
        )
    return CorruptionParams(name=name, level=int(level))


def _missing_root(name: str, root: Path, shipped: list[str]) -> str:
    """What is missing and, for a shipped benchmark, where its data come from."""
    message = f"benches.{name}.root: {root}: no such folder; put the data there or give --root"
    if name not in shipped:
        return message
    comment = [line for line in bench_text(name).splitlines() if line.startswith("#")]
    advice = "\n".join(line.removeprefix("#").removeprefix(" ") for line in comment)
    return f"{message}\n{advice}"
