"""Run an ablation: one DVC experiment a variant, one line a variant, one file of results."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.ablations.definitions import Ablation, Settings, list_ablations, read_ablation
from pipeline.ablations.plan import Step, plan
from pipeline.ablations.results import (
    AblationResult,
    VariantResult,
    protocol_of,
    value_at,
    write_result,
)
from pipeline.ablations.workspace import LOCK, PARAMS, Workspace
from pipeline.errors import PipelineError
from pipeline.files import file_sha256
from pipeline.params.reading import read_params
from pipeline.params.sections import Params

METRICS = "reports/metrics/{bench}.json"
RESULTS = "reports/ablations/{name}.json"


def run(
    name: str,
    *,
    root: Path = Path(),
    bench: str | None = None,
    settings: Settings | None = None,
) -> None:
    """Run every variant of an ablation and write `reports/ablations/NAME.json`.

    A variant whose experiment was run from the last commit and this dvc.lock is not run again; what
    other experiments have computed comes out of DVC's run cache. The file is written after every
    variant, so that a stopped ablation continues.

    Args:
        name: the ablation.
        root: folder of dvc.yaml and params.yaml.
        bench: the benchmark that is scored; the first one of params.yaml without it.
        settings: params set for all variants.

    Raises:
        PipelineError: as for `plan` and `Workspace.check`, or a variant failed (after the others
            have run).
    """
    ablation, bench, steps = _plan(name, root, bench, settings)
    results_path = root / RESULTS.format(name=name)
    log_path = root / ".dvc" / "tmp" / f"ablate-{name}.log"
    workspace = Workspace(root, metrics=METRICS.format(bench=bench), log_path=log_path)
    workspace.check()
    results = [VariantResult(label=step.label, params=step.params) for step in steps]
    failed = {}
    for index, step in enumerate(steps):
        print(f"{index + 1}/{len(steps)} {step.label}: ", end="", flush=True)
        metrics = _run_step(workspace, step, target=f"score@{bench}")
        if metrics is None:
            failed[step.label] = workspace.last_words()
            print("failed", flush=True)
            continue
        results[index] = _result(step, ablation, metrics)
        print(_scores(ablation, results[index].metrics, step), flush=True)
        whole = AblationResult(ablation=name, bench=bench, params=settings or {}, variants=results)
        write_result(results_path, whole)
    print(f"\n{_table(name, ablation, results)}\n{results_path}")
    if failed:
        reasons = "; ".join(f"{label!r}: {reason}" for label, reason in failed.items())
        raise PipelineError(
            f"ablation {name}: {len(failed)} of {len(steps)} variants failed; {reasons}; "
            f"see {log_path}"
        )


def describe(
    name: str,
    *,
    root: Path = Path(),
    bench: str | None = None,
    settings: Settings | None = None,
) -> str:
    """What `run` would do: a line a variant and DVC's command."""
    ablation, bench, steps = _plan(name, root, bench, settings)
    lines = [f"{name}: {ablation.description}, on {bench}"]
    for step in steps:
        command = shlex.join(["dvc", *step.command(f"score@{bench}")])
        lines += [f"  {step.label} ({_cost(step)})", f"    {command}"]
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
    steps = plan(name, ablation, params, bench=_first_bench(params))
    trainings = sum(step.needs_training for step in steps)
    noun = "training run" if trainings == 1 else "training runs"
    return f"{ablation.description} ({len(steps)} variants, {trainings} {noun})"


def _plan(
    name: str, root: Path, bench: str | None, settings: Settings | None
) -> tuple[Ablation, str, list[Step]]:
    ablation = read_ablation(name)
    params = read_params(root / PARAMS)
    bench = bench or _first_bench(params)
    lock = root / LOCK
    data = file_sha256(lock) if lock.is_file() else ""
    return ablation, bench, plan(name, ablation, params, bench=bench, for_all=settings, data=data)


def _first_bench(params: Params) -> str:
    if not params.benches:
        raise PipelineError(f"{PARAMS}: no benchmark under `benches:`, so nothing can be compared")
    return next(iter(params.benches))


def _run_step(workspace: Workspace, step: Step, *, target: str) -> dict[str, Any] | None:
    found = workspace.find(step.experiment)
    return workspace.run(step.command(target)) if found is None else found


def _result(step: Step, ablation: Ablation, metrics: Mapping[str, Any]) -> VariantResult:
    return VariantResult(
        label=step.label,
        params=step.params,
        experiment=step.experiment,
        encoder=protocol_of(metrics).get("encoder"),
        metrics={key: value_at(metrics, key) for key in ablation.metrics},
    )


def _cost(step: Step) -> str:
    if not step.overrides:
        return "as in params.yaml"
    return "training" if step.needs_training else "evaluation only"


def _scores(ablation: Ablation, metrics: Mapping[str, float | None], step: Step) -> str:
    parts = [f"{head} {_number(metrics[key])}" for key, head in ablation.metrics.items()]
    return f"{', '.join(parts)} (experiment {step.experiment})"


def _table(name: str, ablation: Ablation, results: Sequence[VariantResult]) -> str:
    lines = [[name, *ablation.metrics.values()]]
    for result in results:
        lines.append(
            [result.label, *(_number(result.metrics.get(key)) for key in ablation.metrics)]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
        for first, *rest in lines
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
