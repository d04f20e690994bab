"""From an ablation's definition and params.yaml to what `dvc exp run` is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml.error import YAMLError

from pipeline.ablations.definitions import Ablation, Settings, Variant
from pipeline.ablations.results import value_at
from pipeline.errors import PipelineError
from pipeline.files import digest
from pipeline.params.reading import DOORS, load_yaml, parse_params
from pipeline.params.sections import Params

DIGITS = 6
# What a variant may change without a new training run.
EVALUATION = ("evaluate", "benches")
PLAIN_WORD = re.compile(r"[A-Za-z_][\w./-]*")
NO_STRINGS = ("null", "true", "false", "nan", "inf")


@dataclass(frozen=True)
class Step:
    """One run of a variant of an ablation.

    Attributes:
        label: its name in tables.
        seed: of its run.
        params: what it sets, by dotted key.
        overrides: those of them, and of the ones set for all variants, that params.yaml has
            otherwise.
        experiment: name of its DVC experiment: equal names mean equal overrides of equal data.
    """

    label: str
    seed: int
    params: Settings
    overrides: Settings
    experiment: str

    @property
    def needs_training(self) -> bool:
        """Whether anything but evaluation differs from params.yaml."""
        return any(key.split(".")[0] not in EVALUATION for key in self.overrides)

    def command(self, *targets: str) -> list[str]:
        """The words after `dvc` that run these stages and what comes before them."""
        words = ["exp", "run", "--name", self.experiment]
        for key, value in self.overrides.items():
            if isinstance(value, Mapping):  # in place of what is there, not merged into it
                words += ["--set-param", f"++{key}=null"]
            words += ["--set-param", f"++{key}={override_literal(value)}"]
        return [*words, *targets]


def plan(
    name: str,
    ablation: Ablation,
    params: Params,
    *,
    bench: str,
    report_bench: str | None = None,
    seeds: int = 1,
    for_all: Settings | None = None,
    data: str = "",
) -> list[Step]:
    """The variants of an ablation as experiments on these params, all of a seed after each other.

    Args:
        name: the ablation's name.
        ablation: its definition; the variants of the embedded default where the params draw a
            world.
        params: what params.yaml says.
        bench: name of the benchmark that is scored.
        report_bench: of another one that is scored as well.
        seeds: how many runs of a variant: with the seed of the params, the next one, and so on.
        for_all: params set for every variant; a variant's own settings go before them.
        data: what the data are, for the names of experiments.

    Raises:
        PipelineError: a benchmark is not in the params or the same as the other, the ablation is
            about another student or has no variant for the embedded default, or a setting names no
            param or has a value that the param refuses.
    """
    for option, chosen in (("--bench", bench), ("--report-bench", report_bench)):
        if chosen is not None and chosen not in params.benches:
            known = ", ".join(params.benches) or "none"
            raise PipelineError(f"{option}: {chosen!r} is not under `benches:`; there are: {known}")
    if report_bench == bench:
        raise PipelineError(f"--report-bench: {bench!r} is --bench already; name another one")
    if ablation.student not in (None, params.train.student):
        raise PipelineError(
            f"ablation {name}: train.student: {params.train.student}: it is about "
            f"{ablation.student}"
        )
    variants = ablation.variants_for(demo=bool(params.worlds))
    if not variants:
        raise PipelineError(f"ablation {name}: {' '.join(ablation.carries_over.split())}")
    scored = [bench, *([] if report_bench is None else [report_bench]), data]
    return [
        _step(name, variant, params, for_all or {}, scored, number)
        for number in range(seeds)
        for variant in variants
    ]


def parse_settings(words: Sequence[str]) -> Settings:
    """Params from words `key=value`, values in YAML.

    Raises:
        PipelineError: a word is not of that form, or a key comes twice.
    """
    settings: Settings = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not (key and equals) or key in settings:
            raise PipelineError(f"--set: {word!r}: expected key=value, every key once")
        try:
            settings[key] = load_yaml(text)
        except YAMLError:
            raise PipelineError(f"--set: {word!r}: {text!r} is not a YAML value") from None
    return settings


def override_literal(value: Any) -> str:
    """A value in the grammar of DVC's `--set-param`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return (
            "{" + ",".join(f"{key}:{override_literal(item)}" for key, item in value.items()) + "}"
        )
    if isinstance(value, list):
        return "[" + ",".join(map(override_literal, value)) + "]"
    if PLAIN_WORD.fullmatch(value) and value.lower() not in NO_STRINGS:
        return str(value)
    return "'" + str(value).replace("'", "\\'") + "'"


def _step(
    name: str,
    variant: Variant,
    params: Params,
    for_all: Settings,
    scored: Sequence[str],
    number: int,
) -> Step:
    """The run of a variant with the seed that is `number` after the first."""
    seed = for_all.get("seed", params.seed)
    before = params.model_dump(mode="json")
    place = f"ablation {name}, variant {variant.label!r}"
    own = {**variant.params, **_multiplied(variant.factors, for_all, before, place)}
    wanted = {**for_all, **own}
    if number:
        seed = wanted["seed"] = seed + number
    wanted = _with_whole_sections(wanted, params)
    after = params.model_dump(mode="json")
    for key, value in wanted.items():
        set_at(after, key, value)
    after = parse_params(after, name=place).model_dump(mode="json")
    overrides = {
        key: value for key, value in wanted.items() if value_at(after, key) != value_at(before, key)
    }
    slug = re.sub(r"[^a-z0-9]+", "-", variant.label.lower()).strip("-")
    identity = digest([*scored, overrides])[:DIGITS]
    return Step(
        label=variant.label,
        seed=seed,
        params=own,
        overrides=overrides,
        experiment=f"{name}-{slug}-{f'seed{seed}-' if number else ''}{identity}",
    )


def _multiplied(
    factors: Mapping[str, float], for_all: Settings, before: Settings, place: str
) -> Settings:
    """What some params are times their factors; whole numbers stay whole.

    Raises:
        PipelineError: one of them is no number.
    """
    found: Settings = {}
    for key, factor in factors.items():
        value = for_all.get(key, value_at(before, key))
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PipelineError(f"{place}: factors: {key}: {value!r} is no number; name another")
        found[key] = round(value * factor) if isinstance(value, int) else value * factor
    return found


def _with_whole_sections(wanted: Settings, params: Params) -> Settings:
    """Settings that set a section as a whole where they change its method.

    Of what params.yaml says there, that which the new method has, too, stays.
    """
    for key, door in DOORS.items():
        section = getattr(params, key)
        method = wanted.get(f"{key}.{door.tag}")
        if method is None or method not in door.methods or method == getattr(section, door.tag):
            continue
        stays = section.model_fields_set & door.methods[method].params.model_fields.keys()
        whole = section.model_dump(mode="json", include=stays)
        prefix = f"{key}."
        for name in [name for name in wanted if name.startswith(prefix)]:
            set_at(whole, name.removeprefix(prefix), wanted[name])
        wanted = {name: wanted[name] for name in wanted if not name.startswith(prefix)}
        wanted[key] = whole
    return wanted


def set_at(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key of nested params."""
    *sections, last = key.split(".")
    for section in sections:
        inner = tree.get(section)
        if not isinstance(inner, dict):
            inner = tree[section] = {}
        tree = inner
    tree[last] = value
