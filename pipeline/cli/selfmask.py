"""SelfMask from scratch, on one's own images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import try_outputs
from pipeline.errors import PipelineError

selfmask_app = typer.Typer(help="SelfMask, trained on one's own images.")


@selfmask_app.command()
def train(
    images: Annotated[Path, typer.Option(help="Folder of unlabelled images.")],
    out: Annotated[Path, typer.Option(help="Weights to write (.safetensors).")],
    config: Annotated[
        Path | None, typer.Option(help="YAML of votes, network and schedule (docs/masks.md).")
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder of votes and resumable state.")] = Path(
        "data/work/selfmask"
    ),
    seed: Annotated[int, typer.Option(help="Seed of votes, draws and initial weights.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16, as in the params.")
    ] = "auto",
) -> None:
    """Vote on every image of a folder, then train SelfMask on the votes.

    The same command continues where it was stopped. `mask.source: selfmask` with `mask.weights`
    then uses the network.
    """
    from pipeline.engine.runtime import make_runtime
    from pipeline.methods.selfmask import SelfMaskTraining
    from pipeline.params.reading import read_section
    from pipeline.stages import mask, selfmask

    if out.suffix != ".safetensors":
        raise PipelineError(f"--out: {out}: name a file that ends with .safetensors")
    params = read_section(config, SelfMaskTraining) if config else SelfMaskTraining()
    try_outputs(out, out.with_suffix(".json"), folders=[work])
    runtime = make_runtime(device=device, precision=precision, seed=seed)
    model = selfmask.new_network(params, runtime)  # its mistakes are told before the votes
    selfmask.list_pool(images, work / "images.parquet", workers=params.votes.workers)
    mask.run(
        archives_path=work / "images.parquet",
        out_dir=work / "masks",
        params=params.votes,
        runtime=runtime,
        stats_path=work / "masks.json",
        section="votes",
    )
    selfmask.run(
        model=model,
        masks_dir=work / "masks",
        out_path=out,
        work_dir=work,
        params=params,
        runtime=runtime,
    )
    print(
        f"{out} written; use it by `mask.source: selfmask`, `mask.weights: {out}`; if masks were "
        "made with an earlier one of this name: dvc repro --force --single-item mask"
    )
