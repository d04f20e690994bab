"""Assembled networks and their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file

from pipeline.errors import PipelineError
from pipeline.models.weights.checkpoint import save_checkpoint
from pipeline.models.weights.weights import load_state, load_strict, save_tensors
from pipeline.models.zutis.build import build_zutis
from pipeline.models.zutis.network import Zutis


def network(**options: Any) -> Zutis:
    encoder = VisionTransformer(32, 8, 16, 1, 2, 2.0, output_dim=12)
    sizes = {"num_queries": 3, "decoder_layers": 2, "num_heads": 2, "feedforward_dim": 8}
    return build_zutis(encoder, **(sizes | options))


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = network(), network()
    folder = tmp_path / "models" / "zutis"
    save_checkpoint(folder, model, {"step": 7, "categories": ["cat", "Zürich"]})
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["step"] == 7
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    load_strict(other, load_state(folder / "model.safetensors"), folder)
    images = torch.rand(1, 3, 24, 16)
    with torch.inference_mode():
        assert torch.equal(model(images).mask_logits, other(images).mask_logits)
        assert torch.equal(model(images).patch_tokens, other(images).patch_tokens)


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    model = network()
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, model, {})
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert first == second


def test_torch_file_without_code_is_read(tmp_path: Path) -> None:
    model = network()
    torch.save(model.state_dict(), tmp_path / "official.pt")
    state = load_state(tmp_path / "official.pt")
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_half_precision_weights_are_cast(tmp_path: Path) -> None:
    model = network()
    save_file({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "half.safetensors")
    load_strict(model, load_state(tmp_path / "half.safetensors"), "half.safetensors")
    assert all(p.dtype == torch.float32 for p in model.parameters())


class Hostile:
    """Unpickling it would call a function."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("executed",)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"\xff" * 64])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PipelineError, match=rf"{name}: cannot be read as weights"):
        load_state(tmp_path / name)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_cut_files_are_named(tmp_path: Path, name: str) -> None:
    state = network().state_dict()
    save_file(state, tmp_path / name) if name.endswith("s") else torch.save(state, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PipelineError, match=rf"{name}: cannot be read as weights"):
        load_state(tmp_path / name)


def test_code_in_a_torch_file_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"weight": Hostile()}, tmp_path / "evil.pt")
    with pytest.raises(PipelineError, match=r"evil\.pt: cannot be read"):
        load_state(tmp_path / "evil.pt")
    assert "executed" not in capsys.readouterr().out


def test_missing_file_and_wrapped_state_are_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"nothing\.pt: no such weights file"):
        load_state(tmp_path / "nothing.pt")
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "wrapped.pt")
    with pytest.raises(PipelineError, match=r"wrapped\.pt: expected a plain state dict"):
        load_state(tmp_path / "wrapped.pt")


def test_weights_of_another_architecture_are_listed() -> None:
    model, other = network(), network(num_queries=5, decoder_layers=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PipelineError) as caught:
        load_strict(model, other.state_dict(), "other.safetensors")
    message = str(caught.value)
    assert message.startswith("other.safetensors: not the weights of the expected network Zutis(")
    assert "patch 8, width 16, 1 encoder blocks, 16 positions, text space 12" in message
    assert "3 queries, 2 decoder layers" in message
    assert "unexpected (18): decoder.layers.2.self_attn.in_proj_weight" in message
    assert "and 8 more" in message
    assert "wrong shape (1): query_embed is [5, 16], expected [3, 16]" in message
    assert "missing" not in message
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_missing_tensors_are_listed() -> None:
    model = network()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("ffn2.layers.0")}
    with pytest.raises(PipelineError, match=r"missing \(2\): ffn2.layers.0.weight, ffn2.layers.0"):
        load_strict(model, state, "w.safetensors")


def test_failed_save_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    model = network()
    save_checkpoint(tmp_path, model, {"step": 1})
    old = load_state(tmp_path / "model.safetensors")
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, network(num_queries=4), {"step": object()})
    new = load_state(tmp_path / "model.safetensors")
    assert new["query_embed"].shape == old["query_embed"].shape
    assert json.loads((tmp_path / "config.json").read_text())["step"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_write_is_the_systems_error(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "w.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        save_tensors({"a": torch.zeros(3)}, path)
    assert caught.value.filename == str(path)


@pytest.mark.parametrize(("name", "value"), [("num_queries", 0), ("feedforward_dim", -1)])
def test_impossible_sizes_name_the_argument(name: str, value: int) -> None:
    with pytest.raises(PipelineError, match=f"{name}: {value}"):
        network(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_norm": "batch"}, "token_norm: 'batch'; known are map, token, none"),
        ({"position_resize": "nearest"}, "position_resize: 'nearest'; known are scale, size, grid"),
        ({"mean": [0.5]}, "mean: .*three numbers"),
        ({"std": [0.5, 0.5, 0.0]}, "std above 0"),
    ],
)
def test_unknown_variants_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        network(**options)
