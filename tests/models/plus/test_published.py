"""The published code's checkpoints, made up under their real names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import Result
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import PipelineError
from pipeline.inference.segmenter import Segmenter
from pipeline.models.plus.network import build_plus
from pipeline.models.plus.published import convert_published, read_published
from pipeline.models.weights.checkpoint import save_checkpoint
from pipeline.models.weights.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pipeline.params.base import EncoderParams
from tests.openmmlab import norm_shapes, openmmlab_shapes

C, K = 16, 4

Shapes = dict[str, list[int]]
State = dict[str, Tensor]


def block(name: str, outputs: int, inputs: int, side: int = 1) -> Shapes:
    return {f"{name}.conv.weight": [outputs, inputs, side, side]} | norm_shapes(
        f"{name}.bn", outputs
    )


def separable(name: str, outputs: int, inputs: int) -> Shapes:
    depthwise = block(f"{name}.depthwise_conv", inputs, 1, 3)
    return depthwise | block(f"{name}.pointwise_conv", outputs, inputs)


def merged(parts: Iterable[Shapes]) -> Shapes:
    return {name: shape for part in parts for name, shape in part.items()}


DECODE_MODULES = {
    "deeplabv2": merged(block(f"aspp_modules.{i}", C, 2048, 3) for i in range(4)),
    "deeplabv3plus": merged(
        [
            block("image_pool.1", C, 2048),
            block("aspp_modules.0", C, 2048),
            *(separable(f"aspp_modules.{i}", C, 2048) for i in (1, 2, 3)),
            block("bottleneck", C, 5 * C, 3),
            block("c1_bottleneck", 48, 256),
            separable("sep_bottleneck.0", C, C + 48),
            separable("sep_bottleneck.1", C, C),
        ]
    ),
    "pspnet": merged(
        [
            *(block(f"psp_modules.{i}.1", C, 2048) for i in range(4)),
            block("bottleneck", C, 2048 + 4 * C, 3),
        ]
    ),
}
TEACHERS = [
    [],
    ["clip.stem.0.weight", *(f"{part}_proj.weight" for part in "qkvc"), "v_proj.bias"],
    ["clip.class_token", "proj.weight"],
]


def checkpoint(
    backbone: str = "resnet50_v1c", head: str = "deeplabv2", *, background: bool = False
) -> State:
    """A state dict of the published code, its values made up."""
    shapes = {
        f"backbone.{name}": shape
        for name, shape in openmmlab_shapes(backbone).items()
        if not name.startswith("fc.")
    }
    shapes |= {f"decode_head.decode_module.{k}": v for k, v in DECODE_MODULES[head].items()}
    shapes["decode_head.text_embeddings"] = [K, C]
    if background:
        shapes["decode_head.bg_embeddings"] = [1, C]
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand((), generator=generator).expand(shape)
        if name.startswith("backbone.layer")  # many, and of no interest
        else torch.rand(shape, generator=generator)
        for name, shape in shapes.items()
    }


class TestConvert:
    @pytest.mark.parametrize(
        ("backbone", "head", "background", "teacher"),
        [
            ("resnet101_v1c", "deeplabv2", False, TEACHERS[1]),
            ("resnet101_v1c", "deeplabv3plus", True, TEACHERS[0]),
            ("resnet101_v1c", "pspnet", False, TEACHERS[2]),
            ("resnet50_v1c", "deeplabv2", True, TEACHERS[2]),
            ("resnet50_v1c", "deeplabv3plus", False, TEACHERS[1]),
            ("resnet50_v1c", "pspnet", True, TEACHERS[0]),
        ],
    )
    def test_every_published_network(
        self, backbone: str, head: str, background: bool, teacher: list[str]
    ) -> None:
        state = checkpoint(backbone, head, background=background)
        extra = {f"decode_head.{name}": torch.zeros(2) for name in [*teacher, "_iter_counter"]}
        found = convert_published(state | extra, "file.pth")
        assert found.settings == {
            "backbone": backbone,
            "head": head,
            "channels": C,
            "background": background,
        }
        with torch.device("meta"):
            network = build_plus(**found.settings, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        assert found.state.keys() == network.state_dict().keys()
        assert torch.equal(found.text, state["decode_head.text_embeddings"])
        assert (found.background is not None) == background

    def test_the_logits_are_those_of_the_published_code(self, tmp_path: Path) -> None:
        state = checkpoint(background=True)
        torch.save({"meta": {"iter": 3}, "state_dict": state}, tmp_path / "latest.pth")
        found = read_published(tmp_path / "latest.pth")
        network = build_plus(**found.settings, mean=IMAGENET_MEAN, std=IMAGENET_STD).eval()
        network.load_state_dict(found.state)
        features = torch.randn(2, C, 3, 5)
        background = state["decode_head.bg_embeddings"]
        rows = torch.cat([background / background.norm(), state["decode_head.text_embeddings"]])
        expected = F.conv2d(features, rows[:, :, None, None])
        assert torch.allclose(network.logits(features, found.text), expected, atol=1e-5)
        for index in range(4):
            name = f"aspp_modules.{index}.conv.weight"
            theirs = state[f"decode_head.decode_module.{name}"]
            assert torch.equal(network.head.state_dict()[name], theirs)
        trunk = network.backbone.trunk.state_dict()
        assert torch.equal(trunk["conv1.3.weight"], state["backbone.stem.3.weight"])
        assert torch.equal(trunk["bn1.running_var"], state["backbone.stem.7.running_var"])

    def test_rows_may_stand_by_themselves(self) -> None:
        state = checkpoint(background=True)
        bare = {name.replace("decode_head.text_", "text_"): value for name, value in state.items()}
        bare = {name.replace("decode_head.bg_", "bg_"): value for name, value in bare.items()}
        found = convert_published(bare, "file.pth")
        assert torch.equal(found.text, state["decode_head.text_embeddings"])
        assert found.background is not None


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def having(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: {**state, name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (having("auxiliary_head.conv_seg.weight", 2), "unknown tensors auxiliary_head.conv_seg.w"),
        (having("decode_head.conv_seg.bias", 2), "unknown tensors decode_head.conv_seg.bias"),
        (having("decode_head.projector.weight", 2), "unknown tensors decode_head.projector"),
        (having("decode_head.classifier.weight", 2), "unknown tensors decode_head.classifier"),
        (having("text_embeddings", K, C), "expected one decode_head.text_embeddings"),
        (having("decode_head.text_embeddings", C), r"\(K, C\), found \[\[16\]\]"),
        (without("decode_head.text_embeddings"), r"\(K, C\), found \[\]"),
        (having("decode_head.text_embeddings", K, C + 1), r"wrong shape.*is \[16, 2048, 3, 3\]"),
        (having("decode_head.bg_embeddings", 2, C), r"background is \[2, 16\], expected \[1, 16"),
        (
            without("decode_head.decode_module.aspp_modules.2.bn.bias"),
            r"missing \(1\): head\.aspp_modules\.2\.bn\.bias",
        ),
        (having("decode_head.decode_module.odd", 1), r"unexpected \(1\): head\.odd"),
        (without("backbone.layer4.2.bn3.bias"), r"missing \(1\): layer4\.2\.bn3\.bias"),
        (having("backbone.layer5.0.weight", 1), r"unexpected \(1\): layer5\.0\.weight"),
    ],
)
def test_other_files_are_refused(change: Callable[[State], State], message: str) -> None:
    with pytest.raises(PipelineError, match=rf"(?s)^file.pth.*{message}"):
        convert_published(change(checkpoint()), "file.pth")


def test_a_file_of_something_else(tmp_path: Path) -> None:
    for content in ({}, {"conv1.weight": torch.zeros(2)}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(PipelineError, match=r"other\.pth: not a checkpoint of MaskCLIP\+"):
            read_published(tmp_path / "other.pth")


class TestImport:
    @pytest.mark.parametrize("background", [True, False])
    def test_predicts_with_its_names_and_others(
        self, tmp_path: Path, encoder: EncoderParams, background: bool
    ) -> None:
        torch.save({"state_dict": checkpoint(background=background)}, tmp_path / "latest.pth")
        done = import_plus(tmp_path, encoder, "cat,dog,bird,car")
        assert done.exit_code == 0, done.output
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["categories"] == ["cat", "dog", "bird", "car"]
        assert config["architecture"]["label_0"] == ("learned" if background else "none")
        for names in (None, ["horse"]):
            segmenter = Segmenter.load(tmp_path / "out", categories=names, device="cpu")
            semantic = segmenter(Image.new("RGB", (20, 9))).semantic
            lowest = 0 if background else 1
            assert set(np.unique(semantic)) <= {*range(lowest, 1 + len(names or "four"))}

    def test_another_number_of_names_is_refused(
        self, tmp_path: Path, encoder: EncoderParams
    ) -> None:
        torch.save(checkpoint(), tmp_path / "latest.pth")
        done = import_plus(tmp_path, encoder, "cat,dog")
        assert "trained with 4 names, but --categories has 2" in str(done.exception)

    def test_text_of_another_width_is_refused(self, tmp_path: Path, encoder: EncoderParams) -> None:
        torch.save(checkpoint(), tmp_path / "latest.pth")
        import_plus(tmp_path, encoder, "cat,dog,bird,car")
        config = json.loads((tmp_path / "out/config.json").read_text())
        narrow = {**config["architecture"], "channels": 8}
        settings = {name: value for name, value in narrow.items() if name != "label_0"}
        save_checkpoint(
            tmp_path / "out", build_plus(**settings), {**config, "architecture": narrow}
        )
        with pytest.raises(PipelineError, match=r"embeddings are 16 wide, .* trained with 8"):
            Segmenter.load(tmp_path / "out", device="cpu")


def import_plus(folder: Path, encoder: EncoderParams, names: str) -> Result:
    words = ["--from", folder / "latest.pth", "--out", folder / "out", "--categories", names]
    tag = f"{encoder.model}/{encoder.pretrained}"
    options = [*map(str, words), "--encoder", tag]
    return CliRunner().invoke(app, ["import", "denseclip-plus", *options])
