"""`pipeline weights`: its commands, with a cache folder and files of real names and shapes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from pipeline.cli.weights import weights_app
from pipeline.errors import PipelineError
from pipeline.models.masks.selfmask import SelfMaskConfig, load_selfmask
from pipeline.models.weights.zoo import manifest
from tests.paths import REFERENCE

KNOWN = f"not among the published weights: {', '.join(manifest())}"
LAYOUT = REFERENCE / "checkpoint_layout_selfmask_nq20.json"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def selfmask_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SelfMask checkpoint of the real size, of one value and one byte a number."""
    shapes = json.loads(LAYOUT.read_text())["tensors"]
    state = {
        name: torch.ones((), dtype=torch.uint8).expand(shape) for name, shape in shapes.items()
    }
    path = tmp_path_factory.mktemp("downloads") / "selfmask_nq20.pt"
    torch.save(state, path)
    return path


def weights(*args: str) -> Result:
    return CliRunner().invoke(weights_app, list(args))


def error(result: Result) -> str:
    """The message that `pipeline` prints behind `error:`."""
    assert isinstance(result.exception, PipelineError)
    return str(result.exception)


def state_of(name: str) -> str:
    (line,) = [line for line in weights("list").stdout.splitlines() if line.split()[0] == name]
    return line


def test_the_names_of_a_closed_list_are_found_by_a_word() -> None:
    whole = weights("names", "photo_clip").stdout.splitlines()
    assert len(whole) == 2036
    found = weights("names", "photo_clip", "Polar-Bear").stdout.splitlines()
    assert found == [name for name in whole if "polar bear" in name] != []
    assert "takes any name" in weights("names", "ViT-B-32").stdout
    assert "'zebre' is in none of the 2036" in error(weights("names", "photo_clip", "zebre"))
    assert "no architecture" in error(weights("names", "photo_clp"))


def test_list_shows_every_name_with_its_state(cache: Path) -> None:
    result = weights("list")
    assert result.exit_code == 0
    rows = result.stdout.splitlines()[1:]
    assert [row.split()[0] for row in rows] == list(manifest())
    assert all(row.endswith("not fetched") for row in rows)
    assert "ViT-L-14-336-quickgelu" in state_of("clip_vit_l_14_336")
    assert "934.1 MB" in state_of("clip_vit_l_14_336")
    assert not cache.exists()


def test_an_added_file_is_listed_checked_and_usable(cache: Path, selfmask_file: Path) -> None:
    result = weights("add", "selfmask_nq20", str(selfmask_file))
    assert result.exit_code == 0
    assert "its SHA-256 was recorded" in result.stdout
    assert state_of("selfmask_nq20").endswith(" cached")
    assert weights("check").stdout == "selfmask_nq20: ok\n1 in the cache, all intact\n"
    path = cache / "weights/selfmask_nq20.safetensors"
    assert str(path) in result.stdout
    assert load_selfmask(path).config == SelfMaskConfig()
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["source_sha256"] == hashlib.sha256(selfmask_file.read_bytes()).hexdigest()

    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x05")
    result = weights("check")
    assert result.exit_code == 1
    assert "selfmask_nq20.safetensors has SHA-256" in result.stdout
    assert error(result).startswith("1 of 1 damaged: selfmask_nq20; `pipeline weights fetch NAME`")

    result = weights("fetch", "selfmask_nq20", "--url", selfmask_file.as_uri())
    assert result.exit_code == 0
    assert weights("check").exit_code == 0


def test_an_empty_cache_is_intact(cache: Path) -> None:
    result = weights("check")
    assert result.exit_code == 0
    assert result.stdout == "0 in the cache, all intact\n"
    assert not cache.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fetch", "selfmask"], "'selfmask' is not among the published weights: clip_vit_b_32, "),
        (["fetch", "selfmsk_nq20"], f"'selfmsk_nq20' is {KNOWN}; did you mean selfmask_nq20 or "),
        (["fetch", "ViT-B-32"], f"'ViT-B-32' is {KNOWN}; did you mean clip_vit_b_"),
        (["fetch", "xyz"], f"'xyz' is {KNOWN}"),
        (["fetch", "dino_vits8", "--url", "none.pth"], "none.pth: no such file; --url takes http"),
        (["fetch", "dino_vits8", "--url", "ftp://x/y.pth"], "ftp://x/y.pth: no such file; --url"),
        (["add", "dino_vits8", "none.pth"], "none.pth: no such weights file"),
    ],
)
def test_mistakes_are_answered(cache: Path, args: list[str], message: str) -> None:
    assert error(weights(*args)).startswith(message)
    assert not cache.exists()


def test_another_network_changes_nothing(cache: Path, selfmask_file: Path) -> None:
    message = error(weights("add", "selfmask_nq10", str(selfmask_file)))
    assert "selfmask_nq10: SelfMask, 10 queries" in message
    assert "query_embed is [20, 384], expected [10, 384]" in message
    assert not cache.exists()
