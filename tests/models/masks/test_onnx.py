"""Masks by a network in ONNX's format, through the mask stage; the networks are built here."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.formats.images import decode_png
from pipeline.formats.sources import sample_key
from pipeline.formats.tables import ArchiveRow, write_archives
from pipeline.methods.masks import OnnxParams, load_mask_source
from pipeline.params.reading import parse_params
from pipeline.stages import mask
from tests.formats.shard_folders import read_shards
from tests.paths import ROOT

PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "refine": False}


def network(
    path: Path,
    *,
    size: tuple[Any, Any] = (16, 16),
    batch: Any = "B",
    scale: float = 1.0,
    channels: int = 3,
    kind: int = TensorProto.FLOAT,
    maps: int = 1,
    ir_version: int = 8,
) -> Path:
    """Writes a network whose map `saliency` is the mean of the colours, times `scale`.

    Its first output, `twice`, is the double of that.
    """
    weight = np.full((maps, channels, 1, 1), scale / channels, dtype=np.float32)
    image = helper.make_tensor_value_info("image", kind, [batch, channels, *size])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, maps, *size])
        for name in ("twice", "saliency")
    ]
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["pixels", "weight"], ["saliency"]),
        helper.make_node("Add", ["saliency", "saliency"], ["twice"]),
    ]
    graph = helper.make_graph(
        nodes, "mean", [image], outputs, [numpy_helper.from_array(weight, "weight")]
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=ir_version
    )
    onnx.save(model, path)
    return path


def params(path: Path, **changes: Any) -> OnnxParams:
    return OnnxParams(**{"weights": path, "output": "saliency", **PLAIN, **changes})


def runtime(root: Path) -> Runtime:
    return Runtime(device=torch.device("cpu"), amp_dtype=None, seed=0, cache_dir=root / "cache")


def half_bright(height: int, width: int) -> Image.Image:
    """The left half is bright, the right one dark."""
    pixels = np.full((height, width, 3), 20, np.uint8)
    pixels[:, : width // 2] = 230
    return Image.fromarray(pixels)


def row(root: Path, name: str, image: Image.Image, rank: int) -> ArchiveRow:
    image.save(root / name)
    return ArchiveRow(
        category="cat",
        label_id=1,
        rank=rank,
        key=sample_key("photos", name),
        similarity=0.5,
        source="photos",
        path=(root / name).as_posix(),
        member=None,
        offset=None,
        width=image.width,
        height=image.height,
        sha256=hashlib.sha256((root / name).read_bytes()).hexdigest(),
    )


def masks_of(root: Path, chosen: OnnxParams, out: str = "masks") -> dict[str, NDArray[np.bool_]]:
    """Masks of three photos of other shapes by the mask stage, by size of the photo."""
    sizes = [(32, 48), (40, 20), (16, 16), (32, 48)]
    rows = [
        row(root, f"{rank}.png", half_bright(*size), rank) for rank, size in enumerate(sizes, 1)
    ]
    write_archives(root / "archives.parquet", rows)
    mask.run(
        archives_path=root / "archives.parquet",
        out_dir=root / out,
        params=chosen,
        runtime=runtime(root),
        stats_path=root / f"{out}.json",
    )
    samples = read_shards(root / out, members=("jpg", "mask.png", "json"))
    return {sample["__key__"]: decode_png(sample["mask.png"]) > 0 for sample in samples}


@pytest.mark.parametrize("resize", ["stretch", "fit"])
@pytest.mark.parametrize("batch", ["B", 1])
def test_the_mask_is_where_the_map_exceeds_the_threshold(
    tmp_path: Path, resize: str, batch: Any
) -> None:
    chosen = params(network(tmp_path / "net.onnx", batch=batch), resize=resize)
    masks = masks_of(tmp_path, chosen)
    assert sorted(found.shape for found in masks.values()) == [
        (16, 16), (32, 48), (32, 48), (40, 20)
    ]  # fmt: skip
    for found in masks.values():
        width = found.shape[1]
        edge = width // 8
        assert found[:, : width // 2 - edge].all()
        assert not found[:, width // 2 + edge :].any()


def test_a_second_run_has_the_same_bytes_and_another_file_of_that_name_new_masks(
    tmp_path: Path,
) -> None:
    path = network(tmp_path / "net.onnx")
    first = masks_of(tmp_path, params(path), "first")
    masks_of(tmp_path, params(path), "second")
    for name in ("first", "second"):
        assert (tmp_path / name).is_dir()
    shards = [sorted((tmp_path / name).glob("*.tar")) for name in ("first", "second")]
    assert [p.read_bytes() for p in shards[0]] == [p.read_bytes() for p in shards[1]]
    network(path, scale=0.1)
    third = masks_of(tmp_path, params(path), "third")
    assert any(found.any() for found in first.values())
    assert not any(found.any() for found in third.values())


def probabilities(path: Path, images: torch.Tensor, **changes: Any) -> NDArray[np.float32]:
    source = load_mask_source(params(path, **changes), runtime(path.parent))
    return source.predict(images).numpy()


def test_normalisation_and_sigmoid_come_to_the_map(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.2, 0.3, 0.4]), torch.tensor([0.5, 0.4, 0.3])
    found = probabilities(
        network(tmp_path / "net.onnx"),
        images,
        mean=mean.tolist(),
        std=std.tolist(),
        activation="sigmoid",
    )
    expected = ((images - mean[:, None, None]) / std[:, None, None]).mean(1).sigmoid()
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_the_first_output_is_the_default(tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx", scale=0.5)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    twice, once = (probabilities(path, images, output=name) for name in ("", "saliency"))
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)


def test_fit_centres_the_image_in_shape(tmp_path: Path) -> None:
    """A column of an image twice as high as wide stays as wide as it was."""
    path = network(tmp_path / "net.onnx", size=("H", "W"))
    images = torch.zeros(1, 3, 32, 16)
    images[..., 4:8] = 1
    fit = probabilities(path, images, resize="fit", size=32)
    np.testing.assert_allclose(fit[0], images[0, 0].numpy(), atol=1e-6)
    stretched = probabilities(path, images, resize="stretch", size=[32, 16])
    np.testing.assert_allclose(stretched[0], images[0, 0].numpy(), atol=1e-6)


def test_one_pixel_has_a_mask(tmp_path: Path) -> None:
    images = torch.full((1, 3, 1, 1), 0.75)
    for resize in ("stretch", "fit"):
        found = probabilities(network(tmp_path / "net.onnx"), images, resize=resize)
        np.testing.assert_allclose(found, [[[0.75]]], atol=1e-6)


def write_text(path: Path) -> Path:
    path.write_text("a saliency network")
    return path


def write_split(path: Path) -> Path:
    """A network whose weights lie in a file beside it."""
    model = onnx.load(network(path))
    onnx.save(model, path, save_as_external_data=True, location="net.weights", size_threshold=0)
    return path


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (lambda path: path, {}, r"mask.weights: .*net.onnx: no such file; expected a .onnx file"),
        (lambda path: path.parent, {}, r"mask.weights: .*: cannot be read: Is a directory"),
        (write_text, {}, r"mask.weights: .*net.onnx: onnxruntime [\d.]+ cannot load it"),
        (write_split, {}, r"net.onnx: onnxruntime .* cannot load it .* in one file"),
        (network, {"size": 32}, r"mask.size: \[32, 32\], but .*net.onnx takes .* \[16, 16\]"),
        (
            lambda path: network(path, size=("H", "W")),
            {},
            r"mask.size: .*net.onnx takes images of any size; set the one",
        ),
        (
            lambda path: network(path, channels=1),
            {},
            r"mask.weights: .*: inputs: image tensor\(float\) \['B', 1, 16, 16\]; expected one",
        ),
        (
            lambda path: network(path, kind=TensorProto.UINT8),
            {},
            r"mask.weights: .*inputs: image tensor\(uint8\).*export the network anew",
        ),
        (lambda path: network(path, batch=4), {}, r"mask.weights: .*\[4, 3, 16, 16\].* B 1 or any"),
        (
            network,
            {"output": "salience"},
            r"mask.output: .*net.onnx has no output 'salience'; its outputs: twice, saliency",
        ),
        (
            lambda path: network(path, maps=2),
            {},
            r"mask.output: 'saliency' of .* shape \(2, 2, 16, 16\) for 2 images; .*: twice",
        ),
        (
            lambda path: network(path, scale=9.0),
            {},
            r"mask.activation: none, but 'saliency' of .*net.onnx has values from .* to 9, which",
        ),
        (
            lambda path: network(path, scale=float("nan")),
            {},
            r"mask.output: 'saliency' of .*net.onnx holds values that are not finite",
        ),
    ],
)
def test_a_network_that_does_not_fit_is_named(
    tmp_path: Path, make: Callable[[Path], Path], changes: dict[str, Any], message: str
) -> None:
    path = make(tmp_path / "net.onnx")
    with pytest.raises(PipelineError, match=message):
        probabilities(path, torch.ones(2, 3, 8, 8), **changes)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"source": "onnx"}, "params.yaml: key 'mask.weights' is missing"),
        ({"source": "onnx", "weights": "a.onnx", "size": 0}, "mask.size.0: .* got 0"),
        ({"source": "onnx", "weights": "a.onnx", "size": [8]}, r"mask.size: .*got \[8\]"),
        ({"source": "onnx", "weights": "a.onnx", "std": [1, 0, 1]}, "mask.std.1: .*got 0"),
        ({"source": "onnx", "weights": "a.onnx", "treshold": 1.0}, "did you mean 'threshold'"),
    ],
)
def test_a_wrong_param_is_named(section: dict[str, Any], message: str) -> None:
    content = {"categories": ["cat"], "index": {"photos": {"root": "photos"}}, "mask": section}
    with pytest.raises(PipelineError, match=message):
        parse_params(content)


def test_without_the_package_the_command_that_installs_it_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from pathlib import Path; import torch\n"
        "from pipeline.engine.runtime import make_runtime\n"
        "from pipeline.methods.masks import OnnxParams, load_mask_source\n"
        f"path = Path({str(network(tmp_path / 'net.onnx'))!r})\n"
        "load_mask_source(OnnxParams(weights=path), make_runtime(device='cpu'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "onnx needs a further package: pip install -c requirements.lock -e '.[photos]'" in (
        done.stderr
    )
