"""Run an ablation: a DVC experiment a variant and seed, a line each, one file of results."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.ablations.definitions import FOLDER, Ablation, Settings, list_ablations, read_ablation
from pipeline.ablations.plan import Step, plan
from pipeline.ablations.results import (
    AblationResult,
    RunResult,
    VariantResult,
    protocol_of,
    value_at,
    write_result,
)
from pipeline.ablations.summary import summarised, table
from pipeline.ablations.workspace import LOCK, PARAMS, SCRATCH, Outcome, Workspace
from pipeline.errors import PipelineError
from pipeline.files import file_sha256
from pipeline.params.reading import read_params
from pipeline.params.sections import Params

METRICS = "reports/metrics/{bench}.json"
RESULTS = "reports/ablations/{name}.json"


class Plan(NamedTuple):
    """What is run for an ablation: its benchmarks, that which is reported last, and its steps."""

    ablation: Ablation
    benches: list[str]
    steps: list[Step]


def run(
    name: str,
    *,
    root: Path = Path(),
    bench: str | None = None,
    report_bench: str | None = None,
    seeds: int | None = None,
    settings: Settings | None = None,
    folder: Path = FOLDER,
) -> None:
    """Run every variant of an ablation and write `reports/ablations/NAME.json`.

    A variant whose experiment was run from the last commit and this dvc.lock is not run again; what
    other experiments have computed comes out of DVC's run cache. The file is written after every
    run, so that a stopped ablation continues. All variants are run with one seed before the next.

    Args:
        name: the ablation.
        root: folder of dvc.yaml and params.yaml.
        bench: the benchmark that is scored, and that settings are chosen on; without it the first
            one of params.yaml, or the first for development where the ablation measures lifts.
        report_bench: the one that is reported; without it that of the params, where the ablation
            measures lifts on one for development.
        seeds: how many runs of a variant; without it as many as the definition says.
        settings: params set for all variants.
        folder: of the definitions.

    Raises:
        PipelineError: as for `plan` and `Workspace.check`, or a variant failed (after the others
            have run).
    """
    ablation, benches, steps = _plan(name, root, bench, report_bench, seeds, settings, folder)
    targets = [f"score@{bench}" for bench in benches]
    workspace = Workspace(
        root,
        metrics=[METRICS.format(bench=bench) for bench in benches],
        target=targets[-1],
        log_path=(log_path := root / SCRATCH / f"ablate-{name}.log"),
    )
    workspace.check()
    results_path = root / RESULTS.format(name=name)
    runs: dict[str, list[RunResult]] = {step.label: [] for step in steps}
    variants = {step.label: VariantResult(label=step.label, params=step.params) for step in steps}
    failed: dict[str, str] = {}
    for index, step in enumerate(steps):
        if step.label in failed:
            continue
        print(f"{index + 1}/{len(steps)} {_title(step, ablation, seeds)}: ", end="", flush=True)
        outcome = workspace.find(step.experiment) or workspace.run(
            step.command(*targets),
            own_cache=step.experiment if ablation.lift_over is not None else None,
        )
        if outcome is None:
            failed[step.label] = workspace.last_words()
            print("failed", flush=True)
            continue
        runs[step.label].append(_run_result(step, ablation, benches, outcome))
        encoder = protocol_of(outcome.metrics[0]).get("encoder")
        variants[step.label] = variants[step.label].model_copy(update={"encoder": encoder})
        print(_scores(ablation, runs[step.label][-1]), flush=True)
        whole = _result(name, ablation, benches, settings or {}, variants, runs)
        write_result(results_path, whole)
    whole = _result(name, ablation, benches, settings or {}, variants, runs)
    print(f"\n{_table(name, ablation, whole)}\n{results_path}")
    if failed:
        reasons = "; ".join(f"{label!r}: {reason}" for label, reason in failed.items())
        raise PipelineError(
            f"ablation {name}: {len(failed)} of {len(variants)} variants failed; {reasons}; "
            f"see {log_path}"
        )


def describe(
    name: str,
    *,
    root: Path = Path(),
    bench: str | None = None,
    report_bench: str | None = None,
    seeds: int | None = None,
    settings: Settings | None = None,
) -> str:
    """What `run` would do: a line a run and DVC's command."""
    ablation, benches, steps = _plan(name, root, bench, report_bench, seeds, settings)
    on = f"on {benches[0]}" + (f", reported on {benches[1]}" if benches[1:] else "")
    lines = [f"{name}: {ablation.description}, {on}"]
    for step in steps:
        command = shlex.join(["dvc", *step.command(*(f"score@{bench}" for bench in benches))])
        lines += [f"  {_title(step, ablation, seeds)} ({_cost(step)})", f"    {command}"]
    return "\n".join(lines)


def overview(root: Path = Path()) -> str:
    """All ablations with what each would cost on params.yaml."""
    params = read_params(root / PARAMS)
    return "\n".join(f"{name:14} {_overview_line(name, params)}" for name in list_ablations())


def _overview_line(name: str, params: Params) -> str:
    ablation = read_ablation(name)
    if ablation.student not in (None, params.train.student):
        return f"{ablation.description} (for train.student: {ablation.student})"
    if not ablation.variants_for(demo=bool(params.worlds)):
        return f"{ablation.description} (not for the embedded default)"
    bench = _first_bench(params)
    steps = plan(name, ablation, params, bench=bench, seeds=ablation.seeds)
    trainings = sum(step.needs_training for step in steps)
    parts = [f"{len(steps) // ablation.seeds} variants"]
    parts += [f"{ablation.seeds} seeds"] if ablation.seeds > 1 else []
    parts += [f"{trainings} training {'run' if trainings == 1 else 'runs'}"]
    return f"{ablation.description} ({', '.join(parts)})"


def _plan(
    name: str,
    root: Path,
    bench: str | None,
    report_bench: str | None,
    seeds: int | None,
    settings: Settings | None,
    folder: Path = FOLDER,
) -> Plan:
    ablation = read_ablation(name, folder)
    params = read_params(root / PARAMS)
    if ablation.lift_over is not None:
        bench, report_bench = _chosen_and_reported(params, bench, report_bench)
    bench = bench or _first_bench(params)
    lock = root / LOCK
    data = file_sha256(lock) if lock.is_file() else ""
    steps = plan(
        name,
        ablation,
        params,
        bench=bench,
        report_bench=report_bench,
        seeds=seeds or ablation.seeds,
        for_all=settings,
        data=data,
    )
    return Plan(ablation, [bench, *([report_bench] if report_bench else [])], steps)


def _chosen_and_reported(
    params: Params, bench: str | None, report_bench: str | None
) -> tuple[str | None, str | None]:
    """What is not given: the first benchmark for development, and the first one of the others."""
    for_development = [name for name, entry in params.benches.items() if entry.development]
    bench = bench or next(iter(for_development), None)
    if report_bench is None and bench in for_development:
        others = (name for name in params.benches if name not in for_development)
        report_bench = next(others, None)
    return bench, report_bench


def _first_bench(params: Params) -> str:
    if not params.benches:
        raise PipelineError(f"{PARAMS}: no benchmark under `benches:`, so nothing can be compared")
    return next(iter(params.benches))


def _run_result(
    step: Step, ablation: Ablation, benches: Sequence[str], outcome: Outcome
) -> RunResult:
    files = zip(benches, outcome.metrics, strict=True)
    return RunResult(
        seed=step.seed,
        experiment=step.experiment,
        metrics={
            bench: {key: value_at(metrics, key) for key in ablation.metrics}
            for bench, metrics in files
        },
        stages=outcome.stages,
    )


def _result(
    name: str,
    ablation: Ablation,
    benches: Sequence[str],
    settings: Settings,
    variants: Mapping[str, VariantResult],
    runs: Mapping[str, list[RunResult]],
) -> AblationResult:
    """What there is so far."""
    base = runs[ablation.lift_over] if ablation.lift_over is not None else None
    return AblationResult(
        ablation=name,
        bench=benches[0],
        report_bench=benches[1] if benches[1:] else None,
        params=settings,
        variants=[
            summarised(variant, runs[label], benches=benches, base=base) if runs[label] else variant
            for label, variant in variants.items()
        ],
    )


def _title(step: Step, ablation: Ablation, seeds: int | None) -> str:
    return step.label + (f", seed {step.seed}" if (seeds or ablation.seeds) > 1 else "")


def _cost(step: Step) -> str:
    if not step.overrides:
        return "as in params.yaml"
    return "training" if step.needs_training else "evaluation only"


def _scores(ablation: Ablation, result: RunResult) -> str:
    parts = []
    for bench, metrics in result.metrics.items():
        text = ", ".join(
            f"{head} {_number(metrics[key])}" for key, head in ablation.metrics.items()
        )
        parts.append(f"{bench} {text}" if len(result.metrics) > 1 else text)
    return f"{'; '.join(parts)} (experiment {result.experiment})"


def _table(name: str, ablation: Ablation, result: AblationResult) -> str:
    headings, cells = table(ablation, result, _number)
    rows = zip(result.variants, cells, strict=True)
    lines = [[name, *headings], *([variant.label, *row] for variant, row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
        for first, *rest in lines
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
