"""The network of DenseCLIP+: features, and their classification by text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.models.plus.heads import HEADS
from pipeline.models.plus.network import PlusNetwork, build_plus
from pipeline.models.weights.imagenet import IMAGENET_MEAN, IMAGENET_STD

C = 7
TINY = "timm:test_resnet"
FINE = ("deeplabv3plus", "lraspp")  # heads that end at stride 4


def build(**options: Any) -> PlusNetwork:
    settings = {
        "backbone": TINY,
        "head": "deeplabv2",
        "channels": C,
        "background": False,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
    torch.manual_seed(0)
    return build_plus(**(settings | options))


def unit_rows(count: int) -> Tensor:
    return F.normalize(torch.randn(count, C, generator=torch.Generator().manual_seed(3)), dim=-1)


class TestFeatures:
    @pytest.mark.parametrize("head", list(HEADS))
    @pytest.mark.parametrize(
        ("backbone", "stride"),
        [(TINY, 8), ("timm:test_convnext", 8), ("timm:fastvit_t8", 32), ("timm:vgg11", 32)],
    )
    def test_images_of_any_size(self, head: str, backbone: str, stride: int) -> None:
        stride = 4 if head in FINE else stride
        with torch.device("meta"):
            network = build(backbone=backbone, head=head).eval()
            for size in [(1, 1), (3, 2), (5, 1), (1, 70), (64, 96)]:
                features = network(torch.zeros(1, 3, *size))
                assert features.shape[:2] == (1, C)
                for cells, pixels in zip(features.shape[2:], size, strict=True):
                    assert cells >= max(pixels // stride, 1)

    @pytest.mark.parametrize("head", list(HEADS))
    def test_a_pixel_has_finite_features(self, head: str) -> None:
        features = build(head=head).eval()(torch.rand(1, 3, 1, 1))
        assert bool(features.isfinite().all())

    def test_images_are_normalised_once(self) -> None:
        network = build(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).eval()
        images = torch.rand(2, 3, 24, 40)
        mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
        normalised = (images - mean[:, None, None]) / std[:, None, None]
        expected = network.head(*network.backbone(normalised))
        assert torch.allclose(network(images), expected, atol=1e-6)
        assert network.mean.shape == network.std.shape == (1, 3, 1, 1)
        assert not {"mean", "std"} & network.state_dict().keys()

    @pytest.mark.parametrize("head", ["deeplabv3plus", "pspnet"])
    def test_training_on_one_image_is_refused_where_a_norm_sees_one_value(self, head: str) -> None:
        network = build(head=head)
        with pytest.raises(PipelineError, match=f"batch_size: 1 image .* {head}.* need 2"):
            network(torch.rand(1, 3, 32, 32))
        assert network(torch.rand(2, 3, 32, 32)).shape[0] == 2
        assert network.eval()(torch.rand(1, 3, 32, 32)).shape[0] == 1

    @pytest.mark.parametrize("head", ["deeplabv2", "lraspp"])
    def test_other_heads_train_on_one_image(self, head: str) -> None:
        build(head=head)(torch.rand(1, 3, 32, 32)).sum().backward()

    @pytest.mark.parametrize("head", list(HEADS))
    def test_all_is_trained(self, head: str) -> None:
        network = build(head=head, background=True).train()
        text = unit_rows(3)
        network.logits(network(torch.rand(2, 3, 40, 56)), text).square().mean().backward()
        without = [name for name, value in network.named_parameters() if value.grad is None]
        assert without == []
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        assert all(int(norm.num_batches_tracked) == 1 for norm in norms)  # type: ignore[arg-type]


def classified(network: PlusNetwork, images: Tensor, text: Tensor | None) -> Tensor:
    """A second reading: the features first."""
    return network.logits(network(images), text)


class TestClassify:
    images = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(2))

    @pytest.mark.parametrize("head", list(HEADS))
    @pytest.mark.parametrize("background", [False, True])
    def test_it_is_the_logits_of_the_features(self, head: str, background: bool) -> None:
        network = build(head=head, background=background).eval()
        for text in (unit_rows(1), unit_rows(4), unit_rows(3 * C)):
            expected = classified(network, self.images, text)
            assert torch.allclose(network.classify(self.images, text), expected, atol=1e-5)
            one = torch.rand(1, 3, 1, 1)
            assert torch.allclose(
                network.classify(one, text), classified(network, one, text), atol=1e-5
            )

    @pytest.mark.parametrize("head", list(HEADS))
    def test_a_learned_classifier_takes_the_place_of_text(self, head: str) -> None:
        network = build(head=head, num_classes=6).eval()
        assert network.classifier is not None
        assert network.classifier.bias is not None
        with torch.no_grad():
            network.classifier.bias.uniform_()
            network.classifier.weight.mul_(100)
        expected = classified(network, self.images, None)
        assert torch.allclose(network.classify(self.images), expected, atol=1e-4)

    @pytest.mark.parametrize("head", list(HEADS))
    def test_its_gradients_are_those_of_the_logits_of_the_features(self, head: str) -> None:
        text = unit_rows(3)
        both = [build(head=head, background=True).train() for _ in range(2)]
        for network, logits in zip(both, (PlusNetwork.classify, classified), strict=True):
            logits(network, self.images, text).logsumexp(1).square().mean().backward()
        for ours, expected in zip(*(network.parameters() for network in both), strict=True):
            assert ours.grad is not None
            assert expected.grad is not None
            scale = float(expected.grad.abs().max()) + 1e-3
            assert float((ours.grad - expected.grad).abs().max()) < 1e-3 * scale

    @pytest.mark.parametrize("head", list(HEADS))
    def test_it_is_float32_under_autocast(self, head: str) -> None:
        network = build(head=head).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert network.classify(self.images, unit_rows(2)).dtype == torch.float32

    @pytest.mark.parametrize("head", list(HEADS))
    def test_text_is_asked_for(self, head: str) -> None:
        with pytest.raises(PipelineError, match="text: a network without a learned classifier"):
            build(head=head).eval().classify(self.images)

    @pytest.mark.parametrize("head", ["deeplabv3plus", "pspnet"])
    def test_one_image_is_too_few_for_a_step(self, head: str) -> None:
        with pytest.raises(PipelineError, match="batch_size: 1 image"):
            build(head=head).train().classify(self.images[:1], unit_rows(2))


class TestLogits:
    features = torch.randn(2, C, 3, 4, generator=torch.Generator().manual_seed(1)) * 5

    def test_they_are_dot_products_with_the_text(self) -> None:
        text = unit_rows(4)
        logits = build().logits(self.features, text)
        assert logits.shape == (2, 4, 3, 4)
        for b, k, y, x in [(0, 0, 0, 0), (1, 3, 2, 1), (0, 2, 1, 3)]:
            expected = sum(
                float(a) * float(t) for a, t in zip(self.features[b, :, y, x], text[k], strict=True)
            )
            assert float(logits[b, k, y, x]) == pytest.approx(expected, abs=1e-5)

    def test_the_background_row_is_first_and_of_unit_norm_where_it_is_used(self) -> None:
        network, text = build(background=True), unit_rows(4)
        assert network.background is not None
        assert network.background.shape == (1, C)
        with torch.no_grad():
            network.background.mul_(9)
        logits = network.logits(self.features, text)
        assert logits.shape == (2, 5, 3, 4)
        assert torch.allclose(logits[:, 1:], build().logits(self.features, text))
        row = network.background[0] / network.background.norm()
        expected = torch.einsum("bchw,c->bhw", self.features, row)
        assert torch.allclose(logits[:, 0], expected, atol=1e-5)
        assert float(network.background.detach().norm()) > 9 / 2  # itself not

    def test_the_gradient_reaches_the_background_and_not_the_text(self) -> None:
        network, text = build(background=True), unit_rows(4).requires_grad_()
        features = self.features.clone().requires_grad_()
        network.logits(features, text).logsumexp(1).sum().backward()
        assert text.grad is None
        assert features.grad is not None
        assert network.background is not None
        assert network.background.grad is not None
        assert bool(network.background.grad.any())

    @pytest.mark.parametrize("num_classes", [None, 4])
    def test_they_are_float32_under_autocast(self, num_classes: int | None) -> None:
        network = build(background=num_classes is None, num_classes=num_classes).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = network(torch.rand(1, 3, 32, 32))
            logits = network.logits(features, unit_rows(4))
        assert features.dtype == torch.bfloat16
        assert logits.dtype == torch.float32
        assert torch.equal(logits, network.logits(features.float(), unit_rows(4)))

    def test_a_learned_classifier_takes_the_place_of_text(self) -> None:
        network = build(num_classes=6)
        classifier = network.classifier
        assert classifier is not None
        assert classifier.bias is not None
        with torch.no_grad():
            classifier.bias.uniform_()
        expected = torch.einsum("bchw,kc->bkhw", self.features, classifier.weight.flatten(1))
        expected = expected + classifier.bias[:, None, None]
        assert torch.allclose(network.logits(self.features), expected, atol=1e-5)
        assert torch.equal(
            network.logits(self.features, unit_rows(4)), network.logits(self.features)
        )

    def test_without_text_or_classifier(self) -> None:
        with pytest.raises(PipelineError, match="text: a network without a learned classifier"):
            build().logits(self.features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "deeplab"}, "head: 'deeplab': did you mean deeplabv2.* known are deeplabv2, "),
        ({"backbone": "resnet"}, "backbone: 'resnet'"),
        ({"channels": 0}, "channels: 0"),
        ({"num_classes": 0}, "num_classes: 0"),
        ({"background": True, "num_classes": 3}, "background: a learned row stands beside text"),
        ({"mean": (0.5,)}, "three numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std above 0"),
    ],
)
def test_settings_that_make_no_network(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(PipelineError, match=message):
        build(**options)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = build(head="lraspp").state_dict(), build(head="lraspp").state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
