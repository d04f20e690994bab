"""Benchmarks by name: entries of params.yaml, and those that are shipped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ruamel.yaml import YAML

from pipeline.cli.common import PHOTO_CLIP, Session, refuse_with_onnx
from pipeline.errors import PipelineError
from pipeline.presets import bench_text, list_benches

if TYPE_CHECKING:  # pydantic takes a moment that `--help` need not wait for
    from pipeline.methods.dense import PseudoLabelParams
    from pipeline.params.base import EncoderParams
    from pipeline.params.benches import BenchParams, CorruptionParams
    from pipeline.params.sections import Params

HASH_DIGITS = 6


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
    bench = _entry(benches, name, params_path)
    changes: dict[str, object] = {}
    if root is not None:
        changes["root"] = root
    if corruption is not None:
        changes["corruption"] = _parse_corruption(corruption)
    bench = bench.model_copy(update=changes)
    if not bench.root.is_dir():
        raise PipelineError(_missing_root(name, bench.root))
    return bench


def _entry(benches: Mapping[str, BenchParams], name: str, params_path: Path) -> BenchParams:
    if name in benches:
        return benches[name]
    if name not in _shipped():
        known = ", ".join(sorted(benches)) or "none"
        raise PipelineError(
            f"{params_path}: {name!r} is not under `benches:`; there are: {known}; "
            "`pipeline benches` lists the shipped ones"
        )
    return shipped_bench(name)


def _shipped() -> list[str]:
    return [name for name, _ in list_benches()]


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


def baseline(params: Params, labeller: str | None, encoder: str | None = None) -> PseudoLabelParams:
    """The params of the dense labeller: those of section `pseudo_label` if it is theirs.

    Args:
        params: of the run.
        labeller: a name of `DENSE_LABELLERS`, or None for that of the section.
        encoder: MODEL/TAG, takes the place of theirs.

    Raises:
        PipelineError: an encoder without a dense labeller, or not of that form.
    """
    from pipeline.methods.dense import DENSE_LABELLERS

    found = params.pseudo_label
    if labeller not in (None, found.method):
        found = DENSE_LABELLERS[str(labeller)].params(method=labeller)
    if encoder is None:
        return found
    if labeller is None:
        raise PipelineError(
            f"--encoder: {encoder}: a checkpoint brings its own encoder; name a dense labeller as "
            "well, such as --model denseclip, or leave it out"
        )
    return found.model_copy(update={"encoder": parse_encoder(encoder)})


def result_name(
    bench: str,
    labeller: str | None = None,
    corruption: str | None = None,
    *,
    others: Sequence[str] = (),
) -> str:
    """Name of the files of an evaluation: of its benchmark and of what is not the usual.

    Args:
        bench: name of the benchmark.
        labeller: the dense labeller that is scored alone.
        corruption: NAME:LEVEL.
        others: what else is not the usual, see `differences`.
    """
    parts = [bench, *([labeller] if labeller else []), *others]
    if corruption is not None:
        parts.append(corruption.replace(":", "_"))
    return "_".join(re.sub(r"[^\w.-]+", "-", part) for part in parts)


def differences(
    session: Session,
    bench: str,
    checkpoint: Path | None,
    *,
    model: str | None,
    encoder: str | None,
    open_vocabulary: bool,
    onnx: Path | None = None,
) -> list[str]:
    """What tells an evaluation from that of the run, besides dense labeller and corruption.

    Of a dense labeller alone: its encoder, where it is not the params'. Of the run's own checkpoint
    with an open vocabulary: its categories, where they are not the benchmark's. Of another one: the
    name of its folder, its student and its encoder where they are not those of `train`, and its
    categories likewise; without one it is the run's. A category set goes by its name, another list
    by its length and hash. Of a network in ONNX's format: the name of its file.

    Raises:
        PipelineError: see `baseline` and `refuse_with_onnx`, and a checkpoint that cannot be read.
    """
    if onnx is not None:
        refuse_with_onnx(
            checkpoint=checkpoint, model=model, encoder=encoder, open_vocabulary=open_vocabulary
        )
        return [onnx.stem]
    labeller = alone(model)
    if labeller is not None or encoder is not None:
        usual = baseline(session.params, labeller).encoder
        asked = baseline(session.params, labeller, encoder).encoder
        return [] if asked == usual else [_encoder_name(asked)]
    if checkpoint is None and not open_vocabulary:
        return []  # whatever the params say
    checkpoint = checkpoint or session.checkpoint
    is_own = checkpoint.resolve() == session.checkpoint.resolve()
    if is_own and not open_vocabulary:
        return []
    from pipeline.models.weights.checkpoint import read_checkpoint_config
    from pipeline.models.weights.zoo import resolve_weights

    config = read_checkpoint_config(resolve_weights(checkpoint, session.runtime.cache_dir))
    params = session.params
    entry = _entry(params.benches, bench, session.params_path)
    names = _categories_name(config.categories, entry)
    if is_own:
        return names
    student, encoder_name = config.student, _encoder_name(config.encoder)
    return [
        checkpoint.resolve().name,
        *([student] if student != params.train.student else []),
        *([encoder_name] if encoder_name != _encoder_name(params.train.encoder) else []),
        *names,
    ]


def _categories_name(trained: Sequence[str], bench: BenchParams) -> list[str]:
    """What the categories of a checkpoint are called, if they are not those of a benchmark."""
    from pipeline.files import digest
    from pipeline.vocabulary.categories import category_set_names, load_category_set

    if set(trained) == set(bench.scored or load_category_set(bench.categories)):
        return []
    sets = (name for name in category_set_names() if load_category_set(name) == list(trained))
    return [next(sets, f"{len(trained)}-names-{digest(list(trained))[:HASH_DIGITS]}")]


def _encoder_name(encoder: EncoderParams) -> str:
    """`RN50-openai`; of local files the names without folders."""
    return "-".join(Path(part).name for part in encoder.published_as() if part)


def parse_encoder(text: str) -> EncoderParams:
    """MODEL/TAG, either of which may be a file, such as a.json/b.safetensors; or photo_clip."""
    from pipeline.params.base import CLIP_RETRIEVAL_PREFIX, EncoderParams

    if text == PHOTO_CLIP:
        return EncoderParams(model=text, pretrained=text)
    head, json_suffix, tail = text.removeprefix(CLIP_RETRIEVAL_PREFIX).partition(".json/")
    model, _, tag = (f"{head}.json", "/", tail) if json_suffix else head.partition("/")
    if not (model and tag):
        raise PipelineError(
            f"--encoder: {text!r}: expected MODEL/TAG, such as RN50-quickgelu/openai"
        )
    return EncoderParams(model=model, pretrained=tag)


def _parse_corruption(text: str) -> CorruptionParams:
    from pipeline.params.benches import CorruptionParams

    name, _, level = text.partition(":")
    if level not in ("1", "2", "3", "4", "5"):
        raise PipelineError(
            f"--corruption: {text!r}: expected NAME:LEVEL with a level from 1 to 5, such as "
            "gaussian_noise:3"
        )
    return CorruptionParams(name=name, level=int(level))


def _missing_root(name: str, root: Path) -> str:
    """What is missing and, for a shipped benchmark, where its data come from."""
    message = f"benches.{name}.root: {root}: no such folder; put the data there or give --root"
    if name not in _shipped():
        return message
    comment = [line for line in bench_text(name).splitlines() if line.startswith("#")]
    advice = "\n".join(line.removeprefix("#").removeprefix(" ") for line in comment)
    return f"{message}\n{advice}"
