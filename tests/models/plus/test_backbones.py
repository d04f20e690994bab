"""Backbones of DenseCLIP+: the published network by a plain reading, timm's, and weights files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.models.plus.backbones import Backbone, backbone_state, build_backbone, load_backbone
from tests.openmmlab import BLOCKS, blank, openmmlab_shapes

STRIDES, DILATIONS = (1, 2, 1, 1), (1, 1, 2, 4)
PUBLISHED = pytest.mark.parametrize("name", list(BLOCKS))
SMALL = ["timm:test_resnet", "timm:test_convnext", "timm:test_efficientnet", "timm:resnet18"]

State = dict[str, Tensor]


def shaken(backbone: Backbone) -> Backbone:
    """The same, with no value of a batch norm as it starts; in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for name, value in backbone.state_dict().items():
        if value.ndim == 1:
            low = 0.5 if "var" in name or "weight" in name else -0.2
            value.uniform_(low, low + 0.4, generator=generator)
    return backbone.eval()


def to_openmmlab(state: State) -> State:
    """timm's deep stem under OpenMMLab's names."""
    renamed = {re.sub(r"^bn1\.", "stem.7.", name): value for name, value in state.items()}
    return {re.sub(r"^conv1\.(\d)", r"stem.\1", name): value for name, value in renamed.items()}


def plain_resnet_v1c(state: State, images: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The maps of a ResNetV1c from OpenMMLab's names, written from the paper's description."""

    def conv_bn(conv: str, bn: str, values: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        padding = dilation if weight.shape[-1] == 3 else 0
        values = F.conv2d(values, weight, None, stride, padding, dilation)
        statistics = (state[f"{bn}.running_mean"], state[f"{bn}.running_var"])
        return F.batch_norm(values, *statistics, state[f"{bn}.weight"], state[f"{bn}.bias"])

    x = images
    for index, stride in ((0, 2), (3, 1), (6, 1)):
        x = conv_bn(f"stem.{index}", f"stem.{index + 1}", x, stride).relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    maps = []
    for stage, count in enumerate(BLOCKS[name]):
        for block in range(count):
            prefix = f"layer{stage + 1}.{block}"
            first = block == 0
            stride = STRIDES[stage] if first else 1
            # contracted: where the dilation grows, the first block has half
            dilation = max(DILATIONS[stage] // 2, 1) if first else DILATIONS[stage]
            y = conv_bn(f"{prefix}.conv1", f"{prefix}.bn1", x).relu()
            y = conv_bn(f"{prefix}.conv2", f"{prefix}.bn2", y, stride, dilation).relu()
            y = conv_bn(f"{prefix}.conv3", f"{prefix}.bn3", y)
            if first:
                x = conv_bn(f"{prefix}.downsample.0", f"{prefix}.downsample.1", x, stride)
            x = (x + y).relu()
        maps.append(x)
    return maps[0], maps[-1]


class TestPublished:
    def test_the_maps_are_those_of_a_plain_reading(self) -> None:
        torch.manual_seed(0)
        backbone = shaken(build_backbone("resnet50_v1c"))
        images = torch.randn(1, 3, 41, 66)
        with torch.no_grad():
            low, last = backbone(images)
            state = to_openmmlab(backbone.trunk.state_dict())
            expected = plain_resnet_v1c(state, images, "resnet50_v1c")
        assert low.shape == (1, 256, 11, 17)
        assert last.shape == (1, 2048, 6, 9)
        assert torch.allclose(low, expected[0], atol=1e-4, rtol=1e-4)
        assert torch.allclose(last, expected[1], atol=1e-4, rtol=1e-4)

    @PUBLISHED
    def test_dilations_are_contracted_and_strides_on_the_3x3(self, name: str) -> None:
        with torch.device("meta"):
            trunk = build_backbone(name).trunk
        for stage, count in enumerate(BLOCKS[name]):
            layer = trunk[f"layer{stage + 1}"]
            assert len(layer) == count
            expected = [DILATIONS[stage]] * count
            expected[0] = (1, 1, 1, 2)[stage]
            assert [block.conv2.dilation[0] for block in layer] == expected
            assert [block.conv2.padding[0] for block in layer] == expected
            assert [block.conv2.stride[0] for block in layer] == [STRIDES[stage]] + [1] * (
                count - 1
            )
            assert {block.conv1.stride[0] for block in layer} == {1}

    @PUBLISHED
    def test_what_it_says_of_itself(self, name: str) -> None:
        with torch.device("meta"):
            backbone = build_backbone(name)
        assert (backbone.low_channels, backbone.channels) == (256, 2048)
        assert backbone.strides == (4, 8)
        assert all(parameter.requires_grad for parameter in backbone.parameters())

    @PUBLISHED
    def test_openmmlabs_names_and_shapes_load_strictly(self, name: str) -> None:
        with torch.device("meta"):
            backbone = build_backbone(name)
        converted = backbone_state(backbone, blank(openmmlab_shapes(name)), "file.pth")
        assert converted.keys() == backbone.trunk.state_dict().keys()
        assert not any("fc" in key for key in converted)

    def test_another_depth_is_refused(self) -> None:
        with torch.device("meta"):
            backbone = build_backbone("resnet50_v1c")
        state = blank(openmmlab_shapes("resnet101_v1c"))
        with pytest.raises(PipelineError, match=r"(?s)file\.pth.*unexpected.*layer3\.6\.conv1"):
            backbone_state(backbone, state, "file.pth")

    def test_a_coarser_stride(self) -> None:
        with torch.device("meta"):
            backbone = build_backbone("resnet50_v1c", output_stride=32)
            low, last = backbone(torch.zeros(2, 3, 64, 96))
        assert backbone.strides == (4, 32)
        assert low.shape == (2, 256, 16, 24)
        assert last.shape == (2, 2048, 2, 3)


class TestTimm:
    @pytest.mark.parametrize("name", [*SMALL, "timm:pvt_v2_b0", "timm:twins_svt_small"])
    def test_any_network_with_maps(self, name: str) -> None:
        with torch.device("meta"):
            backbone = build_backbone(name)
            low, last = backbone(torch.zeros(2, 3, 64, 96))
        assert low.shape == (2, backbone.low_channels, 16, 24)
        stride = backbone.strides[1]
        assert last.shape == (2, backbone.channels, 64 // stride, 96 // stride)
        assert backbone.training

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("resnet_101_v1c", "did you mean resnet101_v1c.*expected one of resnet50_v1c"),
            ("resnet50", "did you mean .*or timm:NAME"),
            ("timm:resnet5000", "did you mean timm:resnet50"),
            ("timm:hf-hub:timm/resnet18.a1_in1k", "expected one of"),
            ("timm:resnet18.nothing", "timm has no maps of it"),
            ("timm:", "expected one of"),
            ("", "expected one of"),
            ("timm:vit_base_patch16_224", r"no map at stride 4; its strides are \[16, 16, 16\]"),
            ("timm:swin_tiny_patch4_window7_224", "does not take images of any size"),
            ("timm:hrnet_w18_small", "does not take images of any size"),
            ("timm:test_mambaout", r"its maps are not \(B, C, h, w\)"),
        ],
    )
    def test_others_are_refused_in_one_line(self, name: str, reason: str) -> None:
        with (
            torch.device("meta"),
            pytest.raises(PipelineError, match=rf"^backbone: .*{reason}.*$") as caught,
        ):
            build_backbone(name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("stride", [4, 0, 12])
    def test_a_stride_that_there_is_not(self, stride: int) -> None:
        with pytest.raises(PipelineError, match=rf"output_stride: {stride}; .*\(8, 16, 32\)"):
            build_backbone("resnet50_v1c", output_stride=stride)


def whole_state(name: str) -> State:
    """A state dict of timm's whole network, classifier included, with other values."""
    import timm

    torch.manual_seed(5)
    network = timm.create_model(name.removeprefix("timm:"), pretrained=False)
    return {
        key: torch.rand_like(value) if value.is_floating_point() else value + 3
        for key, value in network.state_dict().items()
    }


def prefixed(prefix: str) -> Callable[[State], State]:
    def add(state: State) -> State:
        other = {"text.weight": torch.zeros(3), "logit_scale": torch.tensor(1.0)}
        return other | {prefix + name: value for name, value in state.items()}

    return add


class TestLoad:
    @pytest.mark.parametrize("name", SMALL)
    @pytest.mark.parametrize(
        "form",
        [dict, prefixed("visual.trunk."), prefixed("backbone.")],
        ids=["bare", "visual.trunk.", "backbone."],
    )
    def test_timms_names_bare_and_below_a_prefix(
        self, name: str, form: Callable[[State], State], tmp_path: Path
    ) -> None:
        state = whole_state(name)
        torch.save(form(state), tmp_path / "file.pth")
        backbone = build_backbone(name)
        load_backbone(backbone, tmp_path / "file.pth")
        flat = {key.replace("_", "."): value for key, value in state.items()}
        for key, value in backbone.trunk.state_dict().items():
            assert torch.equal(value, flat[key.replace("_", ".")]), key

    def test_openmmlabs_names_in_its_own_container(self, tmp_path: Path) -> None:
        state = whole_state("timm:test_resnet")
        content = {"meta": {"epoch": 1}, "state_dict": prefixed("backbone.")(to_openmmlab(state))}
        torch.save(content, tmp_path / "file.pth")
        backbone = build_backbone("timm:test_resnet")
        load_backbone(backbone, tmp_path / "file.pth")
        for key, value in backbone.trunk.state_dict().items():
            assert torch.equal(value, state[key]), key

    def test_half_precision_and_no_counters(self, tmp_path: Path) -> None:
        state = {
            key: value.half()
            for key, value in whole_state("timm:test_resnet").items()
            if "num_batches" not in key
        }
        save_file(state, tmp_path / "file.safetensors")
        backbone = build_backbone("timm:test_resnet")
        load_backbone(backbone, tmp_path / "file.safetensors")
        loaded = backbone.trunk.state_dict()
        assert loaded["conv1.0.weight"].dtype == torch.float32
        assert torch.equal(loaded["conv1.0.weight"], state["conv1.0.weight"].float())
        assert int(loaded["bn1.num_batches_tracked"]) == 0

    def test_networks_that_timm_wraps(self) -> None:
        with torch.device("meta"):
            import timm

            backbone = build_backbone("timm:twins_svt_small")
            state = timm.create_model("twins_svt_small").state_dict()
        converted = backbone_state(backbone, state, "file")
        assert {f"model.{name}" for name in converted} == backbone.trunk.state_dict().keys()

    @pytest.mark.parametrize("prefix", ["", "backbone."])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"layer2.0.conv1.weight": None}, r"missing \(1\): layer2\.0\.conv1\.weight"),
            ({"conv1.0.weight": None}, r"missing \(1\): conv1\.0\.weight"),
            ({"bn1.running_var": None}, r"missing \(1\): bn1\.running_var"),
            ({"layer9.0.odd": torch.zeros(2)}, r"unexpected \(1\): layer9\.0\.odd"),
            ({"stem.9.weight": torch.zeros(2)}, r"unexpected \(1\): stem\.9\.weight"),
            ({"bn1.bias": torch.zeros(5)}, r"bn1\.bias is \[5\], expected \[32\]"),
        ],
    )
    def test_a_file_that_does_not_fit_is_refused(
        self, prefix: str, change: dict[str, Tensor | None], message: str, tmp_path: Path
    ) -> None:
        state: dict[str, Tensor | None] = {**whole_state("timm:test_resnet"), **change}
        kept = {prefix + key: value for key, value in state.items() if value is not None}
        torch.save(kept, tmp_path / "odd.pth")
        backbone = build_backbone("timm:test_resnet")
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        with pytest.raises(PipelineError, match=f"(?s)odd.pth.*timm:test_resnet.*{message}"):
            load_backbone(backbone, tmp_path / "odd.pth")
        assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())

    @pytest.mark.parametrize("content", [{}, {"a": torch.zeros(1)}, [1], torch.zeros(3)])
    def test_other_contents_are_refused(self, content: object, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(PipelineError, match=r"other\.pt"):
            load_backbone(build_backbone("timm:test_resnet"), tmp_path / "other.pt")

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(PipelineError, match=r"none\.pth: no such weights file"):
            load_backbone(build_backbone("timm:test_resnet"), tmp_path / "none.pth")


@pytest.mark.parametrize("name", ["timm:test_efficientnet", "timm:mobilenetv3_small_050"])
def test_depthwise_convolutions_are_laid_out_channels_last(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    plain = shaken(build_backbone(name)).to(memory_format=torch.contiguous_format)
    save_file(plain.trunk.state_dict(), tmp_path / "weights.safetensors")
    backbone = build_backbone(name).eval()
    load_backbone(backbone, tmp_path / "weights.safetensors")
    weights = [value for value in backbone.state_dict().values() if value.ndim == 4]
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in weights)
    images = torch.rand(2, 3, 40, 56)
    for found, expected in zip(backbone(images), plain(images), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
