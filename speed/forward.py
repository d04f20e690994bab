"""The network alone: inference, and forward with backward."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from speed.harness import Bench, Pair
from speed.inputs import zutis_network
from speed.plain_zutis import published_forward

PROBS_TOLERANCE = 5e-5
TOKENS_TOLERANCE = 5e-6
# Norms: where the two sides round a ReLU's input to different signs, single entries differ.
GRADIENT_TOLERANCE = 1e-2
SIZES = "batch 2, 384 x 384, ViT-B/16, 6 layers, 100 queries"


def _images(*, quick: bool) -> Tensor:
    side = 64 if quick else 384
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def _check_outputs(published: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor]) -> str:
    probs, tokens = (
        float((mine - theirs).abs().max()) for mine, theirs in zip(ours, published, strict=True)
    )
    assert probs <= PROBS_TOLERANCE, f"mask_probs differ by {probs:.1e}"
    assert tokens <= TOKENS_TOLERANCE, f"patch_tokens differ by {tokens:.1e}"
    spread = float(ours[0].std(dim=2).mean())
    assert spread > 10 * PROBS_TOLERANCE, (
        f"queries are almost equal ({spread:.1e}): nothing is compared"
    )
    return f"mask_probs within {probs:.0e}, patch_tokens within {tokens:.0e}"


def _prepare_inference(_: Path, quick: bool) -> Pair:
    network, images = zutis_network(quick=quick).eval(), _images(quick=quick)
    weights = network.state_dict()

    @torch.inference_mode()
    def published() -> tuple[Tensor, Tensor]:
        return published_forward(weights, images)

    @torch.inference_mode()
    def ours() -> tuple[Tensor, Tensor]:
        output = network(images)
        return output.mask_probs, output.patch_tokens

    return Pair(published, ours, _check_outputs)


def _prepare_training(_: Path, quick: bool) -> Pair:
    network, images = zutis_network(quick=quick).train(), _images(quick=quick)
    weights = dict(network.named_parameters())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        outputs = published_forward(weights, images)
    # Any gradients do, as long as both sides get the same.
    upstream = [torch.randn(output.shape, generator=generator) for output in outputs]

    def backward(outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(
            outputs, list(weights.values()), upstream, materialize_grads=True
        )
        return dict(zip(weights, gradients, strict=True))

    def ours() -> dict[str, Tensor]:
        output = network(images)
        return backward((output.mask_probs, output.patch_tokens))

    def check(published: dict[str, Tensor], ours: dict[str, Tensor]) -> str:
        largest = max(float(gradient.abs().max()) for gradient in published.values())
        worst = max(
            float((ours[name] - gradient).norm() / gradient.norm())
            for name, gradient in published.items()
            # Gradients that are 0 but for rounding tell nothing.
            if float(gradient.abs().max()) > 1e-4 * largest
        )
        assert worst <= GRADIENT_TOLERANCE, f"gradients differ by {worst:.1e}"
        return f"gradients of all weights within {worst:.0e} of the norm of each"

    return Pair(lambda: backward(published_forward(weights, images)), ours, check)


BENCHES = [
    Bench(
        name="forward_inference",
        title=f"forward without gradients: {SIZES}",
        target=1.2,
        stretch=1.5,
        prepare=_prepare_inference,
    ),
    Bench(
        name="forward_training",
        title=f"forward and backward: {SIZES}",
        target=1.0,
        stretch=1.5,
        prepare=_prepare_training,
    ),
]
