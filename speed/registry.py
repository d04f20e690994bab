"""All rows, in the order of the table."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import PipelineError
from speed import (
    bilateral,
    confusion,
    evaluation,
    forward,
    instances,
    losses,
    onnx_predict,
    plus_step,
    retrieval,
    stages,
    train_step,
    training_sample,
)
from speed.harness import Bench

MODULES = (
    losses,
    training_sample,
    instances,
    retrieval,
    confusion,
    bilateral,
    forward,
    train_step,
    plus_step,
    evaluation,
    onnx_predict,
    stages,
)


def select(names: Sequence[str] | None = None) -> list[Bench]:
    """The benches of these names, by default all.

    Raises:
        PipelineError: a name that is not known.
    """
    benches = {bench.name: bench for module in MODULES for bench in module.BENCHES}
    unknown = [name for name in names or () if name not in benches]
    if unknown:
        raise PipelineError(f"--only: {unknown[0]!r} is not one of {', '.join(benches)}")
    return [benches[name] for name in names or benches]
