"""Weights files with code in them, given to everything that reads weights; forged imports."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.importers import archives
from pipeline.importers.embeddings import read_clip_retrieval, read_pickle
from pipeline.models.clip import load_clip
from pipeline.models.layers.dino import load_dino
from pipeline.models.masks.selfmask import load_selfmask
from pipeline.models.weights.acquire import add
from pipeline.models.weights.weights import load_state, read_weights
from pipeline.models.weights.zoo import manifest, published
from pipeline.params.base import EncoderParams
from tests.faults.hostile import write_payload

CPU = torch.device("cpu")
FORMS = ["pickle", "legacy", "zip", "torchscript"]
ONE_OF_A_KIND = list({entry.kind: name for name, entry in manifest().items()}.values())

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """The file that a payload makes."""
    return tmp_path / "sprung"


@pytest.mark.parametrize("form", FORMS)
def test_the_trap_works(tmp_path: Path, trap: Path, form: str) -> None:
    path = tmp_path / "evil.pt"
    write_payload(form, path, trap)
    if form == "torchscript":
        torch.jit.load(path)
    elif form == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trap.exists()


LOADERS: dict[str, Callable[[Path], object]] = {
    "load_state": load_state,
    "read_weights": read_weights,
    "selfmask": load_selfmask,
    "dino": lambda path: load_dino(
        EncoderParams(model="dino_vits16", pretrained=str(path)),
        CPU,
        cache_dir=path.parent / "cache",
    ),
    **{
        f"add {name}": lambda path, name=name: add(published(name), path, path.parent / "cache")
        for name in ONE_OF_A_KIND
    },
    "embeddings": read_pickle,
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loader", LOADERS)
def test_code_is_refused_and_not_run(
    tmp_path: Path, trap: Path, loader: str, form: str, suffix: str
) -> None:
    path = tmp_path / f"evil{suffix}"
    write_payload(form, path, trap)
    with pytest.raises(PipelineError, match=rf"evil{suffix}: "):
        LOADERS[loader](path)
    assert not trap.exists()


@pytest.mark.parametrize("form", FORMS)
def test_code_in_the_weights_of_clip(
    tmp_path: Path, trap: Path, tiny_clip: tuple[Path, Path], form: str
) -> None:
    write_payload(form, tmp_path / "evil.pt", trap)
    with pytest.raises(PipelineError, match=r"evil\.pt: cannot be read as weights"):
        load_clip(EncoderParams(model=str(tiny_clip[0]), pretrained=str(tmp_path / "evil.pt")), CPU)
    assert not trap.exists()


def test_a_torchscript_archive_without_such_code_is_still_read(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), tmp_path / "plain.pt")
    assert {name: value.shape for name, value in read_weights(tmp_path / "plain.pt").items()} == {
        "weight": (3, 2),
        "bias": (3,),
    }


def test_objects_in_a_part_of_clip_retrieval(tmp_path: Path) -> None:
    (tmp_path / "img_emb").mkdir()
    path = tmp_path / "img_emb/img_emb_0.npy"
    np.save(path, np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(PipelineError, match=r"img_emb_0\.npy: not a plain NumPy array"):
        read_clip_retrieval(tmp_path)


def test_a_forged_header_of_numpy_is_named(tmp_path: Path) -> None:
    """The header is parsed as Python, which fails in ways of its own."""
    (tmp_path / "img_emb").mkdir()
    path = tmp_path / "img_emb/img_emb_0.npy"
    np.save(path, np.ones((2, 8), np.float16))
    whole = path.read_bytes()
    headers = [whole.replace(b"}", b"("), whole.replace(b"{", b","), whole.replace(b"(2", b"(-")]
    for data in [*headers, whole.replace(b"(2", b"(9" * 9), whole[:20], b""]:
        path.write_bytes(data)
        with pytest.raises(PipelineError, match=r"img_emb_0\.npy: "):
            read_clip_retrieval(tmp_path)


def test_archives_nested_beyond_all_measure_are_named(tmp_path: Path) -> None:
    (tmp_path / "archives.json").write_text("[" * 100_000)
    with pytest.raises(PipelineError, match=r"archives\.json: nested too deeply"):
        archives.run(
            json_path=tmp_path / "archives.json",
            out_path=tmp_path / "archives.parquet",
            categories=["cat"],
            sources={},
            k=1,
            overlap="all",
            prefixes=[],
            max_pixels=100,
            workers=0,
            stats_path=tmp_path / "stats.json",
        )
