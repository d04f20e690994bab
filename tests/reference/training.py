"""ZUTIS: optimisation steps from given weights, images and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipeline.models.zutis.losses import mask_loss, semantic_loss
from pipeline.models.zutis.network import Zutis
from pipeline.models.zutis.schedule import param_groups, set_learning_rates

from .checks import RELATIVE, TIE, Parts, Result, close, close_each
from .networks import zutis_network
from .vectors import RECORD, Vectors, read_record, weights_path

IGNORE_INDEX = 255
DECODER_HEADS = 8  # of the published networks; a tiny one's number is in its own record
RELATIVES = {"ce_loss": 1e-5, "mask_loss": 1e-5, "loss": 1e-5, "lr": 1e-9}
FINAL_BOUND = 3e-4
NORM_RELATIVE, SUM_RELATIVE = 1e-5, 1e-4
# AdamW turns the rounding noise that key biases have for a gradient into whole steps, so tensors
# that hold them are compared this much more loosely; the outputs do not depend on these biases.
KEY_BIASES, KEY_BIAS_SLACK = "in_proj_bias", 1000.0
Measure = Callable[[Tensor], Tensor]
Gradients = dict[str, Tensor]
# A gradient this small beside the largest is the rounding noise of a true zero.
NO_GRADIENT = 1e-6


class SlopeAtZero(TorchFunctionMode):
    """Gives ReLU this slope where rounding decides the sign of its input."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Every call of torch comes by here; all but ReLU pass unchanged."""
        output = func(*args, **(kwargs or {}))
        if func is not Tensor.relu:
            return output
        values: Tensor = args[0]
        other = output.detach() + self.slope * (values - values.detach())
        return torch.where(values.abs() <= TIE, other, output)


def train_steps(vectors: Vectors) -> Parts:
    """Losses, learning rates, gradients, weights and outputs of a few steps."""
    yield "steps", partial(_train, vectors)


def _train(vectors: Vectors) -> Iterator[Result]:
    record, io, name = vectors.record, vectors.io, vectors.name
    model = zutis_network(vectors.weights(), num_heads=_num_heads(vectors)).train()
    rates = record["steps"][0]["lr"]
    optimizer = torch.optim.AdamW(param_groups(model, encoder_lr=rates[0], lr=rates[1]))
    images, text, semantic = io["image"].float(), io["text_embeddings"], io["semantic_masks"].long()
    instance_masks = [io[f"instance_masks.{i}"].bool() for i in range(len(images))]
    done: list[dict[str, Any]] = []

    def losses() -> tuple[Tensor, Tensor]:
        output = model.forward_normalised(images)
        ce_loss = semantic_loss(output.patch_tokens, text, semantic, ignore_index=IGNORE_INDEX)
        return ce_loss, mask_loss(output.mask_probs, instance_masks)

    edges = [_gradient_at_edges(model, losses, slope=slope) for slope in (0.0, 1.0)]
    for step in range(len(record["steps"])):
        set_learning_rates(optimizer, step, record["n_iters"])
        ce_loss, masks_loss = losses()
        total = ce_loss + masks_loss
        optimizer.zero_grad()
        total.backward()
        done.append({"ce_loss": ce_loss.item(), "mask_loss": masks_loss.item()})
        done[-1] |= {"loss": total.item(), "lr": [group["lr"] for group in optimizer.param_groups]}
        if step == 0:
            yield from _gradients(vectors, _named_gradients(model), edges)
        optimizer.step()
    for key, relative in RELATIVES.items():
        ours, published = ([step[key] for step in steps] for steps in (done, record["steps"]))
        yield close(f"{name}/steps/{key}", ours, published, relative=relative)
    yield from _final(vectors, model)


def _gradient_at_edges(
    model: Zutis, losses: Callable[[], tuple[Tensor, Tensor]], *, slope: float
) -> Gradients:
    """Gradients if every ReLU on the edge has this slope there."""
    with SlopeAtZero(slope):
        total = sum(losses(), torch.zeros(()))
    total.backward()
    gradients = _named_gradients(model)
    model.zero_grad()
    return gradients


def _named_gradients(model: Zutis) -> Gradients:
    return {k: v.grad.double() for k, v in model.named_parameters() if v.grad is not None}


def _gradients(
    vectors: Vectors, gradients: Gradients, edges: Sequence[Gradients]
) -> Iterator[Result]:
    """Gradients, apart from what one ReLU that rounding switches on or off may change in them."""
    published = _with_gradient(vectors)
    closed, opened = edges
    compared = {name: gradient for name, gradient in gradients.items() if name in published}
    measures: dict[str, Measure] = {"l2": _norm, "sum": torch.sum, "absmax": _largest}
    for key, measure in measures.items():
        yield close_each(
            f"{vectors.name}/step0_gradients.{key}",
            {name: float(measure(gradient)) for name, gradient in compared.items()},
            {name: entry[key] for name, entry in published.items()},
            scales={n: max(abs(e[key]), e["l2"]) for n, e in published.items()},
            relative=RELATIVE,
            slack={n: abs(float(measure(opened[n]) - measure(closed[n]))) for n in compared},
        )
    prefix = "step0_grad."
    for name in vectors.io.names():
        if name.startswith(prefix):
            expected = vectors.io[name]
            gradient, off, on = (  # some are cut
                values[name.removeprefix(prefix)][: len(expected)]
                for values in (gradients, closed, opened)
            )
            yield close(f"{vectors.name}/{name}", gradient, expected, slack=(on - off).abs())


def _final(vectors: Vectors, model: Zutis) -> Iterator[Result]:
    steps = len(vectors.record["steps"])
    label = f"parameters_after_{steps}_steps"
    compared = _with_gradient(vectors)
    published = {k: v for k, v in vectors.record[label].items() if k in compared}
    values = {k: v.detach().double() for k, v in model.named_parameters() if k in published}
    slack = {k: KEY_BIAS_SLACK if k.endswith(KEY_BIASES) else 1.0 for k in published}
    measures: tuple[tuple[str, Measure, float], ...] = (
        ("l2", _norm, NORM_RELATIVE),
        ("sum", torch.sum, SUM_RELATIVE),
    )
    for key, measure, relative in measures:
        yield close_each(
            f"{vectors.name}/{label}.{key}",
            {name: float(measure(value)) for name, value in values.items()},
            {name: entry[key] for name, entry in published.items()},
            scales={n: slack[n] * max(abs(e[key]), e["l2"]) for n, e in published.items()},
            relative=relative,
        )
    with torch.inference_mode():
        output = model.eval().forward_normalised(vectors.io["image"].float())
    final = {"mask_proposals": output.mask_probs.squeeze(1), "patch_tokens": output.patch_tokens}
    for name, value in final.items():
        if f"final.{name}" in vectors.io:
            expected = vectors.io[f"final.{name}"]
            yield close(f"{vectors.name}/final.{name}", value, expected, bound=FINAL_BOUND)


def _norm(values: Tensor) -> Tensor:
    return values.norm()


def _largest(values: Tensor) -> Tensor:
    return values.abs().max()


def _with_gradient(vectors: Vectors) -> Mapping[str, dict[str, float]]:
    """Published gradients of the first step, less those that are rounding noise."""
    published = vectors.record["step0_gradients"]
    largest = max(entry["l2"] for entry in published.values())
    return {k: v for k, v in published.items() if v["l2"] > NO_GRADIENT * largest}


def _num_heads(vectors: Vectors) -> int:
    """Heads of the decoder: in the record beside the weights."""
    weights = weights_path(vectors.folder, vectors.name, vectors.record).name
    beside = vectors.folder / (weights.split(".")[0] + RECORD)
    records = [vectors.record] + ([read_record(beside)] if beside.exists() else [])
    known = [r["config"]["n_heads"] for r in records if "n_heads" in r.get("config", {})]
    return known[0] if known else DECODER_HEADS
