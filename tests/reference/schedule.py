"""The poly schedule and the optimizer's parameter groups."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from open_clip.transformer import VisionTransformer

from pipeline.models.zutis.build import FFN_HIDDEN, build_zutis
from pipeline.models.zutis.network import Zutis
from pipeline.models.zutis.schedule import param_groups, poly_lr, set_learning_rates

from .checks import Parts, Result, close, equal, failure, none_differs
from .networks import count_layers
from .vectors import Vectors

RELATIVE = 1e-9
GROUPS = ("encoder", "decoder", "query_embed", "ffn1", "ffn2")


def poly(vectors: Vectors) -> Parts:
    """Curves of single rates, settings of the groups, and the rate of each group at each step."""
    yield "curves", partial(_curves, vectors)
    yield "param_groups", partial(_groups, vectors)


def _curves(vectors: Vectors) -> Iterator[Result]:
    settings = _settings(vectors)
    for base, published in vectors.record["single_group_schedules"].items():
        steps = range(len(published))
        ours = [poly_lr(float(base), t, vectors.record["max_iters"], **settings) for t in steps]
        name = f"{vectors.name}/single_group_schedules.{base}"
        yield close(name, ours, published, relative=RELATIVE)


def _groups(vectors: Vectors) -> Iterator[Result]:
    record, name = vectors.record, vectors.name
    published = record["param_groups"]
    model = _network(published)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    rates = [group["lr"] for group in published]
    groups = param_groups(
        model, encoder_lr=rates[0], lr=rates[1], weight_decay=published[0]["weight_decay"]
    )
    optimizer = getattr(torch.optim, record["optimiser"])(groups)
    ours = [_describe(group, names) for group in optimizer.param_groups]
    if len(ours) != len(published):
        yield failure(f"{name}/param_groups", f"{len(ours)} groups, published {len(published)}")
        return
    for group, expected, part in zip(ours, published, GROUPS, strict=True):
        label = f"{name}/param_groups.{part}"
        yield none_differs(f"{label}.names", set(group["names"]) ^ set(expected["names"]))
        for key in ("n_tensors", "n_parameters", "amsgrad"):
            yield equal(f"{label}.{key}", group[key], expected[key])
        for key in ("lr", "weight_decay", "betas", "eps"):
            yield close(f"{label}.{key}", group[key], expected[key], relative=RELATIVE)
    rows = []
    for step in range(len(record["lr_per_step_per_group"])):
        set_learning_rates(optimizer, step, record["max_iters"], **_settings(vectors))
        rows.append([group["lr"] for group in optimizer.param_groups])
    label = f"{name}/lr_per_step_per_group"
    yield close(label, rows, record["lr_per_step_per_group"], relative=RELATIVE)


def _settings(vectors: Vectors) -> dict[str, float]:
    return {"power": vectors.record["power"], "min_lr": vectors.record["min_lr"]}


def _describe(group: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    parameters = group["params"]
    return group | {
        "names": [names[id(parameter)] for parameter in parameters],
        "n_tensors": len(parameters),
        "n_parameters": sum(parameter.numel() for parameter in parameters),
    }


def _network(groups: list[dict[str, Any]]) -> Zutis:
    """A network without memory, whose geometry gives the groups their numbers of parameters.

    The width follows from `ffn1`, the queries from the width, and the width of the text space,
    for any patch and image size, from what is left of the encoder.

    Raises:
        ValueError: no geometry gives these numbers.
    """
    encoder, decoder, query_embed, ffn1, _ = groups
    inner = FFN_HIDDEN * (FFN_HIDDEN + 1)
    width = _divide(ffn1["n_parameters"] - inner - FFN_HIDDEN, 2 * FFN_HIDDEN + 1)
    queries = _divide(query_embed["n_parameters"], width)
    blocks = count_layers(encoder["names"], "encoder.transformer.resblocks.")
    layers = count_layers(decoder["names"], "decoder.layers.")
    sizes: dict[str, Any] = {"num_queries": queries, "decoder_layers": layers, "num_heads": 1}
    with torch.device("meta"):
        smallest = VisionTransformer(1, 1, width, blocks, 1, 4.0, output_dim=1)
        rest = encoder["n_parameters"] - sum(p.numel() for p in smallest.parameters())
        tower = VisionTransformer(1, 1, width, blocks, 1, 4.0, output_dim=1 + _divide(rest, width))
        return build_zutis(tower, **sizes)


def _divide(number: int, divisor: int) -> int:
    quotient, rest = divmod(number, divisor)
    if rest or quotient < 0:
        raise ValueError(f"no network has these numbers of parameters: {number} over {divisor}")
    return quotient
